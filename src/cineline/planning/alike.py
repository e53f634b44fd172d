"""A line's costs, remembered (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cineline.core.config import Place
from cineline.core.costs import LineCosts
from cineline.core.request import Job, Value, WorkItem

K = TypeVar("K")
V = TypeVar("V")


class Alike:
    """A line's costs for requests that are all like its own, each worked out once (`core.costs.Profile`)."""

    def __init__(self, line: LineCosts) -> None:
        self.parallel = line.parallel
        self._line, self._job = line, line.job
        self._seconds: dict[tuple[object, ...], float] = {}
        self._experts: dict[int, int] = {}
        self._bytes: dict[tuple[object, ...], int] = {}

    def expert(self, job: Job, step: int) -> int:
        return _once(self._experts, step, lambda: self._line.expert(self._job, step))

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        key = place.cfg, place.pp, item.kind, item.number
        return _once(self._seconds, key, lambda: self._line.compute_s(place, item, self._job))

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        key = value, item.kind, item.number
        return _once(self._seconds, key, lambda: self._line.transfer_s(value, item, self._job))

    def resident_bytes(self, place: Place) -> int:
        return _once(self._bytes, (place.cfg, place.pp), lambda: self._line.resident_bytes(place))

    def admitted_bytes(self, place: Place, job: Job) -> int:
        key = place.cfg, place.pp, "admitted"
        return _once(self._bytes, key, lambda: self._line.admitted_bytes(place, self._job))

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        key = place.cfg, place.pp, item.kind, item.number
        return _once(self._bytes, key, lambda: self._line.working_bytes(place, item, self._job))


def _once(known: dict[K, V], key: K, work_out: Callable[[], V]) -> V:
    if key not in known:
        known[key] = work_out()
    return known[key]
