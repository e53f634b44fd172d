"""The engine's contract with its process: nothing outlives it, nothing hangs, nothing is kept; with real processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty_family import FaultySpec, HeavySpec
from forked_ranks import processes_of
from test_engine import assert_right, own_ranks, request
from toy_arithmetic import DECODER_UNITS
from two_hosts import two_hosts

from cineline import Engine, EngineClosed, ParallelConfig, RankFailed, RequestCancelled, WrongProcess
from cineline.core import control
from cineline.engine import watch
from cineline.engine.handle import Ticket

LIMIT_S = 30.0


def engine(stages: int = 2, **options: Any) -> Engine:
    return Engine(FaultySpec(), ParallelConfig(pp=stages), device="cpu", **{"restarts": 0} | options)


def wait_until(true: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"{what} took more than {limit_s} s"
        time.sleep(0.02)


# Nothing outlives its owner.

OWNER = """
import multiprocessing, os, signal, sys, threading, time
import psutil
from cineline import Engine, ParallelConfig, VideoRequest
from faulty_family import FaultySpec, HeavySpec
made = []
def make():
    made.append(Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", restarts=0))
def main():
    thread = threading.Thread(target=make)  # which ends: ranks are the process's, not the thread's
    thread.start()
    thread.join()
    handle = made[0].submit(VideoRequest(prompt="slow", num_inference_steps=2000))
    ranks = psutil.Process().children(recursive=True)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    other = os.fork()
    if not other:
        time.sleep(60)
        os._exit(0)
    time.sleep(1.0)
    assert not handle.done and handle.progress[0] > 0, handle.progress
    if "stopped" in sys.argv:
        ranks[-1].send_signal(signal.SIGSTOP)
    print(child.pid, other, *[rank.pid for rank in ranks], flush=True)
    if "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in sys.argv:
        os._exit(3)
    if "abort" in sys.argv:
        os.abort()
    sys.stdin.read()
main()
"""


@pytest.mark.parametrize("how", ["kill", "exit", "abort", "stopped kill"])
def test_ranks_end_with_their_process_whatever_it_had_forked(how: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *how.split()], stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        assert owner.stdout is not None
        children, ranks = [], []
        try:
            with killed_after(owner, LIMIT_S):
                pids = [int(pid) for pid in owner.stdout.readline().split()]
            children, ranks = ([psutil.Process(pid) for pid in part] for part in (pids[:2], pids[2:]))
            owner.wait(10)
            assert len(ranks) == 3  # and the process that started them
            wait_until(lambda: all(map(has_ended, ranks)), 2, "the ranks' end")
            assert all(child.is_running() for child in children)
        finally:
            for process in (*children, *ranks):
                with_kill(process)


def has_ended(process: psutil.Process) -> bool:
    """Whoever inherits an orphan may take its time to wait for it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def with_kill(process: psutil.Process) -> None:
    if process.is_running():
        process.kill()


@contextmanager
def killed_after(process: subprocess.Popen[str], limit_s: float) -> Iterator[None]:
    """Nobody waits longer for what it says."""
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


# Forks.


def in_fork(do: Callable[[], None]) -> int:
    """What it does in a child that is forked here; the exit code."""
    pid = os.fork()
    if not pid:
        try:
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


@pytest.mark.parametrize("stages", [1, 3])
def test_a_forked_child_may_not_use_the_engine_and_leaves_it_alone(stages: int) -> None:
    with engine(stages) as line:
        done = line.submit(request())
        assert_right(done, request())
        handle = line.submit(request("slow", num_inference_steps=50))
        owner = os.getpid()

        def use() -> None:
            words = f"belongs to process {owner}, not to {os.getpid()}: make one here"
            for call in (
                lambda: line.submit(request()),
                lambda: handle.result(1),
                lambda: done.result(1),
                handle.cancel,
                handle.take_frames,
                lambda: handle.done,
            ):
                with pytest.raises(WrongProcess, match=words):
                    call()

        def leave() -> None:
            with line:
                pass
            line.close()

        def forget() -> None:
            nonlocal line, handle
            del line, handle
            gc.collect()

        for do in (use, leave, forget):
            assert in_fork(do) == 0
        assert_right(handle, request("slow", num_inference_steps=50))
        assert_right(line.submit(request(seed=3)), request(seed=3))


# Ranks that end unasked, and engines that nobody holds.


def test_an_engine_that_nobody_holds_ends_its_ranks() -> None:
    line = engine()
    ranks = processes_of(line)
    del line
    assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_an_open_request_that_somebody_holds_keeps_the_engine() -> None:
    handle = engine().submit(request("slow"))
    assert_right(handle, request("slow"))
    assert_right(engine().submit(request(seed=5)), request(seed=5))


def test_a_request_that_nobody_holds_keeps_no_engine_nor_does_one_that_is_done() -> None:
    line = engine()
    ranks = processes_of(line)
    done = line.submit(request())
    done.result(LIMIT_S)
    line.submit(request("slow", num_inference_steps=5000))
    del line
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert_right(done, request())


def test_a_rank_that_ends_without_a_word_fails_what_is_open_and_what_comes() -> None:
    with engine(3) as line:
        handle = line.submit(request("leave 1 2"))
        with pytest.raises(RankFailed, match="Rank 1 failed: it said Timeline when that was not due") as failed:
            handle.result(10)
        with pytest.raises(RankFailed) as again:
            line.submit(request())
        assert again.value is not failed.value


def counts() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    multiprocessing.active_children()  # which lets go of those that have ended: the tests' way to start ranks
    gc.collect()
    return psutil.Process().num_fds(), threading.active_count()


def listening(processes: Iterable[psutil.Process]) -> set[int]:
    entries = [entry for process in processes for entry in process.net_connections()]
    return {entry.laddr.port for entry in entries if entry.status == psutil.CONN_LISTEN and entry.laddr}


def shared_memory(pids: Iterable[int]) -> set[str]:
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names for pid in pids if str(pid) in name}


def test_a_hundred_engines_made_and_dropped_leave_nothing() -> None:
    engine(1).close()  # what is made once a process
    before, processes, ports = counts(), set(), set()
    for number in range(100):
        line = engine(1 + number % 2)
        processes |= set(processes_of(line))
        ports |= listening(processes_of(line))
        if number % 3 == 0:
            handle = line.submit(request(seed=number))
            if number % 2:
                assert_right(handle, request(seed=number))
    del line, handle
    assert len(processes) == 150
    assert not psutil.wait_procs(processes, timeout=10)[1]
    wait_until(lambda: counts() == before, 10, "letting go")
    assert len(ports) >= 50  # of rank 0 where there are two
    assert not ports & listening([psutil.Process()])
    assert not shared_memory(process.pid for process in processes)


def test_an_error_that_is_raised_again_is_a_new_one() -> None:
    with engine() as line:
        handle = line.submit(request("die 1 0"))
        depths = []
        for _ in range(300):
            for call in (lambda: handle.result(LIMIT_S), lambda: line.submit(request())):
                with pytest.raises(RankFailed) as failed:
                    call()
                depths.append(len(traceback.extract_tb(failed.value.__traceback__)))
        assert len(set(depths[2::2])) == len(set(depths[3::2])) == 1
        assert max(depths) < 10


# Ranks that are stopped.


@pytest.mark.parametrize("stage", [0, 1])
def test_with_a_stopped_rank_no_call_waits(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    line = engine(in_flight=200)
    told = count_told(line, monkeypatch)
    ranks = processes_of(line)
    running = line.submit(request("slow", num_inference_steps=2000))
    wait_until(lambda: running.progress[0] > 1, LIMIT_S, "two steps")
    ranks[stage].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    times = []
    for number in range(100):
        started = time.monotonic()
        with suppress(RankFailed):
            line.submit(request("x" * 40_000, seed=number)).cancel()
        times.append(time.monotonic() - started)
    assert max(times) < 1
    wait_until(lambda: sum(len(control.pack(each)) for each in list(told)) > 2_000_000, 4, "more than a pipe holds")
    with pytest.raises(RankFailed, match=f"Rank {stage} failed: its process {ranks[stage].pid} is stopped"):
        running.result(15 - (time.monotonic() - stopped))
    line.close()
    assert not psutil.wait_procs(ranks, timeout=2)[1]


@pytest.mark.parametrize("stage", [0, 1])
def test_closing_needs_no_help_of_a_stopped_rank(stage: int) -> None:
    line = engine()
    ranks = processes_of(line)
    running = line.submit(request("slow", num_inference_steps=2000))
    wait_until(lambda: running.progress[0] > 1, LIMIT_S, "two steps")
    ranks[stage].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    line.close()
    assert time.monotonic() - started < 2
    with pytest.raises(EngineClosed):
        running.result(0)
    assert not psutil.wait_procs(ranks, timeout=1)[1]


@pytest.mark.real_start
def test_closing_needs_no_help_of_a_stopped_nursery() -> None:
    line = engine()
    ranks = own_ranks()
    nursery = ranks[0].parent()
    assert nursery is not None
    nursery.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    line.close()
    assert time.monotonic() - started < 5
    assert not psutil.wait_procs([*ranks, nursery], timeout=1)[1]


def test_a_rank_that_is_slow_is_not_mistaken_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_LIMIT_S", 4.0)  # shorter than the item
    with engine() as line:
        wanted = request("sleep 1 1 7", num_inference_steps=3, guidance_scale=1.0)
        assert_right(line.submit(wanted), wanted)


# Messages that cannot be read.


@pytest.mark.parametrize("garbage", [b"d\x80\x05garbage", b"g123", b"", b"pcos\nno_such_name\n.", b"d\x02\0\0\0{}"])
def test_a_rank_that_cannot_read_what_it_is_told_says_so(garbage: bytes) -> None:
    with engine() as line:
        handle = line.submit(request("slow", num_inference_steps=2000))
        line._ranks._all[1].say(garbage)
        with pytest.raises(RankFailed, match="Rank 1 failed: it cannot read what the engine said"):
            handle.result(10)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("garbage", ["data", "message", "long"])
def test_what_the_engine_cannot_read_is_the_ranks_failure(garbage: str, stage: int) -> None:
    with engine() as line:
        handle = line.submit(request(f"garble {stage} 2 {garbage}"))
        with pytest.raises(RankFailed, match=f"Rank {stage} failed: what it said cannot be read"):
            handle.result(10)


# Ends.


@pytest.mark.parametrize("parallel", [ParallelConfig(pp=2), ParallelConfig(pp=3), ParallelConfig(pp=1)])
def test_a_cancel_followed_by_close_keeps_trace_and_traffic(parallel: ParallelConfig, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"{number}.json"
        line = Engine(FaultySpec(), parallel, device="cpu", trace=path, restarts=0)
        handles = [line.submit(request("slow", seed=seed, num_inference_steps=200)) for seed in range(3)]
        wait_until(lambda: handles[0].progress[0] > 1 + number, LIMIT_S, "some steps")  # noqa: B023
        for handle in handles:
            assert handle.cancel()
        line.close()
        assert path.stat().st_size > 1000
        assert len(line.traffic) == parallel.ranks
        for handle in handles:
            with pytest.raises(RequestCancelled):
                handle.result(0)


def test_close_waits_for_an_item_that_is_under_way_and_no_longer_than_it_may(tmp_path: Path) -> None:
    for limit_s, kept in ((20.0, True), (0.5, False)):
        path = tmp_path / f"{kept}.json"
        line = engine(trace=path)
        handle = line.submit(request("sleep 1 1 3", num_inference_steps=4))
        wait_until(lambda: handle.progress[0] >= 1, LIMIT_S, "a step")  # noqa: B023
        time.sleep(0.5)
        handle.cancel()
        started = time.monotonic()
        line.close(limit_s)
        assert path.exists() == kept
        assert (1 < time.monotonic() - started < 6) if kept else (time.monotonic() - started < 2)


def test_an_exception_within_the_block_ends_at_once() -> None:
    started = 0.0
    with pytest.raises(KeyboardInterrupt), engine() as line:
        handle = line.submit(request("sleep 1 1 20"))
        wait_until(lambda: handle.progress[0] >= 1, LIMIT_S, "a step")
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 2


def count_told(line: Engine, monkeypatch: pytest.MonkeyPatch) -> list[control.Message]:
    """What the ranks are told from now on."""
    told: list[control.Message] = []
    tell = line._ranks.tell

    def count(message: control.Message, **more: Any) -> None:
        told.append(message)
        tell(message, **more)

    monkeypatch.setattr(line._ranks, "tell", count)
    return told


def test_submits_and_cancels_for_ever_fill_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as line:
        said = count_told(line, monkeypatch)
        handle = line.submit(request("sleep 0 1 3", num_inference_steps=3))
        wait_until(lambda: handle.progress[0] >= 1, LIMIT_S, "a step")
        for number in range(1000):
            line.submit(request(seed=number)).cancel()
        assert sum(isinstance(message, control.Admit) for message in said) < 10
        assert_right(handle, request("sleep 0 1 3", num_inference_steps=3))
        assert_right(line.submit(request(seed=1)), request(seed=1))


@pytest.mark.real_start
def test_ranks_that_are_through_end_with_code_0_however_much_they_hold() -> None:
    for _ in range(2):
        line = Engine(HeavySpec(), ParallelConfig(pp=2), device="cpu", restarts=0)
        assert_right(line.submit(request()), request())
        processes = [rank._process.process for rank in line._ranks._all]
        line.close()
        assert [process and process.wait(0) for process in processes] == [0, 0]


def test_two_who_close_wait_for_the_same_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    line = engine(trace=path)
    handle = line.submit(request("sleep 1 1 2", num_inference_steps=4, guidance_scale=1.0))
    wait_until(lambda: handle.progress[0] >= 1, LIMIT_S, "a step")
    handle.cancel()
    other = threading.Thread(target=line.close)
    other.start()
    time.sleep(0.2)
    line.close()
    other.join()
    assert path.exists()
    assert len(line.traffic) == 2


def test_requests_that_are_cancelled_where_the_tail_has_no_part_any_more_are_let_go() -> None:
    parallel = ParallelConfig(pp=2, vae_split=(DECODER_UNITS, 0))
    with Engine(FaultySpec(), parallel, device="cpu", in_flight=2) as line:
        for seed in range(5):
            handle = line.submit(request(seed=seed, num_frames=2001, num_inference_steps=2))
            wait_until(lambda: handle.decoded[0] > 0, LIMIT_S, "a chunk")  # noqa: B023
            handle.cancel()
        assert_right(line.submit(request()), request())


def test_a_request_whose_result_cannot_be_made_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as line:
        with monkeypatch.context() as patch:
            patch.setattr(Ticket, "_video", lambda self: bytearray(1 << 60))
            with pytest.raises(MemoryError):
                line.submit(request()).result(LIMIT_S)
        assert_right(line.submit(request()), request())


def test_a_start_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine().close()  # what is made once a process
    before = counts()
    start = threading.Thread.start
    for number in range(1, 8):  # two for each of two ranks, the engine's own, none more
        left = [number]

        def limited(self: threading.Thread) -> None:
            left[0] -= 1  # noqa: B023
            if not left[0]:  # noqa: B023
                raise RuntimeError("can't start new thread")
            start(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", limited)
            if number < 6:
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    engine()
            else:
                engine().close()
        wait_until(lambda: not own_ranks() and counts() == before, 10, f"the end of start {number}")


def test_a_caller_who_is_interrupted_leaves_no_word_half_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C in a notebook: whatever ranks are told is the engine's thread's."""
    with engine(in_flight=8) as line:
        running = line.submit(request("slow", num_inference_steps=50))
        caller = threading.current_thread()
        tell = line._ranks.tell

        def tell_by_the_engines_thread(*message: Any, **more: Any) -> None:
            assert threading.current_thread() is not caller
            tell(*message, **more)

        monkeypatch.setattr(line._ranks, "tell", tell_by_the_engines_thread)
        others = [line.submit(request(seed=seed)) for seed in range(3)]
        others.pop().cancel()
        for seed, other in enumerate(others):
            assert_right(other, request(seed=seed))
        assert_right(running, request("slow", num_inference_steps=50))


# Two hosts.


def test_a_host_that_is_cut_off_is_named_within_seconds_under_torchrun() -> None:
    with two_hosts(str(Path(__file__).parent / "torchrun_toy.py"), plugged=True) as hosts:
        assert hosts.stdin is not None
        assert hosts.stdout is not None
        with killed_after(hosts, 2 * LIMIT_S):
            assert hosts.stdout.readline() == "going\n"
        hosts.stdin.write("unplug\n")
        hosts.stdin.flush()
        unplugged = time.monotonic()
        with killed_after(hosts, LIMIT_S):
            said = hosts.stdout.readline()
        assert time.monotonic() - unplugged < 15
        assert re.match("Rank 1 failed: (nothing was heard of it for 1|its connection closed)", said)
        assert "(10.9.0.2)" in said
        rest, _ = hosts.communicate(timeout=2 * LIMIT_S)  # both hosts' processes end
        assert rest.splitlines() == ["host 0 ended with 1", "host 1 ended with 1"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of all of these tests."""
    yield
    gc.collect()
    wait_until(lambda: not own_ranks(), 10, "the end of all ranks")
