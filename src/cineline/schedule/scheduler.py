"""Which work item comes next: the one place that decides the order (no torch).

A request is a row of turns: its prompts through the text encoder, encode and first step, one turn a further step with
those behind it that are skipped, one a decode chunk (the first of these holds as many chunks as there are stages, where
the decoder is cut over them, so that each has one). One that goes on from a snapshot begins at a later step. A turn is
one or more groups of work items, emitted together. The next turn of a request is emitted when the tail begins the last
item of its steps, or of a chunk. Headers thus run one stage's work ahead of the tensors, so that no stage waits for
one; requests take turns in the order in which they come back; and the line never holds two turns of one request while
another could go, which would leave a bubble between the two. Skipped steps, which the line's end alone makes, follow at
once for the same reason: a turn of their own would be a round in which the other stages have nothing of the request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from cineline.core.config import ParallelConfig
from cineline.core.request import Group, Job, Kind
from cineline.schedule.prompts import PromptCache
from cineline.schedule.rule import groups_of

MOST_WAITING = 2
"""Requests that wait for their decode, for each that may be in flight. They hold latents, and nothing else that is
large; with fewer the line would run empty of steps where decoding is slow."""


def default_in_flight(stages: int, branches: int) -> int:
    """Requests that fill a line of `stages`, with one to spare: P/2 + 2 with guidance, P + 1 without."""
    return stages // 2 + 2 if branches == 2 else stages + 1


def usual_in_flight(parallel: ParallelConfig, job: Job) -> int:
    """The default for requests like the job, of all groups of stages together."""
    return sum(_of_group(parallel, job, group) for group in range(len(parallel.groups)))


def _of_group(parallel: ParallelConfig, job: Job, group: int) -> int:
    """The same, of one group of stages. Where some of its steps have one branch, those are to fill it, too."""
    experts = {group} if len(parallel.groups) > 1 else set(job.unguided)
    alone = parallel.cfg == 2 or bool(experts & set(job.unguided))
    return default_in_flight(len(parallel.groups[group]), 1 if alone else job.branches)


def speed_up_limit(stages: int, in_flight: int, branches: int) -> Fraction:
    """Throughput of P equal stages with M requests in flight, against one stage.

    With B branches a step, M B items are in the line at most, and a request's items come back after
    P + B - 1 slots: B M P / max(B M, P + B - 1), so 2 M P / max(2 M, P + 1) with guidance.
    """
    items = branches * in_flight
    return Fraction(items * stages, max(items, stages + branches - 1))


def turns_of(parallel: ParallelConfig, job: Job) -> Iterator[list[Group]]:
    """The job's groups in order, those together that are emitted together."""
    by_kind = {
        kind: list(groups) for kind, groups in groupby(groups_of(parallel, job.shape, job.id), lambda group: group.kind)
    }
    if Kind.TEXT in by_kind:
        yield by_kind[Kind.TEXT]
    first, *steps = by_kind[Kind.DENOISE]
    turn = [*by_kind[Kind.ENCODE], first]
    for step in steps:
        if step.number not in job.skipped:
            yield turn
            turn = []
        turn.append(step)
    yield turn
    chunks = by_kind.get(Kind.DECODE, [])
    ahead = 1 if parallel.decodes_together else len(parallel.decoders)
    if chunks:
        yield chunks[:ahead]
    yield from ([chunk] for chunk in chunks[ahead:])


@dataclass(eq=False)
class _Entry:
    """A request in the line; `group` is the stages' that it is in."""

    job: Job
    turns: deque[list[Group]]
    group: int
    unfinished: int = 0
    steps_done: int = 0
    leaving: bool = False

    def __post_init__(self) -> None:
        self.steps_done = self.job.first_step
        self.unfinished = sum(group.kind is not Kind.ENCODE for turn in self.turns for group in turn)

    @property
    def denoising(self) -> bool:
        """Not all of its steps are done."""
        return self.steps_done < self.job.steps


class Scheduler:
    """Orders the work of all requests, and says which prompts' embeddings are kept (`PromptCache`).

    With split experts a request is in the first group of stages until it moves to the second, and each group has its
    share of the requests in flight, so that new ones come in while others are in the second.

    In flight are those that denoise, and those that are cancelled until the tail has dropped them: whoever submits and
    cancels for ever fills no queue. `MOST_WAITING` times as many may wait for the one that decodes.

    Args:
        parallel: how the line is divided.
        in_flight: requests that may be in flight at once; None for the default of each group of stages.
        admit: called with a job just before its first group of items is emitted.
        prompts: embeddings that each head keeps.
    """

    def __init__(
        self, parallel: ParallelConfig, in_flight: int | None, admit: Callable[[Job], None], prompts: int = 0
    ) -> None:
        self._prompts = PromptCache(prompts, parallel.cfg)
        self._parallel = parallel
        self._stages = [len(group) for group in parallel.groups]
        self._in_flight = in_flight
        self._admit = admit
        self._waiting: deque[Job] = deque()
        self._active: dict[int, _Entry] = {}
        self._ready: deque[_Entry] = deque()
        self._decoder: _Entry | None = None

    def submit(self, job: Job) -> None:
        """Queue a job; `pump` admits it when there is room."""
        self._waiting.append(job)

    def pump(self) -> list[Group]:
        """All groups of items that may be emitted now, in order."""
        emitted = self._pump()
        while more := self._pump():  # who waited for a prompt need not any more
            emitted += more
        return emitted

    def _pump(self) -> list[Group]:
        while self._waiting and self._has_room(self._waiting[0]) and not self._prompts.awaits(self._waiting[0]):
            job = self._prompts.settle(self._waiting.popleft())
            self._admit(job)
            self._active[job.id] = _Entry(job, deque(turns_of(self._parallel, job)), self._first_group(job))
            self._ready.append(self._active[job.id])
        emitted: list[Group] = []
        while (entry := next(filter(self._may_go, self._ready), None)) is not None:
            self._ready.remove(entry)
            turn = entry.turns.popleft()
            emitted.extend(turn)
            if turn[0].kind is Kind.ENCODE:
                self._prompts.encoded(entry.job.id)
            if emitted[-1].kind is Kind.DECODE:
                self._decoder = entry
        return emitted

    def begun(self, group: Group) -> None:
        """Record that the tail has begun the group's last item: the request's next turn may go, unless skipped steps of
        this one are still to be made."""
        entry = self._active.get(group.request)
        if entry is None or (group.kind is Kind.DENOISE and entry.job.shape.goes_on(group.number)):
            return
        if len(entry.turns) > self._ready.count(entry):
            self._ready.append(entry)

    def complete(self, group: Group, moves: bool = False) -> bool:
        """Record that the tail has finished a group of items; true when a request, which was not cancelled, is done.

        Args:
            moves: the request goes on in the next group of stages.
        """
        entry = self._active.get(group.request)
        if entry is None:
            return False
        if group.kind is Kind.DROP:
            self._forget(entry)
            return False
        entry.steps_done += group.kind is Kind.DENOISE
        entry.group += moves
        entry.unfinished -= 1
        if not entry.unfinished:
            self._forget(entry)
        return not entry.unfinished and not entry.leaving

    def cancel(self, request: int) -> Group | None:
        """Stop a request; the drop to emit when it is in the line."""
        self._waiting = deque(job for job in self._waiting if job.id != request)
        entry = self._active.get(request)
        if entry is None or entry.leaving:
            return None
        entry.leaving = True
        self._prompts.forget(request)
        entry.turns.clear()
        self._let_go(entry)
        return Group(Kind.DROP, request)

    def _forget(self, entry: _Entry) -> None:
        del self._active[entry.job.id]
        self._prompts.end(entry.job.id)
        self._let_go(entry)

    def _let_go(self, entry: _Entry) -> None:
        self._ready = deque(other for other in self._ready if other is not entry)
        if self._decoder is entry:
            self._decoder = None

    def _has_room(self, job: Job) -> bool:
        active = self._active.values()
        in_flight = [entry for entry in active if entry.denoising or entry.leaving]
        first = [entry for entry in in_flight if entry.group == 0]
        waiting = [entry for entry in active if entry not in in_flight and entry is not self._decoder]
        if sum(self._share(entry.job) for entry in waiting) >= MOST_WAITING:
            return False
        limits = [(in_flight, self._share)]
        if self._first_group(job) == 0:
            limits.append((first, self._share_of_first_group))
        return all(sum((share(entry.job) for entry in entries), share(job)) <= 1 for entries, share in limits)

    def _first_group(self, job: Job) -> int:
        """Of stages: the one that its first step is in."""
        return min(job.first_expert, len(self._stages) - 1)

    def _share(self, job: Job) -> Fraction:
        return Fraction(1, self._in_flight or usual_in_flight(self._parallel, job))

    def _share_of_first_group(self, job: Job) -> Fraction:
        first = self._stages[0]
        given = self._in_flight and -(-self._in_flight * first // sum(self._stages))
        return Fraction(1, given or _of_group(self._parallel, job, 0))

    def _may_go(self, entry: _Entry) -> bool:
        # One request decodes at a time: a VAE decoder's cache takes gigabytes.
        return entry.turns[0][0].kind is not Kind.DECODE or self._decoder in (None, entry)
