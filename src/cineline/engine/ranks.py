"""The life of an engine's ranks: told what they are, listened to, and ended; which one failed, when several say so."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cineline.core import control
from cineline.engine.launch import RankProcess
from cineline.engine.link import Link
from cineline.engine.owned import let_go
from cineline.engine.watch import TICK_S, Watch
from cineline.errors import EdgeBroken, RankFailed

START_LIMIT_S = 3600.0

CULPRIT_LIMIT_S = 3.0
"""Seconds between a rank's word that its neighbour is gone and the neighbour's own end."""

NOT_DUE = "it said {} when that was not due"

Said = tuple[int, control.Message]
"""What a rank said, with its number."""

Event = Said | Callable[[], None]
"""That, or something to be done."""

Report = control.Begun | control.Done | control.Spoiled | control.Snapshot | control.Unkept
"""What a rank says of a request."""

Take = Callable[[Report], None]

Expected = TypeVar("Expected", control.StoreOpen, control.Ready)


class WatchedRank:
    """A rank that has been launched, with its connection in use."""

    def __init__(self, process: RankProcess, hear: Callable[[Said], None]) -> None:
        self.rank, self.local_rank = process.rank, process.local_rank
        self._process = process
        self._link = Link(process.connection, lambda message: hear((process.rank, message)), process.describe_end)
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


class Ranks:
    """Rank processes that have been launched. Nothing here but `start` and `listen` waits for them to do something.

    Attributes:
        timelines: what each rank has handed in at its end.
    """

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self.timelines: dict[int, control.Timeline] = {}
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._all: list[WatchedRank] = []
        try:
            for process in processes:
                self._all.append(WatchedRank(process, self._events.put))
        except BaseException:
            for process in processes:
                process.end(0.0)
                let_go(process.connection)
            self.end(0.0)
            raise
        self._watch = Watch(self._all)

    def start(self, setup: control.Setup) -> list[int]:
        """Tell every rank what it is and wait until all are ready; the bytes of weights each has read.

        Args:
            setup: rank 0's; the others' differ in their numbers and the port alone.

        Raises:
            CinelineError: a rank's own error, or `RankFailed`; none is left running.
        """
        deadline = time.monotonic() + START_LIMIT_S
        try:
            port = None
            for rank in self._all:
                own = replace(setup, rank=rank.rank, local_rank=rank.local_rank, store_port=port)
                rank.say(control.pack(own))
                if rank.rank == 0 and len(self._all) > 1 and self._all[1].is_local:
                    port = self._expect(control.StoreOpen, deadline)[1].port
            ready: dict[int, int] = {}
            while len(ready) < len(self._all):
                number, message = self._expect(control.Ready, deadline)
                ready[number] = message.bytes_read
        except BaseException:
            self.end(0.0)
            raise
        self._watch.loading = False
        return [ready[rank.rank] for rank in self._all]

    def _expect(self, kind: type[Expected], deadline: float) -> tuple[int, Expected]:
        """What the next rank says while it starts, which is to be of that kind."""
        event = self._next(deadline)
        if event is None:
            raise RankFailed(0, f"the ranks were not ready after {START_LIMIT_S:.0f} s")
        assert not callable(event), "nobody has anything to do while ranks start"
        number, message = event
        if isinstance(message, control.Failed):
            number, message = self._culprit(number, message)
            raise message.error or RankFailed(number, message.cause, message.request)
        if not isinstance(message, kind):
            raise RankFailed(number, NOT_DUE.format(type(message).__name__))
        return number, message

    def tell(self, message: control.Message, instead: Mapping[int, control.Message] | None = None) -> None:
        """Say it to every rank, to some of them something else instead; returns at once."""
        packed = control.pack(message)
        special = {number: control.pack(other) for number, other in (instead or {}).items()}
        for rank in self._all:
            rank.say(special.get(rank.rank, packed))

    def do(self, deed: Callable[[], None]) -> None:
        """Have it done by whoever listens; in order."""
        self._events.put(deed)

    def stop(self) -> None:
        """Have the ranks end when they are through with what is under way."""
        self.do(self._stop)

    def _stop(self) -> None:
        self._watch.leaving = True
        self.tell(control.Stop())

    def abandon(self) -> None:
        """Have `listen` return: nobody is interested any more. May be called from anywhere, a destructor included."""
        self._events.put(None)

    def listen(self, take: Take, tick: Callable[[], None]) -> RankFailed | None:
        """Hand on what the ranks say until all are through; the failure that ended it before, if one did.

        Args:
            tick: called again and again, every `TICK_S` at least.
        """
        try:
            while len(self.timelines) < len(self._all):
                event = self._next(tick=tick)
                if event is None:  # abandoned
                    return None
                if callable(event):
                    event()
                    continue
                number, message = event
                if isinstance(message, control.Timeline) and self._watch.leaving:
                    self.timelines[number] = message
                elif isinstance(message, control.Failed):
                    number, message = self._culprit(number, message, take)
                    return RankFailed(number, message.cause, message.request)
                elif isinstance(message, Report):
                    take(message)
                else:
                    return RankFailed(number, NOT_DUE.format(type(message).__name__))
        except RankFailed as failure:
            return failure
        return None

    def _next(self, deadline: float | None = None, tick: Callable[[], None] = lambda: None) -> Event | None:
        """What is said next; None when the time is over.

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
                return self._events.get(timeout=max(0.0, left))
            except queue.Empty:
                if left <= 0:
                    return None

    def _culprit(
        self, number: int, failed: control.Failed, take: Take = lambda message: None
    ) -> tuple[int, control.Failed]:
        """Who failed: where this one only lost its neighbour, the other one is heard of within moments."""
        if not isinstance(failed.error, EdgeBroken):
            return number, failed
        deadline = time.monotonic() + CULPRIT_LIMIT_S
        while (event := self._next(deadline)) is not None:
            if callable(event):  # too late
                continue
            other, message = event
            if isinstance(message, control.Failed) and not isinstance(message.error, EdgeBroken):
                return other, message
            if isinstance(message, Report):  # of a request that may be done with it
                take(message)
        return number, control.Failed(failed.cause)

    def end(self, grace_s: float) -> None:
        """All processes are gone when it returns, and the connections; they have so long to go by themselves."""
        if grace_s > 0:
            for rank in self._all:
                rank.hang_up()
        self.kill(time.monotonic() + grace_s)
        for rank in self._all:
            rank.close()

    def kill(self, at: float = 0.0) -> None:
        """End the processes that are there at that moment (`time.monotonic`); returns when all are gone."""
        for rank in self._all:
            rank.end(at)
            rank.hang_up()
