"""What a rank says first, and how a snapshot that is larger than all else travels between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import pytest

from cineline.core import control, pieces
from cineline.core.control import (
    Beat,
    Begun,
    Done,
    Failed,
    Message,
    Piece,
    Snapshot,
    Timeline,
    Unkept,
    UnreadableMessage,
    receive,
)
from cineline.core.pieces import PIECE, Joiner, cut
from cineline.core.request import Group, Kind
from cineline.rank import engine_link
from cineline.rank.engine_link import EngineLink
from cineline.rank.outbox import Outbox

LIMIT_S = 30.0
GROUP = Group(Kind.DENOISE, 0)
DONE, BEGUN, BEAT, FAILED = Done(GROUP), Begun(GROUP), Beat("denoise"), Failed("it raised")


def snapshot(request: int, step: int, size: float = 2.5) -> Snapshot:
    """Of so many pieces."""
    return Snapshot(request, step, 0, np.random.default_rng((request, step)).bytes(int(size * PIECE)))


def kept(taken: Snapshot) -> tuple[int, Callable[[], Snapshot]]:
    return taken.request, lambda: taken


def never() -> Snapshot:
    raise AssertionError("a newer one has come")


# Cut and joined.


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_a_snapshot_is_the_same_behind_its_pieces(size: int) -> None:
    joiner = Joiner()
    for taken in (snapshot(3, 1, size / PIECE), snapshot(4, 7, size / PIECE)):
        found = list(cut(taken))
        assert all(0 < len(piece.content) <= PIECE for piece in found if size)
        assert [joiner.join(piece) for piece in found] == [None] * (len(found) - 1) + [taken]


FIRST, SECOND, THIRD = cut(snapshot(0, 1))
OTHER = next(cut(snapshot(1, 1)))
NEWER = list(cut(snapshot(0, 2)))[1]


@pytest.mark.parametrize(
    ("came", "words"),
    [
        ([SECOND], "byte 1048576 of request 0's step 1 comes behind 0 bytes of none"),
        ([FIRST, THIRD], "byte 2097152 of request 0's step 1 comes behind 1048576 bytes of request 0's step 1"),
        ([FIRST, FIRST], "byte 0 of request 0's step 1 comes behind 1048576 bytes of request 0's step 1"),
        ([FIRST, OTHER], "byte 0 of request 1's step 1 comes behind 1048576 bytes of request 0's step 1"),
        ([FIRST, NEWER], "byte 1048576 of request 0's step 2 comes behind 1048576 bytes of request 0's step 1"),
        ([Piece(0, 1, 0, 0, 3, b"four")], "a snapshot has 4 bytes of 3"),
    ],
)
def test_a_piece_that_does_not_fit_is_no_message(came: list[Piece], words: str) -> None:
    joiner = Joiner()
    with pytest.raises(UnreadableMessage) as refused:
        for piece in came:
            joiner.join(piece)
    assert str(refused.value) == words
    assert piece is came[-1]


# The order of things.


def test_messages_go_between_the_pieces() -> None:
    outbox, taken = Outbox(), snapshot(0, 1)
    first, second, third = cut(taken)
    outbox.keep(*kept(taken))
    outbox.put(BEGUN)
    said = iter(outbox)
    assert list(islice(said, 2)) == [BEGUN, first]
    outbox.put(DONE)
    assert outbox.waits
    outbox.put(BEAT)
    assert list(islice(said, 3)) == [DONE, BEAT, second]
    assert not outbox.waits
    outbox.put(DONE)
    assert list(islice(said, 2)) == [DONE, third]


def test_of_what_waits_the_newest_of_each_request_is_made() -> None:
    outbox, under_way, other, newest = Outbox(), snapshot(0, 1), snapshot(1, 4, 1), snapshot(0, 3, 1)
    outbox.keep(*kept(under_way))
    said = iter(outbox)
    begun = next(said)
    outbox.keep(0, never)
    outbox.keep(1, never)
    outbox.keep(*kept(newest))
    outbox.keep(*kept(other))
    outbox.end(FAILED)
    assert [begun, *said] == [*cut(under_way), *cut(newest), *cut(other), FAILED]


def test_what_cannot_be_made_is_said_once_a_request() -> None:
    def fails() -> Snapshot:
        raise TypeError("state['sigma'] is of type numpy.float32.")

    outbox, right = Outbox(), snapshot(1, 1, 1)
    outbox.keep(0, fails)
    outbox.keep(*kept(right))
    said = iter(outbox)
    assert next(said) == Unkept(0, "TypeError: state['sigma'] is of type numpy.float32")
    outbox.keep(0, fails)
    outbox.keep(2, fails)
    outbox.end(FAILED)
    wanted = [*cut(right), Unkept(2, "TypeError: state['sigma'] is of type numpy.float32"), FAILED]
    assert list(said) == wanted


def test_what_would_not_come_back_for_its_size_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "STATE_LIMIT", 100)
    outbox = Outbox()
    outbox.keep(0, lambda: Snapshot(0, 1, 0, bytes(101)))
    outbox.keep(1, lambda: Snapshot(1, 1, 0, bytes(100)))
    outbox.end(FAILED)
    words = "ValueError: a state of 101 bytes is over the limit of 100"
    assert list(outbox) == [Unkept(0, words), Piece(1, 1, 0, 0, 100, bytes(100)), FAILED]
    with pytest.raises(UnreadableMessage, match="a snapshot has 101 bytes of 100"):
        Joiner().join(Piece(1, 1, 0, 0, 101, bytes(101)))


def test_nothing_more_of_snapshots_when_their_time_is_over() -> None:
    outbox = Outbox()
    outbox.keep(*kept(snapshot(0, 1)))
    said = iter(outbox)
    next(said)
    outbox.keep(1, never)
    outbox.put(DONE)
    outbox.keep_for(0.0)
    outbox.end(FAILED)
    outbox.end(Failed("and again"))
    assert list(said) == [DONE, FAILED]


@pytest.mark.parametrize("what", ["message", "snapshot", "end"])
def test_what_comes_is_waited_for(what: str) -> None:
    outbox, taken = Outbox(), snapshot(0, 1, 1)
    deeds = {
        "message": partial(outbox.put, DONE),
        "snapshot": partial(outbox.keep, *kept(taken)),
        "end": partial(outbox.end, FAILED),
    }
    said: list[Message] = []
    waiting = threading.Thread(target=lambda: said.append(next(iter(outbox))), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    deeds[what]()
    waiting.join(LIMIT_S)
    assert said == [{"message": DONE, "snapshot": next(cut(taken)), "end": FAILED}[what]]


# A rank's process, whose engine is slow.

Deeds = Callable[[EngineLink, Callable[[Snapshot], None]], Any]


class ToldOutbox(Outbox):
    """With a word to the engine when its rank has said the last thing of all."""

    def __init__(self, said: Event) -> None:
        super().__init__()
        self._said = said

    def put(self, message: Message) -> None:
        super().put(message)
        if isinstance(message, Timeline):
            self._said.set()

    def end(self, last: Message) -> None:
        super().end(last)
        self._said.set()


def _rank(connection: Connection, said: Event, deeds: Deeds) -> None:
    setattr(engine_link, "Outbox", partial(ToldOutbox, said))  # noqa: B010 (as a process's own)
    link = EngineLink(connection)

    def keep(taken: Snapshot) -> None:
        """Returns when it is being sent, which the socket's room is too small for."""
        made = threading.Event()
        link.keep(taken.request, lambda: made.set() or taken)  # type: ignore[func-returns-value]
        assert made.wait(LIMIT_S)

    deeds(link, keep)
    said.set()
    threading.Event().wait()


@pytest.fixture
def rank() -> Iterator[Callable[[Deeds], Iterator[Message]]]:
    """What a rank says that does something, read when it has been done."""
    context, ours, processes = get_context("fork"), [], []

    def start(deeds: Deeds) -> Iterator[Message]:
        here, there = Pipe()
        said = context.Event()
        process = context.Process(target=_rank, args=(there, said, deeds), daemon=True)
        process.start()
        there.close()
        ours.append(here)
        processes.append(process)
        assert said.wait(LIMIT_S)
        return _received(here)

    yield start
    for process, here in zip(processes, ours, strict=True):
        process.kill()
        process.join()
        here.close()


def _received(connection: Connection) -> Iterator[Message]:
    while connection.poll(LIMIT_S):
        try:
            yield receive(connection)
        except EOFError:
            return


def but_beats(said: Iterator[Message]) -> Iterator[Message]:
    return (message for message in said if not isinstance(message, Beat))


A, B, C = snapshot(0, 1), snapshot(0, 3), snapshot(1, 1, 1)

Rank = Callable[[Deeds], Iterator[Message]]


def test_a_slow_engine_hears_everything_else_first(rank: Rank) -> None:
    def deeds(link: EngineLink, keep: Callable[[Snapshot], None]) -> None:
        keep(A)
        link.keep(0, never)
        link.keep(*kept(B))
        link.say(DONE)
        link.say(BEGUN)

    first, *others = cut(A)
    wanted = [first, DONE, BEGUN, *others, *cut(B)]
    found = list(islice(but_beats(rank(deeds)), len(wanted)))
    assert found == wanted


def test_beats_come_between_the_pieces(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "BEAT_EVERY_S", 0.01)
    large = snapshot(0, 1, 10)
    said = rank(lambda link, keep: keep(large))
    joiner, joined, beats, begun = Joiner(), None, 0, False
    while joined is None:
        message = next(said)
        if isinstance(message, Piece):
            begun, joined = True, joiner.join(message)
            time.sleep(0.05)  # a slow link
        else:
            assert isinstance(message, Beat)
            beats += begun
    assert joined == large
    assert beats


@pytest.mark.parametrize(("limit_s", "wanted"), [(LIMIT_S, [*cut(A), *cut(C)]), (0.0, [next(cut(A))])])
def test_a_rank_that_fails_says_what_it_has_while_there_is_time(
    limit_s: float, wanted: list[Message], rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "SNAPSHOTS_LIMIT_S", limit_s)

    def deeds(link: EngineLink, keep: Callable[[Snapshot], None]) -> None:
        keep(A)
        link.keep(*kept(C))
        link.fail(FAILED)

    assert list(but_beats(rank(deeds))) == [*wanted, FAILED]


def test_a_rank_that_leaves_keeps_nothing(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """But goes on to say that it is alive."""
    monkeypatch.setattr(control, "BEAT_EVERY_S", 0.01)

    def deeds(link: EngineLink, keep: Callable[[Snapshot], None]) -> None:
        keep(A)
        link.keep(*kept(C))
        link.leave(Timeline((), {}))

    said = rank(deeds)
    assert list(islice(but_beats(said), 2)) == [next(cut(A)), Timeline((), {})]
    assert all(isinstance(message, Beat) for message in islice(said, 5))
