"""The life of an engine's ranks: told what they are, listened to, and ended; which one failed, when several say so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection as mp_connection
from typing import Any

from cineline.core import control
from cineline.core.config import Cut, DeviceConfig, ParallelConfig
from cineline.core.family import FamilySpec
from cineline.core.faults import planned
from cineline.engine.launch import RankProcess
from cineline.errors import EdgeBroken, RankFailed

START_LIMIT_S = 3600.0

CULPRIT_LIMIT_S = 3.0
"""Seconds between a rank's word that its neighbour is gone and the neighbour's own end."""


class Ranks:
    """Rank processes that have been launched.

    Attributes:
        timelines: what each rank has handed in at its end.
    """

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self._all = processes
        self.timelines: dict[int, control.Timeline] = {}

    def start(
        self, spec: FamilySpec, parallel: ParallelConfig, cut: tuple[Cut, ...], config: DeviceConfig, trace: bool
    ) -> list[int]:
        """Tell every rank what it is and wait until all are ready; the bytes of weights each has read.

        Raises:
            CinelineError: a rank's own error, or `RankFailed`; none is left running.
        """
        deadline = time.monotonic() + START_LIMIT_S
        try:
            self._set_up(spec, parallel, cut, config, trace, deadline)
            return self._await_ready(deadline)
        except BaseException:
            self.end(0.0)
            self.disconnect()
            raise

    def _set_up(
        self,
        spec: FamilySpec,
        parallel: ParallelConfig,
        cut: tuple[Cut, ...],
        config: DeviceConfig,
        trace: bool,
        deadline: float,
    ) -> None:
        port, faults = None, planned()
        for rank in self._all:
            self._say(rank, control.Setup(spec, rank.rank, parallel, cut, config, rank.local_rank, port, trace, faults))
            if rank.rank == 0 and len(self._all) > 1 and self._all[1].process is not None:
                opened = self._hear([rank], deadline)[1]
                assert isinstance(opened, control.StoreOpen)
                port = opened.port

    def _await_ready(self, deadline: float) -> list[int]:
        ready: dict[int, int] = {}
        while len(ready) < len(self._all):
            rank, message = self._hear([rank for rank in self._all if rank.rank not in ready], deadline)
            assert isinstance(message, control.Ready)
            ready[rank.rank] = message.bytes_read
        return [ready[rank.rank] for rank in self._all]

    def _hear(self, ranks: list[RankProcess], deadline: float) -> tuple[RankProcess, control.Message]:
        """The next message of any rank while it starts."""
        by_connection: dict[Any, RankProcess] = {rank.connection: rank for rank in ranks}
        heard = mp_connection.wait(list(by_connection), timeout=max(0.0, deadline - time.monotonic()))
        if not heard:
            raise RankFailed(ranks[0].rank, f"it was not ready after {START_LIMIT_S:.0f} s")
        rank = by_connection[heard[0]]
        message = _receive(rank)
        if isinstance(message, control.Failed):
            failure = message.error or RankFailed(rank.rank, message.cause)
            others = [other for other in ranks if other is not rank]
            if isinstance(failure, EdgeBroken):
                failure = RankFailed(rank.rank, message.cause)
                # It only missed another rank, of which more is heard within moments.
                while others and mp_connection.wait([other.connection for other in others], CULPRIT_LIMIT_S):
                    other, _ = self._hear(others, deadline)
                    others.remove(other)
            raise failure
        return rank, message

    def tell(self, message: control.Message, instead: Mapping[int, control.Message] | None = None) -> None:
        """Say it to every rank, to some of them something else instead."""
        for rank in self._all:
            self._say(rank, (instead or {}).get(rank.rank, message))

    def _say(self, rank: RankProcess, message: control.Message) -> None:
        with contextlib.suppress(OSError):  # it is gone; the listener hears of that and knows the cause
            control.send(rank.connection, message)

    def listen(self, take: Callable[[control.Begun | control.Done], None]) -> RankFailed | None:
        """Hand on what the ranks say until all have ended; the failure that ended it before, if one did."""
        open_ranks: dict[Any, RankProcess] = {rank.connection: rank for rank in self._all}
        symptom: RankFailed | None = None
        deadline: float | None = None
        while open_ranks:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            heard = mp_connection.wait(list(open_ranks), timeout=left)
            if not heard:
                return symptom
            for connection in heard:
                rank = open_ranks[connection]
                message = _receive(rank)
                if isinstance(message, control.Timeline):
                    self.timelines[rank.rank] = message
                    del open_ranks[connection]
                elif isinstance(message, control.Failed):
                    failure = RankFailed(rank.rank, message.cause)
                    if not isinstance(message.error, EdgeBroken):
                        return failure
                    # It only lost its neighbour. The one that failed is heard of within moments.
                    symptom = symptom or failure
                    deadline = deadline or time.monotonic() + CULPRIT_LIMIT_S
                    del open_ranks[connection]
                elif isinstance(message, (control.Begun, control.Done)):
                    take(message)
        return symptom

    def end(self, grace_s: float) -> None:
        """All processes are gone when it returns; they have so long to go by themselves."""
        deadline = time.monotonic() + grace_s
        for rank in self._all:
            rank.end(deadline)

    def disconnect(self) -> None:
        """Close the connections, which also ends ranks on other hosts. Nobody may be listening any more."""
        for rank in self._all:
            rank.connection.close()


def _receive(rank: RankProcess) -> control.Message:
    try:
        return control.receive(rank.connection)
    except (EOFError, OSError):
        return control.Failed(rank.describe_end())
