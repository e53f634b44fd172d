"""Which work item comes next: the one place that decides the order (no torch).

A request is a row of turns: encode, one turn a solver step, one a decode chunk. A turn is one or
more work items, emitted together. Requests take turns in a ring. The line is first in, first out, so
latents come back in the order of emission, and taking turns is already the best such order.

A request may have two turns out at once: headers then run ahead of the tensors and no stage waits for
one, while a cancel or a new request waits for two turns at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from cineline.request import Branch, Job, Kind, WorkItem

TURNS_AHEAD = 2


def default_in_flight(stages: int, branches: int) -> int:
    """Requests that fill a line of `stages`, with one to spare: P/2 + 2 with guidance, P + 1 without."""
    return stages // 2 + 2 if branches == 2 else stages + 1


def turns_of(job: Job) -> Iterator[list[WorkItem]]:
    """The job's turns, in order."""
    yield [WorkItem(Kind.ENCODE, job.id)]
    for step in range(job.steps):
        yield [
            WorkItem(Kind.DENOISE, job.id, step, Branch(branch), last=branch == job.branches - 1)
            for branch in range(job.branches)
        ]
    for chunk in range(job.chunks):
        yield [WorkItem(Kind.DECODE, job.id, chunk)]


@dataclass(eq=False)
class _Entry:
    job: Job
    turns: deque[list[WorkItem]] = field(default_factory=deque)
    outstanding: int = 0
    steps_done: int = 0

    def __post_init__(self) -> None:
        self.turns.extend(turns_of(self.job))

    @property
    def denoising(self) -> bool:
        """Counts against the requests in flight: not all of its steps are done."""
        return self.steps_done < self.job.steps


class Scheduler:
    """Orders the work items of all requests.

    Args:
        stages: P, stages of the line.
        in_flight: requests that may denoise at once; None for the default of each.
        admit: called with a job just before its first item is emitted.
    """

    def __init__(self, stages: int, in_flight: int | None, admit: Callable[[Job], None]) -> None:
        self._stages = stages
        self._in_flight = in_flight
        self._admit = admit
        self._waiting: deque[Job] = deque()
        self._ring: deque[_Entry] = deque()
        self._active: dict[int, _Entry] = {}
        self._decoder: int | None = None

    def submit(self, job: Job) -> None:
        """Queue a job; `pump` admits it when there is room."""
        self._waiting.append(job)

    def pump(self) -> list[WorkItem]:
        """All items that may be emitted now, in order."""
        items: list[WorkItem] = []
        while True:
            self._admit_waiting()
            turn = self._next_turn()
            if turn is None:
                return items
            items.extend(turn)

    def complete(self, item: WorkItem) -> bool:
        """Record that the tail has finished `item`; true when that was the request's last one."""
        entry = self._active.get(item.request)
        if entry is None or not item.last:
            return False
        entry.outstanding -= 1
        entry.steps_done += item.kind is Kind.DENOISE
        if entry.turns or entry.outstanding:
            return False
        self._forget(entry)
        return True

    def cancel(self, request: int) -> WorkItem | None:
        """Forget a request; the drop item to emit when it was already in the line."""
        self._waiting = deque(job for job in self._waiting if job.id != request)
        entry = self._active.get(request)
        if entry is None:
            return None
        self._forget(entry)
        return WorkItem(Kind.DROP, request)

    def _forget(self, entry: _Entry) -> None:
        del self._active[entry.job.id]
        if entry.turns:
            self._ring.remove(entry)
        if self._decoder == entry.job.id:
            self._decoder = None

    def _admit_waiting(self) -> None:
        while self._waiting and self._load() + self._share(self._waiting[0]) <= 1:
            job = self._waiting.popleft()
            self._admit(job)
            entry = _Entry(job)
            self._active[job.id] = entry
            self._ring.append(entry)

    def _share(self, job: Job) -> Fraction:
        return Fraction(1, self._in_flight or default_in_flight(self._stages, job.branches))

    def _load(self) -> Fraction:
        return sum((self._share(entry.job) for entry in self._active.values() if entry.denoising), Fraction(0))

    def _next_turn(self) -> list[WorkItem] | None:
        entry = next((entry for entry in self._ring if self._may_go(entry)), None)
        if entry is None:
            return None
        self._ring.remove(entry)
        turn = entry.turns.popleft()
        entry.outstanding += 1
        if turn[0].kind is Kind.DECODE:
            self._decoder = entry.job.id
        if entry.turns:
            self._ring.append(entry)
        return turn

    def _may_go(self, entry: _Entry) -> bool:
        if entry.outstanding >= TURNS_AHEAD:
            return False
        if entry.turns[0][0].kind is Kind.DECODE:
            # One request decodes at a time: a VAE decoder's cache takes gigabytes.
            return self._decoder in (None, entry.job.id)
        return True
