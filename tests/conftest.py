"""Set before torch loads, here and (inherited) in the ranks: fp32 bits on the CPU depend on it."""

import os

os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from forked_ranks import start_forked
from oracle import Oracle

from cineline.engine import launch
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RandomConfig], Path]:
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
