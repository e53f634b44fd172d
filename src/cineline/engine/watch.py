"""Which rank has stopped, vanished or hangs, by its beats; one that is slow does none of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil

from cineline.core.control import Beat
from cineline.errors import RankFailed

TICK_S = 0.5
"""From one look to the next."""

AWAY_S = 3.0
"""Between two looks: more, and this process was not running itself, so that the ranks' silence says nothing."""

SILENT_LIMIT_S = 10.0
"""Without a beat, which comes whatever a rank computes."""

LOADING_LIMIT_S = 120.0
"""The same before the rank is ready: a library that loads may keep its other threads from running."""

STOPPED_LIMIT_S = 5.0
"""For which a rank may be stopped: whoever pauses a machine for a moment should lose nothing."""


class Watched(Protocol):
    """What is known of a rank."""

    @property
    def rank(self) -> int: ...
    @property
    def pid(self) -> int | None:
        """Of its process, where that is on this machine."""
        ...

    @property
    def heard(self) -> float:
        """When it last said anything."""
        ...

    @property
    def beat(self) -> Beat | None: ...

    @property
    def host(self) -> str:
        """Where it is, in words; empty where that is this host."""
        ...


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it is gone, which its connection tells
        return False


@dataclass
class Watch:
    """Looks at ranks again and again.

    Args:
        clock, is_stopped: replaced by tests.

    Attributes:
        loading: whether they load still. leaving: whether they are to end: nobody waits for one that is stopped then.
    """

    ranks: Sequence[Watched]
    clock: Callable[[], float] = time.monotonic
    is_stopped: Callable[[int], bool] = is_stopped
    loading: bool = True
    leaving: bool = False

    def __post_init__(self) -> None:
        self._looked = self._since = self.clock()
        self._stopped_since: Mapping[int, float] = {}

    def look(self) -> RankFailed | None:
        """What is wrong, if anything is; does nothing where the last look is not `TICK_S` ago."""
        now = self.clock()
        if now - self._looked < TICK_S:
            return None
        if now - self._looked > AWAY_S:
            self._since, self._stopped_since = now, {}
        self._looked = now
        stopped = [rank.rank for rank in self.ranks if rank.pid is not None and self.is_stopped(rank.pid)]
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        for rank in self.ranks:
            failure = self._failure(rank, now)
            if failure is not None:
                return failure
        return None

    def _failure(self, rank: Watched, now: float) -> RankFailed | None:
        if rank.rank in self._stopped_since:
            stopped_s = now - self._stopped_since[rank.rank]
            if self.leaving or stopped_s >= STOPPED_LIMIT_S:
                cause = f"its process {rank.pid} is stopped, as by SIGSTOP, for {stopped_s:.0f} s"
                return RankFailed(rank.rank, cause)
        silent_s = now - max(rank.heard, self._since)
        if silent_s >= (LOADING_LIMIT_S if self.loading else SILENT_LIMIT_S):
            host = f"its host{rank.host and f' {rank.host}'}"
            cause = f"nothing was heard of it for {silent_s:.0f} s (its process or {host} is stopped, or cut off)"
            return RankFailed(rank.rank, cause)
        beat = rank.beat
        if beat is not None and beat.limit_s is not None and beat.computing_s >= beat.limit_s:
            cause = (
                f"it hangs in {beat.item}, for {beat.computing_s:.0f} s (the limit is {beat.limit_s:.0f} s by "
                "the longest of that kind and size so far)"
            )
            return RankFailed(rank.rank, cause, beat.request)
        return None
