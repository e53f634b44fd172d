"""Which rank has stopped, vanished or hangs; who calls the engine and who does not; without rank processes."""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client, Connection

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_family import ToySpec

from cineline import InvalidConfig, VideoRequest
from cineline.core import control
from cineline.core.codec import Codec
from cineline.core.control import Beat
from cineline.core.pieces import PIECE, cut
from cineline.core.request import Group, Kind, WorkItem
from cineline.core.sockets import IDLE_S, UNANSWERED_S, notice_loss
from cineline.engine.hosts import accept
from cineline.engine.link import MOST_UNSENT, Link
from cineline.engine.watch import AWAY_S, LOADING_LIMIT_S, SILENT_LIMIT_S, STOPPED_LIMIT_S, TICK_S, Watch
from cineline.rank.pulse import LEAST_LIMIT_S, MOST_BETWEEN_S, TIMES_LONGEST, Pulse

LIMIT_S = 30.0


@dataclass
class Rank:
    rank: int
    pid: int | None = None
    heard: float = 0.0
    beat: Beat | None = None
    host: str = ""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watching(*ranks: Rank, stopped: set[int] | None = None) -> tuple[Watch, Clock]:
    clock = Clock()
    for rank in ranks:
        rank.heard = clock.now
    watch = Watch(ranks, clock, (stopped or set()).__contains__, loading=False)
    return watch, clock


@given(st.integers(0, 3), st.lists(st.floats(0.01, AWAY_S / 3), min_size=20, max_size=60), st.booleans())
def test_the_rank_that_is_silent_is_named_when_its_limit_is_over_and_not_before(
    silent: int, gaps: list[float], loading: bool
) -> None:
    ranks = [Rank(number) for number in range(4)]
    watch, clock = watching(*ranks)
    watch.loading = loading
    limit = LOADING_LIMIT_S if loading else SILENT_LIMIT_S
    for gap in gaps * 8:
        clock.now += gap
        for rank in ranks:
            rank.heard = rank.heard if rank.rank == silent else clock.now
        failure = watch.look()
        if failure is not None:
            assert failure.rank == silent
            assert clock.now - 100.0 >= limit
            return
        assert clock.now - 100.0 < limit + TICK_S + 2 * max(gaps)


@given(st.lists(st.tuples(st.floats(AWAY_S + 0.1, 1e5), st.floats(0.5, 2.0)), max_size=20))
def test_who_was_away_itself_blames_nobody(gaps: list[tuple[float, float]]) -> None:
    """A machine that sleeps, or an engine that is stopped for a while: what ranks said is read after the first look."""
    rank = Rank(0, pid=7)
    watch, clock = watching(rank, stopped={7})
    watch.is_stopped = lambda pid: False
    for away, then in gaps:
        clock.now += away
        assert watch.look() is None
        rank.heard = clock.now
        clock.now += then
        assert watch.look() is None


@given(st.integers(0, int(2 * STOPPED_LIMIT_S / TICK_S)), st.booleans())
def test_a_rank_may_be_stopped_for_a_moment_but_not_when_it_is_to_end(ticks: int, leaving: bool) -> None:
    ranks, stopped = [Rank(0, pid=5), Rank(1, pid=6), Rank(2)], {6}
    watch, clock = watching(*ranks, stopped=stopped)
    watch.leaving = leaving
    failure = None
    for _ in range(ticks):
        clock.now += TICK_S
        for rank in ranks:
            rank.heard = clock.now
        failure = failure or watch.look()
    if failure is not None:
        assert failure.rank == 1
        assert "its process 6 is stopped" in failure.cause
    assert (failure is not None) == (ticks > 0 if leaving else (ticks - 1) * TICK_S >= STOPPED_LIMIT_S)
    stopped.clear()
    clock.now += TICK_S
    ranks[0].heard = ranks[1].heard = ranks[2].heard = clock.now
    assert watch.look() is None


@given(st.floats(0, 1e4), st.none() | st.floats(60, 1e4))
def test_an_item_hangs_that_is_over_its_limit(computing_s: float, limit_s: float | None) -> None:
    rank = Rank(3)
    watch, clock = watching(rank)
    clock.now += TICK_S
    rank.heard, rank.beat = clock.now, Beat("denoise 4 of request 2", computing_s, limit_s)
    failure = watch.look()
    assert (failure is not None) == (limit_s is not None and computing_s >= limit_s)
    assert failure is None or "it hangs in denoise 4 of request 2" in failure.cause


@given(st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(1, 3), st.floats(0.001, 16)), max_size=30))
def test_an_items_limit_follows_from_the_longest_of_its_kind_and_size(items: list[tuple[Kind, int, float]]) -> None:
    clock = Clock()
    pulse = Pulse(clock)
    longest: dict[tuple[Kind, int], float] = {}
    for kind, frames, seconds in items:
        job = ToySpec().resolve(VideoRequest(prompt="x", num_frames=frames), 0)
        assert pulse.beat() == Beat()
        pulse.starts(WorkItem(kind, 7, 2), job)
        for _ in range(8):
            clock.now += seconds / 8
            beat = pulse.beat()
        before = longest.get((kind, frames))
        assert beat.item == f"{kind.name.lower()} 2 of request 7"
        assert beat.computing_s == pytest.approx(seconds)
        wanted = None if before is None else max(LEAST_LIMIT_S, TIMES_LONGEST * before)
        assert beat.limit_s == (None if wanted is None else pytest.approx(wanted))
        pulse.ends()
        longest[kind, frames] = max(before or 0.0, seconds)


def test_a_process_that_was_paused_has_not_computed() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    pulse.starts(WorkItem(Kind.DENOISE, 0, 0), ToySpec().resolve(VideoRequest(prompt="x"), 0))
    for seconds in (0.5, 1e4, 0.5):
        clock.now += seconds
        beat = pulse.beat()
    assert beat.computing_s == 0.5 + MOST_BETWEEN_S + 0.5


# A rank's connection.


def linked() -> tuple[Link, Connection, queue.SimpleQueue[control.Message]]:
    ours, theirs = Pipe()
    said: queue.SimpleQueue[control.Message] = queue.SimpleQueue()
    return Link(ours, said.put, lambda: "it is gone"), theirs, said


def test_whoever_says_something_to_a_rank_that_takes_nothing_never_waits() -> None:
    link, theirs, said = linked()
    started = time.monotonic()
    for _ in range(2 * MOST_UNSENT):
        link.say(bytes(10_000))
    assert time.monotonic() - started < 2
    failed = said.get(timeout=LIMIT_S)
    assert failed == control.Failed(f"it has not taken in the last {MOST_UNSENT} messages")
    assert said.empty()  # once
    started = time.monotonic()
    link.close()
    assert time.monotonic() - started < 2
    theirs.close()


def test_half_a_message_keeps_nobody_from_closing() -> None:
    link, theirs, _ = linked()
    theirs._send(b"\0\0\1\0half")  # type: ignore[attr-defined]
    time.sleep(0.2)
    started = time.monotonic()
    link.close()
    assert time.monotonic() - started < 2
    theirs.close()


@pytest.mark.parametrize("body", [b"", b"g", b"dnone", b"d" + Codec([]).encode(["no", "message"]), b"x"])
def test_what_cannot_be_read_is_a_failure_with_the_cause(body: bytes) -> None:
    link, theirs, said = linked()
    theirs.send_bytes(control.pack(Beat("x")))
    theirs.send_bytes(body)
    failed = said.get(timeout=LIMIT_S)
    assert isinstance(failed, control.Failed)
    assert failed.cause.startswith("what it said cannot be read (")
    assert link.beat == Beat("x")
    link.close()
    theirs.close()


def test_a_snapshot_comes_whole_whatever_is_said_between_its_pieces() -> None:
    link, theirs, said = linked()
    taken = control.Snapshot(0, 2, 1, bytes(range(256)) * (PIECE // 100))
    done, begun = control.Done(Group(Kind.DENOISE, 0)), control.Begun(Group(Kind.DENOISE, 0))
    first, second, third = cut(taken)
    for message in (first, Beat("x"), done, second, third, begun):
        theirs.send_bytes(control.pack(message))
    assert [said.get(timeout=LIMIT_S) for _ in range(3)] == [done, taken, begun]
    assert link.beat == Beat("x")
    for message in (first, third):
        theirs.send_bytes(control.pack(message))
    failed = said.get(timeout=LIMIT_S)
    assert isinstance(failed, control.Failed)
    assert failed.cause.startswith("what it said cannot be read (byte 2097152 of request 0's step 2 comes behind")
    link.close()
    theirs.close()


# Calls under torchrun.


def call(address: tuple[str, int], key: bytes, rank: object) -> Connection | None:
    try:
        connection = Client(address, authkey=key)
        connection.send_bytes(str(rank).encode())
    except (OSError, EOFError, AuthenticationError):
        return None
    assert isinstance(connection, Connection)
    return connection


def test_strangers_who_call_and_say_nothing_keep_no_rank_from_being_met() -> None:
    key, found = b"key", []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        silent = [socket.create_connection(address) for _ in range(3)]
        loud = [socket.create_connection(address) for _ in range(3)]
        for stranger in loud:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

        def ranks() -> None:
            found.append(call(address, b"other", 0))
            found.extend(call(address, key, rank) for rank in (2, 0, "none", 1))

        caller = threading.Thread(target=ranks)
        caller.start()
        started = time.monotonic()
        connections = accept([server], key, 3, lambda met: None, LIMIT_S)
        assert time.monotonic() - started < 5
        caller.join()
    assert sorted(connections) == [0, 1, 2]
    for connection in connections.values():
        notice_loss(connection.fileno())
        connection.send("welcome")
    assert [connection.recv() for connection in (found[1], found[2], found[4]) if connection] == ["welcome"] * 3
    for stranger in (*silent, *loud):
        stranger.close()
    for connection in (*connections.values(), *(one for one in found if one)):
        connection.close()


def test_a_rank_that_never_calls_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
        pytest.raises(InvalidConfig, match=r"Ranks \[0, 1\] did not call within 1 s"),
    ):
        accept([server], b"key", 2, lambda met: None, 1.0)


def test_connections_between_hosts_notice_a_loss() -> None:
    ours, theirs = Pipe()
    notice_loss(ours.fileno())  # no TCP: left alone
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as end:
        notice_loss(end.fileno())
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0  # it may be busy
        notice_loss(end.fileno(), UNANSWERED_S)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNANSWERED_S * 1000
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == IDLE_S
    ours.close()
    theirs.close()
