"""Lost ranks are started anew: every request goes on from its last snapshot with its bits, or fails alone."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import time
from typing import Any

import psutil
import pytest
from faulty_family import FaultySpec, Plan
from forked_ranks import processes_of
from test_engine import assert_right, own_ranks, request

from cineline import (
    Engine,
    EngineClosed,
    InvalidConfig,
    OutOfMemory,
    ParallelConfig,
    RankFailed,
    RequestCancelled,
    RequestTimedOut,
)
from cineline.engine import blueprint, launch

LIMIT_S = 40.0


def engine(stages: int = 2, **options: Any) -> Engine:
    return Engine(FaultySpec(), ParallelConfig(pp=stages), device="cpu", **options)


def steps_lost(log: str, done: dict[int, int]) -> list[int]:
    """Of each request, by what was done when the rank was lost and where it went on."""
    (told,) = re.findall(r"requests go on: (.*)\.", log)
    began = {int(number): int(step) for number, step in re.findall(r"(\d+) at step (\d+)", told)}
    return [done[number] - began[number] for number in began]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_killed_rank_costs_at_most_the_steps_between_snapshots(
    stage: int, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [request("slow", seed=seed, num_inference_steps=20) for seed in range(3)]
    with engine(3, snapshot_every=every) as line:
        handles = [line.submit(one) for one in wanted]
        while min(handle.progress[0] for handle in handles) < 5:
            time.sleep(0.01)
        processes_of(line)[stage].kill()
        while not any("started anew" in message for message in caplog.messages):
            time.sleep(0.01)
        done = {handle.job.id: handle.progress[0] for handle in handles}
        for handle, one in zip(handles, wanted, strict=True):
            assert_right(handle, one)
            assert handle.restarts == 1
            assert handle.progress == (20, 20)
        later = line.submit(request())
        assert_right(later, request())
        assert later.restarts == 0
    lost = steps_lost(caplog.text, done)
    assert len(lost) == 3
    assert max(lost) <= every
    assert max(lost) < 5, "something was to go on with"


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("chunk", [0, 2, 4])
def test_frames_come_out_once_though_the_decode_begins_anew(stage: int, chunk: int, plan: Plan) -> None:
    plan({"do": "kill", "rank": stage, "at": "before", "kind": "decode", "number": chunk, "request": 1})
    wanted = [request(seed=seed, num_frames=5) for seed in range(3)]
    with engine() as line:
        handles = [line.submit(one) for one in wanted]
        frames = []
        while not handles[1].done:
            frames += handles[1].take_frames()
            time.sleep(0.01)
        video = handles[1].result(LIMIT_S)
        frames += [] if video.frames is None else list(video.frames[None])
        assert sum(len(piece) for piece in frames) == 5
        for handle, one in [(handles[0], wanted[0]), (handles[2], wanted[2])]:
            assert_right(handle, one)
        assert handles[1].restarts == 1
        assert handles[1].decoded == (5, 5)


def test_a_rank_that_hangs_up_or_stops_is_started_anew(plan: Plan) -> None:
    plan(
        {"do": "hang_up", "rank": 1, "at": "before", "kind": "denoise", "number": 2},
        {"do": "stop", "rank": 0, "at": "before", "kind": "denoise", "number": 4, "start": 1},
        {"do": "cut", "rank": 1, "at": "after", "kind": "denoise", "number": 5, "start": 2},
    )
    with engine() as line:
        handles = [line.submit(request(seed=seed)) for seed in range(3)]
        for seed, handle in enumerate(handles):
            assert_right(handle, request(seed=seed))
        assert handles[-1].restarts == 3


@pytest.mark.parametrize("do", ["raise", "memory"])
def test_a_request_that_ends_the_ranks_fails_alone(do: str, plan: Plan) -> None:
    """At its second time, where it is not for want of memory."""
    fault = {"do": do, "rank": 1, "at": "before", "kind": "denoise", "number": 2, "request": 1}
    plan(fault, fault | {"start": 1})
    with engine() as line:
        handles = [line.submit(request(seed=seed)) for seed in range(3)]
        with pytest.raises(OutOfMemory if do == "memory" else RankFailed, match=r"Rank 1 failed: .* \(request 1\)"):
            handles[1].result(LIMIT_S)
        assert_right(handles[0], request(seed=0))
        assert_right(handles[2], request(seed=2))
        assert handles[2].restarts == (1 if do == "memory" else 2)
        assert_right(line.submit(request(seed=9)), request(seed=9))


def test_a_request_that_ends_the_ranks_once_goes_on(plan: Plan) -> None:
    plan({"do": "raise", "rank": 0, "at": "after", "kind": "denoise", "number": 3, "request": 1})
    with engine() as line:
        handles = [line.submit(request(seed=seed)) for seed in range(2)]
        for seed, handle in enumerate(handles):
            assert_right(handle, request(seed=seed))
            assert handle.restarts == 1


def test_a_request_that_kills_its_rank_fails_alone_too(plan: Plan) -> None:
    """Nobody hears whose item it was, so that requests are made one by one until one has done it twice."""
    fault = {"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2, "request": 1}
    plan(*(fault | {"start": start} for start in range(20)))
    with engine() as line:
        handles = [line.submit(request(seed=seed)) for seed in range(4)]
        with pytest.raises(RankFailed, match="killed by SIGKILL"):
            handles[1].result(LIMIT_S)
        for number in (0, 2, 3):
            assert_right(handles[number], request(seed=number))
        assert_right(line.submit(request(seed=9)), request(seed=9))


def test_restarts_without_progress_end_the_engine(plan: Plan) -> None:
    """A fault that nobody is to blame for, at the same moment of each start."""
    fault = {"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 0}
    plan(*(fault | {"start": start} for start in range(9)))
    words = "killed by SIGKILL; before, ranks were started anew 2 times without progress"
    with engine(restarts=2) as line:
        handles = [line.submit(request(seed=seed)) for seed in range(2)]
        for handle in handles:
            with pytest.raises(RankFailed, match=words):
                handle.result(LIMIT_S)
        with pytest.raises(RankFailed, match=words):
            line.submit(request())
        assert handles[0].restarts == 2
    assert not own_ranks()


def test_what_was_done_before_is_no_progress(plan: Plan) -> None:
    """With rare snapshots the same steps are done again and again."""
    fault = {"do": "kill", "rank": 0, "at": "before", "kind": "denoise", "number": 4}
    plan(*(fault | {"start": start} for start in range(9)))
    words = pytest.raises(RankFailed, match="started anew 1 times without progress")
    with engine(restarts=1, snapshot_every=6) as line, words:
        line.submit(request()).result(LIMIT_S)


def test_progress_between_them_lets_ranks_be_lost_again_and_again(plan: Plan) -> None:
    # Not the tail: with it, its word of the last step may be lost.
    plan(*({"do": "kill", "rank": 0, "at": "before", "kind": "denoise", "number": n, "start": n} for n in range(5)))
    with engine(restarts=2) as line:
        handle = line.submit(request())
        assert_right(handle, request())
        assert handle.restarts == 5


@pytest.mark.real_start
def test_a_start_that_fails_is_tried_again(plan: Plan) -> None:
    plan(
        {"do": "kill", "rank": 0, "at": "before", "kind": "denoise", "number": 2},
        {"do": "exit", "rank": 1, "at": "load", "start": 1},
        {"do": "raise", "rank": 0, "at": "load", "start": 2},
    )
    with engine() as line:
        handle = line.submit(request())
        assert_right(handle, request())
        assert handle.restarts == 1  # as far as it could have gone on
    assert not own_ranks()


def test_a_start_that_cannot_be_ends_the_engine(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan({"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2})
    with engine() as line:

        def refuse(*_: Any) -> Any:
            raise InvalidConfig("The machine is another: buy one.")

        monkeypatch.setattr(blueprint, "launch_local", refuse)
        with pytest.raises(InvalidConfig, match="buy one"):
            line.submit(request()).result(LIMIT_S)
        with pytest.raises(InvalidConfig, match="buy one"):
            line.submit(request())


def test_what_is_done_while_ranks_start_is_done_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted, cancelled and out of time meanwhile; nobody waits for the start but those who wait for results."""
    with engine() as line:
        handles = [line.submit(request("slow", seed=seed, num_inference_steps=30)) for seed in range(3)]
        late = line.submit(request("slow", num_inference_steps=500, timeout_s=3.0))
        while handles[2].progress[0] < 3:
            time.sleep(0.01)
        start_ranks, started = launch.start_ranks, time.monotonic()

        def slowly(*arguments: Any) -> Any:
            time.sleep(max(0.0, 4.0 - (time.monotonic() - started)))
            return start_ranks(*arguments)

        monkeypatch.setattr(launch, "start_ranks", slowly)
        processes_of(line)[0].kill()
        time.sleep(1.0)
        before = time.monotonic()
        new = line.submit(request(seed=7))
        assert handles[1].cancel()
        gone = line.submit(request(seed=8))
        assert gone.cancel()
        assert time.monotonic() - before < 1.0
        for handle, error in [(handles[1], RequestCancelled), (gone, RequestCancelled), (late, RequestTimedOut)]:
            with pytest.raises(error):
                handle.result(LIMIT_S)
        assert_right(handles[0], request("slow", seed=0, num_inference_steps=30))
        assert_right(handles[2], request("slow", seed=2, num_inference_steps=30))
        assert_right(new, request(seed=7))
        assert new.restarts <= 1
        assert_right(line.submit(request(seed=1)), request(seed=1))


@pytest.mark.real_start
def test_an_engine_that_is_closed_while_ranks_start_ends_at_once() -> None:
    line = engine()
    handle = line.submit(request("slow", num_inference_steps=500))
    while handle.progress[0] < 2:
        time.sleep(0.01)
    for rank in own_ranks():
        rank.kill()
    time.sleep(0.5)
    before = time.monotonic()
    line.close()
    assert time.monotonic() - before < 5.0
    with pytest.raises(EngineClosed):
        handle.result(LIMIT_S)
    assert not own_ranks()


def test_a_restarted_engine_hands_in_the_trace_of_its_last_start(tmp_path: Any, plan: Plan) -> None:
    plan({"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2})
    path = tmp_path / "trace.json"
    with engine(trace=path) as line:
        assert_right(line.submit(request()), request())
    assert {event["tid"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"} == {0, 1}
    assert len(line.traffic) == 2


def test_restarts_leave_no_process_thread_or_descriptor(plan: Plan) -> None:
    plan(*({"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 1, "start": n} for n in (1, 3, 5)))
    own = psutil.Process()
    with engine() as line:
        assert_right(line.submit(request()), request())
        gc.collect()
        fds, threads = own.num_fds(), own.num_threads()
        for _ in range(4):
            processes_of(line)[0].kill()
            handle = line.submit(request())
            assert_right(handle, request())
        ended = time.monotonic() + LIMIT_S
        while (own.num_fds() > fds or own.num_threads() > threads) and time.monotonic() < ended:
            gc.collect()  # of the forked ranks of tests; of those that ended, threads close the rest
            time.sleep(0.05)
        assert own.num_fds() <= fds
        assert own.num_threads() == threads
        assert len(processes_of(line)) == 2


def test_nothing_is_started_anew_where_nobody_wants_it() -> None:
    with engine(restarts=0) as line:
        handle = line.submit(request("slow", num_inference_steps=500))
        while handle.progress[0] < 2:
            time.sleep(0.01)
        os.kill(processes_of(line)[1].pid, signal.SIGKILL)
        with pytest.raises(RankFailed, match=r"SIGKILL$"):
            handle.result(LIMIT_S)
        assert handle.restarts == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"restarts": -1}, "restarts=-1 is no whole number from 0 on"),
        ({"restarts": True}, "restarts=True"),
        ({"snapshot_every": 0}, "snapshot_every=0 is no whole number from 1 on"),
        ({"snapshot_every": "2"}, "snapshot_every='2'"),
    ],
)
def test_options_of_recovery_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        engine(**options)


def test_restarts_are_said(caplog: pytest.LogCaptureFixture, plan: Plan) -> None:
    plan({"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2})
    with caplog.at_level(logging.WARNING), engine() as line:
        assert_right(line.submit(request()), request())
    assert "Rank 1 failed: the process was killed by SIGKILL; the ranks are started anew (1 of 3)." in caplog.messages
    assert "The ranks are there again; requests go on: 0 at step 2." in caplog.messages
