"""The life of an engine's ranks: started, told what they are, listened to, ended, and started anew; which one failed,
when several say so."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from cineline.core import control
from cineline.engine.launch import RankProcess
from cineline.engine.link import Link
from cineline.engine.owned import let_go
from cineline.engine.recent import Recent
from cineline.engine.watch import TICK_S, Watch
from cineline.errors import EdgeBroken, OutOfMemory, RankFailed

START_LIMIT_S = 3600.0

CULPRIT_LIMIT_S = 3.0
"""Seconds between a rank's word that its neighbour is gone and the neighbour's own end."""

NOT_DUE = "it said {} when that was not due"

Report = control.Begun | control.Done | control.Spoiled | control.Snapshot | control.Unkept
"""What a rank says of a request."""

Take = Callable[[Report], None]
Deed = Callable[[], None]


class Abandoned(Exception):
    """Nobody is interested in the ranks any more."""


def nothing() -> None:
    """No deed."""


Expected = TypeVar("Expected", control.StoreOpen, control.Ready)


class WatchedRank:
    """A rank that has been launched, with its connection in use."""

    def __init__(self, process: RankProcess, hear: Callable[[Said], None]) -> None:
        self.rank, self.local_rank = process.rank, process.local_rank
        self.host, self.address = process.host, process.address
        self._process = process
        self._link = Link(process.connection, lambda message: hear((self, message)), process.describe_end)
        self.say, self.hang_up, self.close = self._link.say, self._link.hang_up, self._link.close
        self.end = process.end

    @property
    def is_local(self) -> bool:
        return self._process.process is not None

    @property
    def pid(self) -> int | None:
        return self._process.process.pid if self._process.process is not None else None

    @property
    def heard(self) -> float:
        if self.is_local and self.pid is None:  # the libraries load that it is forked with
            self._link.heard = time.monotonic()
        return self._link.heard

    @property
    def beat(self) -> control.Beat | None:
        return self._link.beat


class RankState(NamedTuple):
    """What a rank said of itself last, at most half a second ago.

    Attributes:
        rank: its number. item: what it computes, in words; empty while it waits. request: whose item that is.
        busy_s: seconds that it has computed since it was started.
        since_ns: wall-clock time at which it began with the item; None while it waits.
    """

    rank: int
    item: str
    request: int | None
    busy_s: float
    since_ns: int | None = None


Said = tuple[WatchedRank, control.Message]
"""What a rank said."""

Event = Said | Deed
"""That, or something to be done."""


class Ranks:
    """An engine's rank processes. Nothing here but `start` and `listen` waits for them to do something.

    Args:
        launch: starts them. setup: rank 0's; the others' differ in their numbers and the port alone.

    Attributes:
        timelines: what each rank has handed in at its end.
        recent: what they have computed, where they say so as it comes.
        leaving: they are to end; no start follows.
    """

    def __init__(self, launch: Callable[[], Sequence[RankProcess]], setup: control.Setup) -> None:
        self.timelines: dict[int, control.Timeline] = {}
        self.recent = Recent()
        self.leaving = False
        self._launch = launch
        self._setup = setup
        self._starts = 0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._put_off: deque[Deed] = deque()
        self._all: list[WatchedRank] = []
        self._watch = Watch([])

    def start(self, tick: Deed = nothing) -> list[int]:
        """Launch them, tell each what it is and wait until all are ready; the bytes of weights each has read.

        What is to be done meanwhile is put off until somebody listens.

        Args:
            tick: called again and again, every `TICK_S` at least.

        Raises:
            CinelineError: a rank's own error, or `RankFailed`; none is left running.
            Abandoned: they were to end meanwhile; none is left running.
        """
        deadline = time.monotonic() + START_LIMIT_S
        self._all = _watched(self._launch(), self._hear)
        self._watch = Watch(self._all)
        setup = replace(self._setup, start=self._starts)
        self._starts += 1

        def look() -> None:
            tick()
            if self.leaving:
                raise Abandoned

        try:
            ready = self._set_up(setup, deadline, look)
        except BaseException:
            self.end(0.0)
            raise
        self._watch.loading = False
        return [ready[rank.rank] for rank in self._all]

    def _hear(self, said: Said) -> None:
        """From any rank's thread."""
        if isinstance(said[1], control.Slices):
            self.recent.add(said[1].slices)
        else:
            self._events.put(said)

    def _set_up(self, setup: control.Setup, deadline: float, tick: Deed) -> dict[int, int]:
        port = None
        for rank in self._all:
            own = replace(setup, rank=rank.rank, local_rank=rank.local_rank, store_port=port, address=rank.address)
            rank.say(control.pack(own))
            if rank.rank == 0 and len(self._all) > 1 and self._all[1].is_local:
                port = self._expect(control.StoreOpen, deadline, tick)[1].port
        ready: dict[int, int] = {}
        while len(ready) < len(self._all):
            rank, message = self._expect(control.Ready, deadline, tick)
            ready[rank.rank] = message.bytes_read
        return ready

    def _expect(self, kind: type[Expected], deadline: float, tick: Deed) -> tuple[WatchedRank, Expected]:
        """What the next rank says while it starts, which is to be of that kind."""
        said = self._said(deadline, tick)
        if said is None:
            tick()
            raise RankFailed(0, f"the ranks were not ready after {START_LIMIT_S:.0f} s")
        rank, message = said
        if isinstance(message, control.Failed):
            rank, message = self._culprit(rank, message)
            raise message.error or _failure(rank, message)
        if not isinstance(message, kind):
            raise RankFailed(rank.rank, NOT_DUE.format(type(message).__name__))
        return rank, message

    def tell(self, message: control.Message, instead: Mapping[int, control.Message] | None = None) -> None:
        """Say it to every rank, to some of them something else instead; returns at once."""
        packed = control.pack(message)
        special = {number: control.pack(other) for number, other in (instead or {}).items()}
        for rank in self._all:
            rank.say(special.get(rank.rank, packed))

    def do(self, deed: Deed) -> None:
        """Have it done by whoever listens; in order."""
        self._events.put(deed)

    @property
    def states(self) -> list[RankState]:
        """Of each rank, in order."""
        beats = [(rank.rank, rank.beat or control.Beat()) for rank in self._all]
        return [RankState(rank, beat.item, beat.request, beat.busy_s, beat.since_ns) for rank, beat in beats]

    def stop(self) -> None:
        """Have the ranks end when they are through with what is under way."""
        self.leaving = True
        self.do(self._stop)

    def _stop(self) -> None:
        self._watch.leaving = True
        self.tell(control.Stop())

    def abandon(self) -> None:
        """Have `listen` return: nobody is interested any more. May be called from anywhere, a destructor included."""
        self.leaving = True
        self._events.put(None)

    def listen(self, take: Take, tick: Deed) -> RankFailed | None:
        """Hand on what the ranks say until all are through; the failure that ended it before, if one did.

        Args:
            tick: called again and again, every `TICK_S` at least.
        """
        while self._put_off:
            self._put_off.popleft()()
        try:
            while len(self.timelines) < len(self._all):
                event = self._next(tick=tick)
                if event is None:  # abandoned
                    return None
                if callable(event):
                    event()
                    continue
                rank, message = event
                if isinstance(message, control.Timeline) and self._watch.leaving:
                    self.timelines[rank.rank] = message
                elif isinstance(message, control.Failed):
                    return _failure(*self._culprit(rank, message, take))
                elif isinstance(message, Report):
                    take(message)
                else:
                    return RankFailed(rank.rank, NOT_DUE.format(type(message).__name__))
        except RankFailed as failure:
            return failure
        return None

    def _next(self, deadline: float | None = None, tick: Deed = nothing) -> Event | None:
        """What is said by these ranks or to be done next; None when the time is over, or they are abandoned.

        Raises:
            RankFailed: one of them stopped, vanished or hangs.
        """
        while True:
            tick()
            failure = self._watch.look()
            if failure is not None:
                raise failure
            left = TICK_S if deadline is None else min(TICK_S, deadline - time.monotonic())
            try:
                event = self._events.get(timeout=max(0.0, left))
            except queue.Empty:
                if left <= 0:
                    return None
                continue
            if event is None or callable(event) or event[0] in self._all:  # not of those that a failure has ended
                return event

    def _said(self, deadline: float, tick: Deed = nothing) -> Said | None:
        """What is said next; what is to be done is put off."""
        while callable(event := self._next(deadline, tick)):
            self._put_off.append(event)
        return event

    def _culprit(
        self, rank: WatchedRank, failed: control.Failed, take: Take = lambda message: None
    ) -> tuple[WatchedRank, control.Failed]:
        """Who failed: where this one only lost its neighbour, the other one is heard of within moments."""
        if not isinstance(failed.error, EdgeBroken):
            return rank, failed
        deadline = time.monotonic() + CULPRIT_LIMIT_S
        while (said := self._said(deadline)) is not None:
            other, message = said
            if isinstance(message, control.Failed) and not isinstance(message.error, EdgeBroken):
                return other, message
            if isinstance(message, Report):  # of a request that may be done with it
                take(message)
        return rank, control.Failed(failed.cause)

    def end(self, grace_s: float) -> None:
        """All processes are gone when it returns, and the connections; they have so long to go by themselves."""
        if grace_s > 0:
            for rank in self._all:
                rank.hang_up()
        self._kill(time.monotonic() + grace_s)
        for rank in self._all:
            rank.close()

    def kill(self) -> None:
        """End the processes at once, and have no others started; returns when all are gone. May be called beside
        `listen` and `start`."""
        self.leaving = True
        self._kill(0.0)

    def _kill(self, at: float) -> None:
        """End the processes that are there at that moment (`time.monotonic`)."""
        for rank in self._all:
            rank.end(at)
            rank.hang_up()


def _watched(processes: Sequence[RankProcess], hear: Callable[[Said], None]) -> list[WatchedRank]:
    watched: list[WatchedRank] = []
    try:
        for process in processes:
            watched.append(WatchedRank(process, hear))
    except BaseException:
        for process in processes:
            process.end(0.0)
            let_go(process.connection)
        for rank in watched:
            rank.close()
        raise
    return watched


def _failure(rank: WatchedRank, failed: control.Failed) -> RankFailed:
    kind = OutOfMemory if failed.out_of_memory else RankFailed
    return kind(rank.rank, failed.cause, failed.request)
