"""Replays the schedule that the engine would run, on given costs (no torch).

The real scheduler decides the order; every rank follows the scripts that the stage loop follows (`schedule.rule`). Time
is simulated: a rank is busy while it computes, an edge while a message travels. A message travels from when it is sent,
its receive is posted and the one before it is through, as with gloo and NCCL. The engine hears and is heard at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cineline.core.config import Place
from cineline.core.costs import Profile as Profile
from cineline.core.request import Group, Job, WorkItem
from cineline.core.trace import Slice, slice_name
from cineline.errors import Deadlock
from cineline.schedule.rule import Rule, Scripts, scripts_of
from cineline.schedule.scheduler import Scheduler
from cineline.schedule.wire import Clock, Wire
from cineline.schedule.words import (
    RECEIVES_AHEAD,
    SENDS_UNDERWAY,
    Action,
    Compute,
    Do,
    Edge,
    Free,
    Keep,
    Meet,
    Message,
    Post,
    Script,
    Send,
    Wait,
)


class Deed(NamedTuple):
    """An action of a script, for a group of the stream."""

    group: Group
    script: Script
    action: Action


@dataclass(frozen=True)
class Simulation:
    """What would happen. Mappings are by rank.

    Attributes:
        makespan_s: from the submit of all jobs to the last one's end.
        busy_s: computing. bubbles: share of the makespan in which the rank does not.
        peak_bytes: the most that is held at once.
        slices: the timeline, in the engine's own form (`trace.write_trace`).
        stream: what the scheduler emitted. done: what each rank did for it, in order.
    """

    makespan_s: float
    busy_s: Mapping[int, float]
    bubbles: Mapping[int, float]
    peak_bytes: Mapping[int, int]
    slices: tuple[Slice, ...]
    stream: tuple[Group, ...]
    done: Mapping[int, Sequence[Deed]]


def simulate(
    profile: Profile, jobs: Sequence[Job], in_flight: int | None, rendezvous: bool = False, prompts: int = 0
) -> Simulation:
    """Run jobs, submitted at once and in this order, through the line.

    Args:
        in_flight: requests that denoise at once; None for the scheduler's default.
        rendezvous: a send holds its rank until the message is through; the strictest that a backend may be.
        prompts: embeddings that each head keeps, of prompts that are alike.

    Raises:
        Deadlock: work is left that nobody can go on with, or two ends of an edge disagree on what is sent.
    """
    return _Line(profile, jobs, in_flight, rendezvous, prompts).run()


@dataclass
class _Rank:
    """A rank at work. `script` is the item it is at, `due` what is left of it; times are those of its slice."""

    number: int
    place: Place
    inbox: deque[Job | Group] = field(default_factory=deque)
    scripts: dict[int, Scripts] = field(default_factory=dict)
    coming: deque[tuple[Group, Script]] = field(default_factory=deque)
    ahead: deque[tuple[Group, Script]] = field(default_factory=deque)
    script: Script | None = None
    due: deque[Deed] = field(default_factory=deque)
    is_at_it: bool = False
    """The first action of `due` was begun before."""
    busy_until: float = 0.0
    asked: float = 0.0
    start: float = 0.0
    busy_s: float = 0.0
    held_bytes: int = 0
    peak_bytes: int = 0
    done: list[Deed] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.script or self.ahead or self.coming or self.inbox)


class _Line:
    def __init__(
        self, profile: Profile, jobs: Sequence[Job], in_flight: int | None, rendezvous: bool, prompts: int
    ) -> None:
        parallel = profile.parallel
        self._profile = profile
        self._jobs = {job.id: job for job in jobs}
        self._unfinished = set(self._jobs)
        self._underway_limit = 0 if rendezvous else SENDS_UNDERWAY
        self._scheduler = Scheduler(parallel, in_flight, self._tell_all, prompts)
        places = [Place(cfg=cfg, pp=stage) for cfg in range(parallel.cfg) for stage in range(parallel.pp)]
        self._ranks = {parallel.rank(place): _Rank(parallel.rank(place), place) for place in places}
        self._clock = Clock()
        self._wires: dict[Edge, Wire] = {}
        self._meetings: Counter[tuple[int, Meet]] = Counter()
        self._awake: deque[_Rank] = deque()
        self._ended_at = 0.0
        self._slices: list[Slice] = []
        self._stream: list[Group] = []

    def run(self) -> Simulation:
        for rank in self._ranks.values():
            rank.held_bytes = self._profile.resident_bytes(rank.place)
            self._weigh(rank)
        for job in self._jobs.values():
            self._scheduler.submit(job)
            self._emit()
        while self._awake or self._clock.tick():
            while self._awake:
                self._wake(self._awake.popleft())
        if self._unfinished or any(rank.has_work for rank in self._ranks.values()):
            raise Deadlock(self._who_waits())
        busy = {number: rank.busy_s for number, rank in self._ranks.items()}
        whole = self._ended_at or 1.0  # where nothing takes any time, all of it is idle
        bubbles = {number: 1 - seconds / whole for number, seconds in busy.items()}
        peaks = {number: rank.peak_bytes for number, rank in self._ranks.items()}
        done = {number: rank.done for number, rank in self._ranks.items()}
        return Simulation(self._ended_at, busy, bubbles, peaks, tuple(self._slices), tuple(self._stream), done)

    # The engine.

    def _tell_all(self, message: Job | Group) -> None:
        for rank in self._ranks.values():
            rank.inbox.append(message)
            self._awake.append(rank)

    def _emit(self) -> None:
        for group in self._scheduler.pump():
            self._stream.append(group)
            self._tell_all(group)

    def _hear(self, group: Group, word: Do) -> None:
        if word is Do.BEGUN:
            self._scheduler.begun(group)
        elif self._scheduler.complete(group, moves=word is Do.MOVES):
            self._unfinished.discard(group.request)
            self._ended_at = self._clock.now
        self._emit()

    # Ranks.

    def _wake(self, rank: _Rank) -> None:
        """Let the rank go on as far as it can."""
        while True:
            if rank.script is None:
                self._look_ahead(rank)
                if not rank.ahead:
                    return
                group, rank.script = rank.ahead.popleft()
                rank.due.extend(Deed(group, rank.script, action) for action in rank.script.run)
                rank.asked = self._clock.now
            while rank.due:
                if not self._act(rank, rank.due[0]):
                    return
                rank.is_at_it = False
                rank.done.append(rank.due.popleft())
            if rank.script.computes:
                item = rank.script.item._replace(request=rank.done[-1].group.request)
                times = (round(seconds * 1e9) for seconds in (rank.start, self._clock.now, rank.start - rank.asked))
                self._slices.append(Slice(rank.number, item, *times))
            rank.script = None

    def _look_ahead(self, rank: _Rank) -> None:
        while len(rank.ahead) < RECEIVES_AHEAD and (rank.coming or rank.inbox):
            if not rank.coming:
                self._take_in(rank, rank.inbox.popleft())
                continue
            group, script = rank.coming.popleft()
            rank.ahead.append((group, script))
            for post in script.ahead:
                rank.done.append(Deed(group, script, post))
                self._act(rank, rank.done[-1])

    def _take_in(self, rank: _Rank, message: Job | Group) -> None:
        if isinstance(message, Group):
            due = rank.scripts.get(message.request, {}).get(message._replace(request=0), ())
            rank.coming.extend((message, script) for script in due)
            return
        experts = tuple(self._profile.expert(message, step) for step in range(message.steps))
        if scripts := scripts_of(Rule(self._profile.parallel, message.shape, experts, rank.place)):
            rank.scripts[message.id] = scripts
            rank.held_bytes += self._profile.admitted_bytes(rank.place, message)
            self._weigh(rank)

    def _weigh(self, rank: _Rank, working: int = 0) -> None:
        rank.peak_bytes = max(rank.peak_bytes, rank.held_bytes + working)

    def _act(self, rank: _Rank, deed: Deed) -> bool:
        """Do it, or begin to; whether the rank can go on to the next."""
        group, script, action = deed
        if isinstance(action, Message):
            return self._deal(rank, action, group.request)
        if isinstance(action, Meet):
            return self._meet(rank, action, group.request)
        job = self._jobs[group.request]
        if action is Do.START:
            rank.start = self._clock.now
            self._weigh(rank, self._profile.working_bytes(rank.place, script.item, job))
        elif isinstance(action, Compute):
            return self._compute(rank, self._profile.compute_s(rank.place, script.item, job))
        elif action is Do.FORGET:
            del rank.scripts[job.id]
            rank.held_bytes -= self._profile.admitted_bytes(rank.place, job)
        elif action in (Do.BEGUN, Do.DONE, Do.MOVES):
            self._hear(group, action)
        return True

    def _compute(self, rank: _Rank, seconds: float) -> bool:
        if not rank.is_at_it:
            rank.is_at_it = True
            rank.busy_s += seconds
            rank.busy_until = self._clock.now + seconds
            self._clock.after(seconds, partial(self._awake.append, rank))
        return self._clock.now >= rank.busy_until

    def _meet(self, rank: _Rank, meeting: Meet, request: int) -> bool:
        if not rank.is_at_it:
            rank.is_at_it = True
            self._meetings[request, meeting] += 1
            if self._meetings[request, meeting] == len(meeting.ranks):
                self._awake.extend(self._ranks[number] for number in meeting.ranks)
        return self._meetings[request, meeting] == len(meeting.ranks)

    def _deal(self, rank: _Rank, message: Message, request: int) -> bool:
        if isinstance(message, Keep | Free):
            return True
        (kind, _, step, branch), wire = message.item, self._wire(message.edge)
        item = WorkItem(kind, request, step, branch)
        if isinstance(message, Wait):
            return wire.take(item, message.value)
        if isinstance(message, Post):
            wire.post(item, message.value)
            return True
        if not rank.is_at_it:
            rank.is_at_it = True
            wire.send(item, message.value, self._profile.transfer_s(message.value, item, self._jobs[request]))
        return wire.underway <= self._underway_limit

    def _wire(self, edge: Edge) -> Wire:
        wire = self._wires.get(edge)
        if wire is None:
            ends = [self._ranks[edge.source], self._ranks[edge.target]]
            wire = self._wires[edge] = Wire(edge, self._clock, partial(self._awake.extend, ends))
        return wire

    def _who_waits(self) -> str:
        waits = [
            f"rank {rank.number} at {_name(rank.due[0], rank.script.item)} waits {_words(rank.due[0])}"
            for rank in self._ranks.values()
            if rank.script
        ]
        who = "; ".join(waits) or "no rank has anything to do"
        left = f"{len(self._unfinished)} of {len(self._jobs)} requests are not done"
        return f"Deadlock after {self._clock.now:.3f} s, {left}: {who}."


def _name(deed: Deed, item: WorkItem) -> str:
    return slice_name(item._replace(request=deed.group.request))


def _words(deed: Deed) -> str:
    action = deed.action
    if isinstance(action, Send):
        return f"to send the {action.value.value} over {action.edge}, where no receive is posted"
    if isinstance(action, Wait):
        return f"for the {action.value.value} of {_name(deed, action.item)} over {action.edge}"
    assert isinstance(action, Meet), "nothing else waits for others"
    return f"for ranks {', '.join(map(str, action.ranks))} to meet for the {action.name}"
