"""Whose turn it is: shares of the line, by work (no torch).

Start-time fair queueing (Goyal, Vin, Cheng 1996) at three levels, each of which shares what it gets among those who
wait there: priorities by weight, within one its owners alike, within an owner short jobs and long ones alike. So none
of them starves: not the low priority, not who asks little, not a long job among short ones, nor the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

WEIGHTS: Mapping[str, float] = {"high": 16.0, "normal": 4.0, "low": 1.0}
"""Shares of priorities, where jobs of all of them wait."""

LENGTH_BASE = 4.0
"""Jobs are of a length where their work differs by less than about this factor."""


class Waiting(NamedTuple):
    """A job that waits, as far as its turn depends on it."""

    id: str
    owner: str
    priority: str
    work: float

    @property
    def path(self) -> tuple[Hashable, ...]:
        """The groups that it belongs to, from the outermost in."""
        return self.priority, self.owner, round(math.log(max(self.work, 1.0), LENGTH_BASE))


class FairQueue:
    """Chooses among those that wait, and remembers what each group has had.

    A group's tag is the virtual time at which its next job may start; the least goes first. Who comes anew begins at
    the present, so that nobody saves up turns.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[Hashable, ...], float] = {}
        self._now: dict[tuple[Hashable, ...], float] = {}

    def choose(self, waiting: Sequence[Waiting]) -> Waiting | None:
        """The job whose turn it is, of those given in order of coming; it is charged for it."""
        if not waiting:
            return None
        left = list(waiting)
        place: tuple[Hashable, ...] = ()
        tags = []
        for level in range(len(waiting[0].path)):
            groups = dict.fromkeys(job.path[level] for job in left)
            now = self._now.get(place, 0.0)
            tag, group = min(
                ((max(now, self._next.get((*place, group), 0.0)), group) for group in groups), key=lambda pair: pair[0]
            )
            left = [job for job in left if job.path[level] == group]
            tags.append((place, tag))
            place = (*place, group)
        chosen = left[0]
        self._charge(chosen, tags)
        return chosen

    def _charge(self, job: Waiting, tags: Iterable[tuple[tuple[Hashable, ...], float]]) -> None:
        for level, (place, tag) in enumerate(tags):
            weight = WEIGHTS.get(job.priority, 1.0) if level == 0 else 1.0
            self._now[place] = tag
            self._next[(*place, job.path[level])] = tag + max(job.work, 1.0) / weight
        self._forget()

    def _forget(self) -> None:
        """Who has been passed by needs no memory: it would begin at the present anyway."""
        passed = [place for place, tag in self._next.items() if tag <= self._now.get(place[:-1], 0.0)]
        for place in passed:
            del self._next[place]
