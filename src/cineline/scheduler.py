"""Which work item comes next: the one place that decides the order (no torch).

A request is a row of turns: encode and first step, one turn a further step, one a decode chunk. A turn
is one or more work items, emitted together. The next turn of a request is emitted when the tail begins
the last item of the turn before. Headers thus run one stage's work ahead of the tensors, so that no
stage waits for one; requests take turns in the order in which they come back; and the line never holds
two turns of one request while another could go, which would leave a bubble between the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from cineline.request import Branch, Job, Kind, WorkItem


def default_in_flight(stages: int, branches: int) -> int:
    """Requests that fill a line of `stages`, with one to spare: P/2 + 2 with guidance, P + 1 without."""
    return stages // 2 + 2 if branches == 2 else stages + 1


def speed_up_limit(stages: int, in_flight: int, branches: int) -> Fraction:
    """Throughput of P equal stages with M requests in flight, against one stage.

    With B branches a step, M B items are in the line at most, and a request's items come back after
    P + B - 1 slots: B M P / max(B M, P + B - 1), so 2 M P / max(2 M, P + 1) with guidance.
    """
    items = branches * in_flight
    return Fraction(items * stages, max(items, stages + branches - 1))


def turns_of(job: Job) -> Iterator[list[WorkItem]]:
    """The job's turns, in order."""
    for step in range(job.steps):
        items = [
            WorkItem(Kind.DENOISE, job.id, step, Branch(branch), last=branch == job.branches - 1)
            for branch in range(job.branches)
        ]
        yield items if step else [WorkItem(Kind.ENCODE, job.id, last=False), *items]
    for chunk in range(job.chunks):
        yield [WorkItem(Kind.DECODE, job.id, chunk)]


@dataclass(eq=False)
class _Entry:
    job: Job
    turns: deque[list[WorkItem]] = field(default_factory=deque)
    unfinished: int = 0
    steps_done: int = 0

    def __post_init__(self) -> None:
        self.turns.extend(turns_of(self.job))
        self.unfinished = len(self.turns)

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
        self._active: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        self._decoder: _Entry | None = None

    def submit(self, job: Job) -> None:
        """Queue a job; `pump` admits it when there is room."""
        self._waiting.append(job)

    def pump(self) -> list[WorkItem]:
        """All items that may be emitted now, in order."""
        while self._waiting and self._load() + self._share(self._waiting[0]) <= 1:
            job = self._waiting.popleft()
            self._admit(job)
            self._active[job.id] = _Entry(job)
            self._ready.append(self._active[job.id])
        items: list[WorkItem] = []
        while (entry := next(filter(self._may_go, self._ready), None)) is not None:
            self._ready.remove(entry)
            items.extend(entry.turns.popleft())
            if items[-1].kind is Kind.DECODE:
                self._decoder = entry
        return items

    def begun(self, item: WorkItem) -> None:
        """Record that the tail has begun `item`, the last of its turn: the request's next turn may go."""
        entry = self._active.get(item.request)
        if entry is not None and entry.turns:
            self._ready.append(entry)

    def complete(self, item: WorkItem) -> bool:
        """Record that the tail has finished `item`, the last of its turn; true when it was the request's last."""
        entry = self._active.get(item.request)
        if entry is None:
            return False
        entry.steps_done += item.kind is Kind.DENOISE
        entry.unfinished -= 1
        if not entry.unfinished:
            self._forget(entry)
        return not entry.unfinished

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
        self._ready = deque(other for other in self._ready if other is not entry)
        if self._decoder is entry:
            self._decoder = None

    def _share(self, job: Job) -> Fraction:
        return Fraction(1, self._in_flight or default_in_flight(self._stages, job.branches))

    def _load(self) -> Fraction:
        return sum((self._share(entry.job) for entry in self._active.values() if entry.denoising), Fraction(0))

    def _may_go(self, entry: _Entry) -> bool:
        # One request decodes at a time: a VAE decoder's cache takes gigabytes.
        return entry.turns[0][0].kind is not Kind.DECODE or self._decoder in (None, entry)
