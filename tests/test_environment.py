"""What the environment may say, and one sentence where it says something else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_family import ToySpec

from cineline import Engine, InvalidConfig, ParallelConfig
from cineline.core.config import MOST_THREADS, DeviceConfig, asked_threads
from cineline.core.hosts import address_of_master
from cineline.engine import launch
from cineline.engine.torchrun import need_torchrun, torchrun_rank, torchrun_world
from cineline.errors import shown
from cineline.transport.mesh import check_interfaces

WORLD = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SIGNS = {"LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
LIMITS = {"RANK": (0, 7), "WORLD_SIZE": (4, 10**6), "LOCAL_RANK": (0, 1), "LOCAL_WORLD_SIZE": (2, 8)}
LIMITS["MASTER_PORT"] = (1, 65535)
"""From what to what each may be where the others are as above."""

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9)


def environment(given: dict[str, str]) -> AbstractContextManager[Any]:
    others = {name: value for name, value in os.environ.items() if name not in WORLD}
    return patch.dict(os.environ, others | given, clear=True)


@given(st.sets(st.sampled_from(sorted(WORLD))), st.sets(st.sampled_from(sorted(WORLD))))
def test_some_of_torchruns_variables_are_no_world(there: set[str], empty: set[str]) -> None:
    there -= empty  # a variable that is empty is not set
    missing = WORLD.keys() - there - {"TORCHELASTIC_RUN_ID"}
    with environment({name: WORLD[name] for name in there} | dict.fromkeys(empty, "")):
        if not there & SIGNS:
            assert torchrun_rank() is None
            with pytest.raises(InvalidConfig, match="needs a torchrun world") as refused:
                need_torchrun()
            missing |= {"TORCHELASTIC_RUN_ID"}
        elif not missing:
            assert torchrun_rank() == 3
            assert torchrun_world() == (8, 2)
            assert address_of_master() == "127.0.0.1"
            return
        else:
            with pytest.raises(InvalidConfig) as refused:
                torchrun_rank()
    sentence = str(refused.value)
    named = sentence.partition("not set: " if "not set: " in sentence else "but not ")[2].partition(":")[0]
    assert set(named.rstrip(").").split(", ")) == missing


@given(
    st.sampled_from(sorted(LIMITS)),
    st.integers(-3, 70_000).map(str) | st.integers().map(str) | TEXTS | TEXTS.map(lambda text: text * 99),
)
def test_a_number_of_torchruns_is_one_in_its_range(name: str, value: str) -> None:
    least, most = LIMITS[name]
    right = value.isascii() and value.isdigit() and len(value) < 10 and least <= int(value) <= most
    with environment(WORLD | {name: value}):
        if right:
            assert torchrun_rank() == (int(value) if name == "RANK" else 3)
        else:
            with pytest.raises(
                InvalidConfig, match=r"is no whole number from \d+ to \d+: start with torchrun"
            ) as refused:
                torchrun_rank()
            assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70, "x" * 10_000, "a..b", "\udcff"])
def test_a_host_that_cannot_be_found_is_named(name: str) -> None:
    with (
        environment(WORLD | {"MASTER_ADDR": name, "WORLD_SIZE": "2"}),
        pytest.raises(InvalidConfig, match="MASTER_ADDR=") as refused,
    ):
        launch.check_launch("torchrun", ParallelConfig(pp=2))
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_a_host_that_is_not_this_one_is_named() -> None:
    with (
        environment(WORLD | {"MASTER_ADDR": "192.0.2.1", "WORLD_SIZE": "2"}),
        pytest.raises(InvalidConfig, match=r"'192\.0\.2\.1' is no address of this host"),
    ):
        launch.check_launch("torchrun", ParallelConfig(pp=2))


def test_ranks_of_this_machine_know_nothing_of_another_world(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, str]] = []

    class Started(Exception):
        pass

    def popen(arguments: list[str], environment: Mapping[str, str], inherited: tuple[int, ...]) -> None:
        seen.append(environment)
        raise Started

    monkeypatch.setattr(launch, "_popen", popen)
    with environment(WORLD | {"KEPT": "1"}), pytest.raises(Started):
        launch.start_piped(launch.WORKER, DeviceConfig("cpu").rank_environment(1))
    assert seen[0]["KEPT"] == "1"
    assert not seen[0].keys() & WORLD.keys() - {"TORCHELASTIC_RUN_ID"}


def test_a_rank_on_one_core_has_one_thread() -> None:
    with environment({"OMP_NUM_THREADS": ""}):
        assert DeviceConfig("cpu", pin_cores=True).rank_environment(1)["OMP_NUM_THREADS"] == "1"


@given(st.integers(-3, 2000).map(str) | st.integers().map(str) | TEXTS | st.just(""), st.sampled_from(["", ",2", " "]))
def test_threads_are_a_number_of_them(text: str, rest: str) -> None:
    given = text + rest
    first = given.strip().partition(",")[0].strip()
    with environment({"OMP_NUM_THREADS": given}):
        if not given.strip():
            assert asked_threads() is None
            assert int(DeviceConfig("cpu").rank_environment(10**6)["OMP_NUM_THREADS"]) == 1
        elif first.isascii() and first.isdigit() and 1 <= int(first) <= MOST_THREADS:
            assert DeviceConfig("cpu").rank_environment(1)["OMP_NUM_THREADS"] == str(int(first))
        else:
            with pytest.raises(InvalidConfig, match=r"OMP_NUM_THREADS=.* is no whole number from 1 to 1024"):
                DeviceConfig("cpu").rank_environment(1)


def test_absurd_threads_are_one_sentence_and_nothing_of_a_librarys() -> None:
    command = [sys.executable, "-m", "cineline", "generate", "x", "--quiet"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "many"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cineline: OMP_NUM_THREADS='many' is no whole number")
    assert done.stderr.count("\n") == 1


HERE = [name for _, name in socket.if_nameindex()]


@given(st.lists(TEXTS.map(lambda text: text.replace(",", "")) | st.just("lo"), min_size=1, max_size=3))
def test_interfaces_are_those_that_are_here(names: list[str]) -> None:
    wrong = [name for name in names if name and name not in HERE]
    if not wrong:
        check_interfaces(",".join(name for name in names if name in ("", "lo")))
        return
    with pytest.raises(InvalidConfig) as refused:
        check_interfaces(",".join(names))
    told = f"GLOO_SOCKET_IFNAME={shown(','.join(names))}: {shown(wrong[0])} is no network interface"
    assert told in str(refused.value)
    assert "here: lo" in str(refused.value)


def test_ranks_that_are_told_a_wrong_interface_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth77")
    with pytest.raises(InvalidConfig, match="GLOO_SOCKET_IFNAME='lo,eth77': 'eth77' is no network interface"):
        Engine(ToySpec(), ParallelConfig(pp=2), device="cpu")


def test_without_a_loopback_interface_ranks_are_refused_at_once() -> None:
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    started = time.monotonic()
    done = subprocess.run(
        [*alone, sys.executable, "-m", "cineline", "generate", "x", "--pp", "2", "--device", "cpu", "--quiet"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - started < 10
    assert done.returncode == 2
    assert done.stderr.startswith("cineline: Ranks meet at 127.0.0.1, which cannot be reached (Network is unreachable)")
    assert done.stderr.count("\n") == 1
