"""Which work item comes next: the one place that decides the order (no torch).

A request is a row of turns: its prompts through the text encoder, encode and first step, one turn a further step, one
a decode chunk (the first of these holds as many chunks as there are stages, where the decoder is cut over them, so that
each has one). A turn is one or more work items, emitted together. The next turn of a request is emitted when the tail
begins an item that ends one. Headers thus run one stage's work ahead of the tensors, so that no stage waits for one;
requests take turns in the order in which they come back; and the line never holds two turns of one request while
another could go, which would leave a bubble between the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cineline.config import ParallelConfig
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


def turns_of(job: Job, branches: int, decode_ahead: int = 1) -> Iterator[list[WorkItem]]:
    """The job's turns, in order, with that many items a step and chunks in the first turn of its decode."""
    if job.texts:
        yield [
            WorkItem(Kind.TEXT, job.id, 0, Branch(branch), last=branch == branches - 1) for branch in range(branches)
        ]
    for step in range(job.steps):
        items = _a_branch_each(Kind.DENOISE, job, step, branches)
        yield items if step else [WorkItem(Kind.ENCODE, job.id, last=False), *items]
    chunks = [WorkItem(Kind.DECODE, job.id, chunk) for chunk in range(job.chunks)]
    if chunks:
        yield chunks[:decode_ahead]
    yield from ([chunk] for chunk in chunks[decode_ahead:])


def _a_branch_each(kind: Kind, job: Job, number: int, branches: int) -> list[WorkItem]:
    return [WorkItem(kind, job.id, number, Branch(branch), last=branch == branches - 1) for branch in range(branches)]


@dataclass(eq=False)
class _Entry:
    job: Job
    turns: deque[list[WorkItem]]
    unfinished: int = 0
    steps_done: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        self.unfinished = sum(item.last for turn in self.turns for item in turn)

    @property
    def denoising(self) -> bool:
        """Counts against the requests in flight: not all of its steps are done."""
        return self.steps_done < self.job.steps


class Scheduler:
    """Orders the work items of all requests.

    Args:
        groups: stages of the line, by group: one, or with split experts one for each expert. A request is in the
            first group until it moves to the second, and each group has its share of the requests in flight, so
            that new ones come in while others are in the second.
        in_flight: requests that may denoise at once; None for the default of each group.
        admit: called with a job just before its first item is emitted.
        cfg: lines that share a step's branches. With two, a step is one item, of which each line runs its branch.
        decode_ahead: chunks of a request that may be in the line at once: the stages, where the decoder is cut.
    """

    def __init__(
        self,
        groups: Sequence[int],
        in_flight: int | None,
        admit: Callable[[Job], None],
        cfg: int = 1,
        decode_ahead: int = 1,
    ) -> None:
        self._groups = groups
        self._in_flight = in_flight
        self._admit = admit
        self._cfg = cfg
        self._decode_ahead = decode_ahead
        self._waiting: deque[Job] = deque()
        self._active: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        self._decoder: _Entry | None = None

    def submit(self, job: Job) -> None:
        """Queue a job; `pump` admits it when there is room."""
        self._waiting.append(job)

    def pump(self) -> list[WorkItem]:
        """All items that may be emitted now, in order."""
        while self._waiting and self._has_room(self._waiting[0]):
            job = self._waiting.popleft()
            self._admit(job)
            turns = turns_of(job, self._branches(job), self._decode_ahead)
            self._active[job.id] = _Entry(job, deque(turns))
            self._ready.append(self._active[job.id])
        items: list[WorkItem] = []
        while (entry := next(filter(self._may_go, self._ready), None)) is not None:
            self._ready.remove(entry)
            items.extend(entry.turns.popleft())
            if items[-1].kind is Kind.DECODE:
                self._decoder = entry
        return items

    def begun(self, item: WorkItem) -> None:
        """Record that the tail has begun `item`, an end of a turn: the request's next turn may go."""
        entry = self._active.get(item.request)
        if entry is not None and len(entry.turns) > self._ready.count(entry):
            self._ready.append(entry)

    def complete(self, item: WorkItem, moves: bool = False) -> bool:
        """Record that the tail has finished `item`, an end of a turn; true when it was the request's last.

        Args:
            moves: the request goes on in the next group.
        """
        entry = self._active.get(item.request)
        if entry is None:
            return False
        entry.steps_done += item.kind is Kind.DENOISE
        entry.group += moves
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

    def _has_room(self, job: Job) -> bool:
        denoising = [entry for entry in self._active.values() if entry.denoising]
        first = [entry for entry in denoising if entry.group == 0]
        return all(
            sum((share(entry.job) for entry in entries), share(job)) <= 1
            for entries, share in ((denoising, self._share), (first, self._share_of_first_group))
        )

    def _share(self, job: Job) -> Fraction:
        return Fraction(1, self._in_flight or sum(self._default(stages, job) for stages in self._groups))

    def _share_of_first_group(self, job: Job) -> Fraction:
        first = self._groups[0]
        given = self._in_flight and -(-self._in_flight * first // sum(self._groups))
        return Fraction(1, given or self._default(first, job))

    def _default(self, stages: int, job: Job) -> int:
        return default_in_flight(stages, self._branches(job))

    def _branches(self, job: Job) -> int:
        """Items of a step in each line."""
        return 1 if self._cfg == 2 else job.branches

    def _may_go(self, entry: _Entry) -> bool:
        # One request decodes at a time: a VAE decoder's cache takes gigabytes.
        return entry.turns[0][0].kind is not Kind.DECODE or self._decoder in (None, entry)


def scheduler_for(parallel: ParallelConfig, in_flight: int | None, admit: Callable[[Job], None]) -> Scheduler:
    """The scheduler of a line that is divided so."""
    ahead = parallel.pp if parallel.vae_decode == "layers" else 1
    return Scheduler([len(group) for group in parallel.groups], in_flight, admit, parallel.cfg, ahead)
