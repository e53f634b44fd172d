"""Set before torch loads, here and (inherited) in the ranks: fp32 bits on the CPU depend on it."""

import os

os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from faulty_family import Plan
from forked_ranks import start_forked
from oracle import Checkpoint, Oracle

from cineline.core.faults import VARIABLE
from cineline.engine import blueprint, launch
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint

torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None)  # others may have the machine
hypothesis.settings.load_profile("suite")


def commit() -> int:
    """The commit's hash as a number; 0 where there is no git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return int(subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True).stdout, 16)
    except (OSError, subprocess.CalledProcessError):
        return 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unless marks or tests are asked for, none of the soak and of serve is run, one of the products of axes and a
    tenth of the chaos: the commit says which."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    products = [item for item in items if item.get_closest_marker("products")]
    if products:
        del products[commit() % len(products)]
    chaos = [item for item in items if item.get_closest_marker("chaos")]
    del chaos[commit() % 10 :: 10]
    long = [item for item in items if item.get_closest_marker("soak") or item.get_closest_marker("serve")]
    left_out = [*products, *chaos, *long]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Where the header would be, which -q leaves out: how to run that one again at any commit."""
    if config.option.markexpr:
        return []
    products = [item.nodeid for item in items if item.get_closest_marker("products")]
    return [f"of the products of axes, by the commit: pytest '{name}'" for name in products]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random checkpoint of a config, made once a session."""

    @cache
    def make(config: RandomConfig) -> Path:
        return save_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / config.kind, config)

    return make


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """What diffusers' own pipelines give."""
    return Oracle()


@pytest.fixture(autouse=True)
def fast_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork ranks from a process that has the libraries, but where a test is about their processes."""
    if request.node.get_closest_marker("real_start") is None:
        monkeypatch.setattr(launch, "start_ranks", start_forked)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Has the next engine do these faults."""

    def to_environment(*faults: dict[str, Any]) -> None:
        monkeypatch.setenv(VARIABLE, json.dumps(faults))

    return to_environment


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Has engines start ranks that pretend to have a device."""
    from pretended_ranks import Pretence, starter  # late: few tests need it

    def pretend(**options: Any) -> Pretence:
        pretence = Pretence(tmp_path, **options)
        monkeypatch.setattr(launch, "start_ranks", starter(pretence))
        monkeypatch.setattr(blueprint, "_check_devices", lambda parallel, config: None)
        return pretence

    return pretend
