"""The engine with real rank processes: bits, cancels, failures, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest
from faulty_family import FaultySpec, UnloadableSpec
from toy_family import ToySpec
from toy_reference import toy_reference

from cineline import (
    Engine,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    ParallelConfig,
    RankFailed,
    RequestCancelled,
    RequestHandle,
    ResultTimeout,
    VideoRequest,
)
from cineline.engine import launch

LIMIT_S = 30.0


def nurseries() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if launch.NURSERY in child.cmdline()]


def own_ranks() -> list[psutil.Process]:
    """Rank processes that this one has started and that are still there."""
    children = psutil.Process().children()
    forked = [rank for nursery in nurseries() for rank in nursery.children()]
    return forked + [child for child in children if launch.WORKER in child.cmdline()]


def request(prompt: str = "abc", **fields: object) -> VideoRequest:
    return VideoRequest(**{"prompt": prompt, "num_inference_steps": 6, "guidance_scale": 3.0} | fields)


def engine(spec: ToySpec, stages: int, **options: Any) -> Engine:
    return Engine(spec, ParallelConfig(pp=stages), device="cpu", **{"restarts": 0} | options)


def assert_right(handle: RequestHandle, wanted: VideoRequest) -> None:
    video = handle.result(LIMIT_S)
    latents, frames = toy_reference(ToySpec(), wanted)
    assert video.latents.equal(latents)
    assert (frames is None) == (video.frames is None)
    assert frames is None or video.frames is None or np.array_equal(video.frames, frames)


@pytest.mark.real_start
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_another_family_runs_over_real_processes(stages: int) -> None:
    wanted = [request(seed=seed, num_frames=1 + 7 * seed, guidance_scale=1.0 + seed) for seed in range(5)]
    with engine(ToySpec(), stages) as line:
        handles = [line.submit(one) for one in wanted]
        for handle, one in zip(handles, wanted, strict=True):
            assert_right(handle, one)
            assert handle.progress == (6, 6)
            assert handle.decoded == (one.num_frames, one.num_frames)


def test_a_request_says_what_it_is_at_and_a_rank_what_it_computes() -> None:
    with engine(FaultySpec(), 2, in_flight=1) as line:
        handles = [line.submit(request("slow", seed=seed, num_inference_steps=40)) for seed in range(2)]
        assert handles[1].phase == "waiting"
        phases, items = [], set()
        while not handles[0].done:
            phases.append(handles[0].phase)
            items |= {(rank.rank, rank.request) for rank in line.ranks if rank.item.startswith("denoise")}
            time.sleep(0.005)
        order = ["waiting", "encoding", "denoising", "decoding", "done"]
        assert [order.index(phase) for phase in phases] == sorted(order.index(phase) for phase in phases)
        assert "denoising" in phases and handles[0].phase == "done"
        assert {(0, handles[0].job.id), (1, handles[0].job.id)} <= items
        handles[1].result(LIMIT_S)
        busy = [rank.busy_s for rank in line.ranks]
        assert all(1.0 < each < 60.0 for each in busy), busy


def test_an_engine_says_whether_it_would_take_a_request_and_why_it_ended() -> None:
    with engine(FaultySpec(), 2) as line:
        assert line.check(request(num_inference_steps=7)).steps == 7
        assert line.failure is None
        with pytest.raises(RankFailed) as failed:
            line.submit(request("raise 1 3")).result(LIMIT_S)
        assert str(line.failure) == str(failed.value)


def test_two_engines_live_side_by_side() -> None:
    with engine(ToySpec(), 2) as first, engine(ToySpec(layers=3), 3) as second:
        handles = first.submit(request(seed=1)), second.submit(request(seed=1))
        assert_right(handles[0], request(seed=1))
        assert handles[1].result(LIMIT_S).latents.equal(toy_reference(ToySpec(layers=3), request(seed=1))[0])


def test_cancelling_one_of_three_leaves_the_others_equal() -> None:
    wanted = [request("slow", seed=seed, num_inference_steps=30) for seed in range(3)]
    with engine(FaultySpec(), 2) as line:
        handles = [line.submit(one) for one in wanted]
        while handles[1].progress[0] < 3:
            time.sleep(0.01)
        assert handles[1].cancel()
        assert not handles[1].cancel()
        with pytest.raises(RequestCancelled, match="cancelled at step"):
            handles[1].result(LIMIT_S)
        assert_right(handles[0], wanted[0])
        assert_right(handles[2], wanted[2])
        assert not handles[0].cancel()
        again = request(seed=9)
        assert_right(line.submit(again), again)


def test_a_result_that_takes_too_long_times_out_and_goes_on() -> None:
    with engine(FaultySpec(), 2) as line:
        handle = line.submit(request("slow"))
        with pytest.raises(ResultTimeout, match="not done after"):
            handle.result(0.01)
        assert_right(handle, request("slow"))


@pytest.mark.real_start
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "words"),
    [("raise", ["ValueError", "a fault on purpose"]), ("die", ["exit code 77"])],
)
def test_a_rank_that_fails_ends_every_request_and_is_named(fault: str, words: list[str], stage: int) -> None:
    with engine(FaultySpec(), 3) as line:
        ranks = own_ranks()
        handles = [line.submit(request(prompt)) for prompt in ("slow", f"{fault} {stage} 2", "slow")]
        started = time.monotonic()
        for handle in handles:
            with pytest.raises(RankFailed) as failed:
                handle.result(LIMIT_S)
            assert failed.value.rank == stage
            for word in words:
                assert word in str(failed.value)
        assert time.monotonic() - started < 10
        with pytest.raises(RankFailed):
            line.submit(request())
    assert not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.real_start
@pytest.mark.parametrize("stage", [0, 1])
def test_a_rank_that_is_killed_is_named(stage: int) -> None:
    with engine(FaultySpec(), 2) as line:
        ranks = sorted(own_ranks(), key=lambda process: process.pid)
        handle = line.submit(request("slow", num_inference_steps=500))
        while handle.progress[0] < 2:
            time.sleep(0.01)
        ranks[stage].send_signal(signal.SIGKILL)
        with pytest.raises(RankFailed, match=f"Rank {stage} failed: the process was killed by SIGKILL"):
            handle.result(10)


@pytest.mark.real_start
def test_an_idle_rank_that_is_killed_is_named_at_the_next_request() -> None:
    with engine(ToySpec(), 2) as line:
        ranks = sorted(own_ranks(), key=lambda process: process.pid)
        ranks[1].send_signal(signal.SIGKILL)
        with pytest.raises(RankFailed, match="Rank 1 failed: the process was killed by SIGKILL"):
            line.submit(request()).result(10)


@pytest.mark.real_start
def test_a_rank_that_fails_while_it_starts_ends_the_others() -> None:
    before = set(own_ranks())
    with pytest.raises(RankFailed, match="NoSuchClass"):
        engine(UnloadableSpec(), 2)
    assert not psutil.wait_procs(set(own_ranks()) - before, timeout=5)[1]


@pytest.mark.real_start
def test_ranks_end_with_the_process_that_forked_them() -> None:
    line = engine(FaultySpec(), 2)
    ranks = own_ranks()
    handle = line.submit(request("slow", num_inference_steps=500))
    nurseries()[0].kill()
    with pytest.raises(RankFailed, match="killed by SIGKILL"):
        handle.result(10)
    line.close()
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_an_engine_that_is_killed_while_ranks_load_leaves_nothing() -> None:
    code = "from cineline import Engine, ParallelConfig; Engine('mini-ti2v', ParallelConfig(pp=2), device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT_S
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(3)
    assert not psutil.wait_procs(children, timeout=20)[1]  # as long as one library loads
    assert process.communicate(timeout=3)[1] == ""


def test_an_interrupt_while_the_ranks_load_ends_them_at_once() -> None:
    code = "from cineline import Engine, ParallelConfig; Engine('mini-ti2v', ParallelConfig(pp=2), device='cpu')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT_S
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # the libraries take seconds
    process.send_signal(signal.SIGINT)
    try:
        process.wait(5)
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(children, timeout=1)[1]


@pytest.mark.real_start
def test_a_closed_engine_ends_what_is_not_done() -> None:
    line = engine(FaultySpec(), 2)
    ranks = own_ranks()
    handle = line.submit(request("slow", num_inference_steps=1000))
    line.close()
    line.close()
    with pytest.raises(EngineClosed):
        handle.result(LIMIT_S)
    with pytest.raises(EngineClosed):
        line.submit(request())
    assert not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.real_start
def test_an_engine_leaves_no_process_port_or_thread_behind() -> None:
    def listening() -> set[int]:
        entries = [entry for entry in psutil.net_connections() if entry.status == psutil.CONN_LISTEN]
        return {entry.laddr.port for entry in entries if entry.laddr}

    threads = threading.active_count()
    with engine(ToySpec(), 3) as line:
        ranks = own_ranks()
        ports = {
            entry.laddr.port for rank in ranks for entry in rank.net_connections() if entry.status == psutil.CONN_LISTEN
        }
        assert len(ranks) == 3
        assert ports
        line.submit(request()).result(LIMIT_S)
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert not ports & listening()
    assert not nurseries()
    assert threading.active_count() == threads


def test_a_program_that_forgets_to_close_leaves_no_process_behind() -> None:
    code = """
import psutil
from cineline import Engine, ParallelConfig, VideoRequest
from faulty_family import FaultySpec, UnloadableSpec
engine = Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu")
engine.submit(VideoRequest(prompt="slow", num_inference_steps=1000))
print(*[child.pid for child in psutil.Process().children(recursive=True)])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    deadline = time.monotonic() + 5
    ranks = [int(pid) for pid in done.stdout.split()]
    assert len(ranks) == 3  # and the process that forked them
    while any(psutil.pid_exists(pid) for pid in ranks):
        assert time.monotonic() < deadline, "a rank outlived its engine"
        time.sleep(0.05)


def test_bad_configs_are_refused_before_anything_starts() -> None:
    parallels: list[tuple[dict[str, Any], str]] = [
        ({"pp": 9}, "pp=9 is more than the model's 8 blocks"),
        ({"pp": 0}, "pp=0 is too small"),
        ({"pp": 2, "split": [7, 2]}, "adds up to 9"),
        ({"pp": 2, "split": [8, 0]}, "below 1"),
        ({"pp": 2, "split": [8]}, "1 entries for pp=2"),
        ({"pp": "2"}, "pp='2' is no whole number"),
        ({"pp": 2, "split": "4,4"}, "split='4,4' is no list"),
        ({"pp": 2, "split": [4.5, 3.5]}, "is no list of whole numbers"),
    ]
    for options, words in parallels:
        with pytest.raises(InvalidConfig, match=words):
            Engine(ToySpec(), ParallelConfig(**options), device="cpu")
    others: list[tuple[dict[str, Any], str]] = [
        ({"device": "toaster"}, "toaster"),
        ({"dtype": "int8"}, "int8"),
        ({"in_flight": 0}, "in_flight=0"),
        ({"in_flight": "2"}, "in_flight='2'"),
        ({"launcher": "ray"}, "launcher='ray'"),
        ({"launcher": "torchrun"}, "needs a torchrun world"),
    ]
    for options, words in others:
        with pytest.raises(InvalidConfig, match=words):
            Engine(ToySpec(), **{"device": "cpu"} | options)
    assert not own_ranks()


def test_unknown_and_misshapen_request_fields_are_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "x", "colour": 1}, "Unknown request field 'colour'"),
        ({}, "no 'prompt'"),
        ({"prompt": 3}, "prompt=3"),
        ({"prompt": "x", "height": 1.5}, "height=1.5"),
        ({"prompt": "x", "height": "64"}, "height='64'"),
        ({"prompt": "x", "num_frames": True}, "num_frames=True"),
        ({"prompt": "x", "decode": "no"}, "decode='no'"),
    ]
    for fields, words in refused:
        with pytest.raises(InvalidRequest, match=words):
            VideoRequest(**fields)
