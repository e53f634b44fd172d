"""Ranks on a Ray cluster: bits, actors that are killed, what cannot be placed, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'cineline[ray]'")

import ray
from faulty_family import FaultySpec, UnloadableSpec
from oracle import Checkpoint
from safetensors.torch import load_file
from served import ServerProcess, create, small_model, wait_done, wait_ready
from test_engine import assert_right, request
from test_parity import mixed_requests
from two_hosts import APART, need_namespaces

from cineline import Engine, InvalidConfig, ParallelConfig, RankFailed, RequestHandle
from cineline.engine import ray_launch
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.rank import ray_actor

LIMIT_S = 60.0
CORES = 4
"""That the cluster believes to have."""


def short_folder() -> AbstractContextManager[str]:
    """For a cluster's files; its name is short, since those of sockets are in it."""
    return tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One of this machine, which this process is connected to."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # Ray would keep a token in the home folder
        ray.init(
            num_cpus=CORES,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            _temp_dir=stack.enter_context(short_folder()),
        )
        yield
        ray.shutdown()


def free() -> float:
    return float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]


def ranks_here() -> list[psutil.Process]:
    """Ranks of Ray's actors on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if ray_actor.MODULE in (process.info["cmdline"] or ()):
            found.append(process)
    return found


def assert_all_free() -> None:
    deadline = time.monotonic() + LIMIT_S
    while free() < CORES or ranks_here():
        assert time.monotonic() < deadline, (free(), ranks_here())
        time.sleep(0.1)


def engine(stages: int, **options: Any) -> Engine:
    return Engine(FaultySpec(), ParallelConfig(pp=stages), device="cpu", launcher="ray", **options)


@pytest.mark.parametrize("stages", [1, 3])
def test_another_family_runs_on_actors_and_gives_all_up(stages: int) -> None:
    wanted = [request(seed=seed, num_frames=1 + 7 * seed, guidance_scale=1.0 + seed) for seed in range(3)]
    with engine(stages) as line:
        assert free() == CORES - stages
        handles = [line.submit(one) for one in wanted]
        for handle, one in zip(handles, wanted, strict=True):
            assert_right(handle, one)
    assert line.traffic.keys() == set(range(stages))
    assert_all_free()


def test_two_actors_give_the_bits_of_one_process(checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig("t2v", seed=3))
    requests = mixed_requests("t2v")[:2]
    assert len({(request.height, request.width) for request in requests}) == 2
    with (
        Engine(folder, device="cpu") as alone,
        Engine(folder, ParallelConfig(pp=2), device="cpu", launcher="ray") as line,
    ):
        expected, found = ([own.submit(request) for request in requests] for own in (alone, line))
        for one, other in zip(expected, found, strict=True):
            made, right = other.result(LIMIT_S), one.result(LIMIT_S)
            assert made.latents.equal(right.latents)
            assert made.frames is not None and right.frames is not None and np.array_equal(made.frames, right.frames)
    assert_all_free()


def test_a_killed_actor_and_a_killed_rank_are_started_anew_with_their_bits(caplog: pytest.LogCaptureFixture) -> None:
    wanted = [request("slow", seed=seed, num_inference_steps=40) for seed in range(3)]
    with engine(2) as line:
        handles = [line.submit(one) for one in wanted]
        wait_step(handles, 5)
        actor = ranks_here()[1].parent()
        assert actor is not None and "RankActor" in actor.name()
        actor.kill()
        while not all(handle.restarts for handle in handles):
            time.sleep(0.01)
        wait_step(handles, 20)
        ranks_here()[0].kill()
        for handle, one in zip(handles, wanted, strict=True):
            assert_right(handle, one)
            assert handle.restarts == 2
    assert "its actor is gone" in caplog.text and "was killed by SIGKILL" in caplog.text
    assert_all_free()


def wait_step(handles: list[RequestHandle], step: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while min(handle.progress[0] for handle in handles) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_fails_at_the_start_leaves_nothing_behind() -> None:
    with pytest.raises(RankFailed, match=r"Rank [01] failed: AttributeError"):
        Engine(UnloadableSpec(), ParallelConfig(pp=2), device="cpu", launcher="ray")
    assert_all_free()


def test_a_cluster_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_launch, "PLACE_LIMIT_S", 1.0)
    with pytest.raises(InvalidConfig, match=r"no room for 5 ranks of 1 CPU each after 1 s \(4 CPU in all, 4 free\)"):
        engine(5)
    assert_all_free()


def test_nodes_with_other_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_launch, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(InvalidConfig, match=r"has torch .*, and the engine 1\.0: install the same on all nodes"):
        engine(2)
    assert_all_free()


def test_a_device_that_ray_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="not on device='xpu'"):
        Engine(FaultySpec(), device="xpu", allow_untested_device=True, launcher="ray")


@pytest.mark.parametrize(
    ("address", "words"), [("127.0.0.1:1", "cannot be reached"), ("ray://127.0.0.1:1", "this is Ray's client")]
)
def test_a_cluster_that_is_none_is_told_at_once(address: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        ray_launch._check_address(address)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cineline", *arguments, "--launcher", "ray", "--quiet"]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has other processes find the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


@pytest.mark.usefixtures("address")
def test_generate_places_its_ranks_on_the_cluster(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig("ti2v", seed=3))
    small = ["--height", "32", "--width", "64", "--num-frames", "5", "--num-inference-steps", "2"]
    made = []
    for name, options in (("one", ["--launcher", "local"]), ("ray", ["--launcher", "ray", "--pp", "2"])):
        latents = tmp_path / f"{name}.safetensors"
        own = ["generate", "a cat", "--model", str(folder), *small, "--save-latents", str(latents), "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "cineline", *own, *options], capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        made.append(load_file(latents)["latents"])
    assert made[0].equal(made[1])
    assert_all_free()


@pytest.mark.usefixtures("address")
def test_ranks_end_with_an_engine_that_is_killed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig("ti2v", seed=3))
    own = command("generate", "a cat", "--model", str(folder), "--pp", "2", "--num-inference-steps", "500")
    with subprocess.Popen([*own, "--output", str(tmp_path / "a.mp4")]) as process:
        deadline = time.monotonic() + LIMIT_S
        while len(ranks_here()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert_all_free()


@pytest.mark.usefixtures("address")
def test_a_service_has_two_lines_behind_one_queue(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path)
    options = ["--launcher", "ray", "--replicas", "2", "--pp", "2"]
    server = ServerProcess(model, tmp_path / "data", *options)
    wait_ready(server.client)
    assert len(ranks_here()) == 4
    jobs = [create(server.client, seed=seed)["id"] for seed in range(6)]
    for job in jobs:
        assert wait_done(server.client, job)["status"] == "completed"
    time.sleep(0.6)  # a beat of the ranks
    lines = server.client.get("/metrics").text.splitlines()
    busy = [line.rsplit(" ", 1) for line in lines if line.startswith("cineline_rank_busy_seconds_total")]
    assert [name for name, _ in busy] == [f'cineline_rank_busy_seconds_total{{rank="{rank}"}}' for rank in range(4)]
    assert all(float(seconds) > 0 for _, seconds in busy)
    assert server.terminate() == 0
    assert_all_free()


def test_a_node_that_is_lost_is_replaced_by_one_that_comes() -> None:
    """Two nodes in network namespaces, a rank on each."""
    need_namespaces()
    here = Path(__file__).parent
    with short_folder() as folder:
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_FOLDER": folder, "CUT": "quietly"}
        with subprocess.Popen(
            [*APART, "bash", here / "two_hosts.sh", sys.executable, here / "ray_toy.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        ) as hosts:
            last = threading.Timer(5 * LIMIT_S, hosts.kill)
            last.start()
            try:
                assert hosts.stdin is not None and hosts.stdout is not None
                assert hosts.stdout.readline() == "going\n"
                hosts.stdin.write("unplug\n")
                hosts.stdin.flush()
                assert hosts.stdout.readline() == "equal 1\n"
            finally:
                hosts.kill()
                last.cancel()
