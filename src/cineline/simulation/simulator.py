"""Replays the schedule that the engine would run, on given costs (no torch).

The real scheduler decides the order; every rank follows its scripts (`script.Part`). Time is simulated: a rank is
busy while it computes, an edge while a message travels. A message travels from when it is sent, its receive is
posted and the one before it is through, as with gloo and NCCL. The engine hears and is heard at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from cineline.config import Place
from cineline.errors import Deadlock
from cineline.request import Job, WorkItem
from cineline.scheduler import scheduler_for
from cineline.simulation.actions import (
    RECEIVES_AHEAD,
    SENDS_UNDERWAY,
    Action,
    Do,
    Edge,
    Meet,
    Message,
    Post,
    Script,
    Send,
    Wait,
)
from cineline.simulation.profile import Profile as Profile
from cineline.simulation.script import Part
from cineline.simulation.wire import Clock, Wire
from cineline.trace import Slice, slice_name


@dataclass(frozen=True)
class Simulation:
    """What would happen. Mappings are by rank.

    Attributes:
        makespan_s: from the submit of all jobs to the last one's end.
        busy_s: computing. bubbles: share of the makespan in which the rank does not.
        peak_bytes: the most that is held at once.
        slices: the timeline, in the engine's own form (`trace.write_trace`).
    """

    makespan_s: float
    busy_s: Mapping[int, float]
    bubbles: Mapping[int, float]
    peak_bytes: Mapping[int, int]
    slices: tuple[Slice, ...]


def simulate(profile: Profile, jobs: Sequence[Job], in_flight: int | None, rendezvous: bool = False) -> Simulation:
    """Run jobs, submitted at once and in this order, through the line.

    Args:
        in_flight: requests that denoise at once; None for the scheduler's default.
        rendezvous: a send holds its rank until the message is through; the strictest that a backend may be.

    Raises:
        Deadlock: work is left that nobody can go on with, or two ends of an edge disagree on what is sent.
    """
    return _Line(profile, jobs, in_flight, rendezvous).run()


@dataclass
class _Rank:
    """A rank at work. `script` is the item it is at, `due` what is left of it; times are those of its slice."""

    number: int
    place: Place
    inbox: deque[Job | WorkItem] = field(default_factory=deque)
    parts: dict[int, Part] = field(default_factory=dict)
    ahead: deque[Script] = field(default_factory=deque)
    script: Script | None = None
    due: deque[Action] = field(default_factory=deque)
    is_at_it: bool = False
    """The first action of `due` was begun before."""
    busy_until: float = 0.0
    asked: float = 0.0
    start: float = 0.0
    busy_s: float = 0.0
    peak_bytes: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.script or self.ahead or self.inbox)


class _Line:
    def __init__(self, profile: Profile, jobs: Sequence[Job], in_flight: int | None, rendezvous: bool) -> None:
        parallel = profile.parallel
        self._profile = profile
        self._jobs = {job.id: job for job in jobs}
        self._unfinished = set(self._jobs)
        self._underway_limit = 0 if rendezvous else SENDS_UNDERWAY
        self._scheduler = scheduler_for(parallel, in_flight, self._tell_all)
        places = [Place(cfg=cfg, pp=stage) for cfg in range(parallel.cfg) for stage in range(parallel.pp)]
        self._ranks = {parallel.rank(place): _Rank(parallel.rank(place), place) for place in places}
        self._clock = Clock()
        self._wires: dict[Edge, Wire] = {}
        self._meetings: Counter[Meet] = Counter()
        self._awake: deque[_Rank] = deque()
        self._ended_at = 0.0
        self._slices: list[Slice] = []

    def run(self) -> Simulation:
        for rank in self._ranks.values():
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
        return Simulation(self._ended_at, busy, bubbles, peaks, tuple(self._slices))

    # The engine.

    def _tell_all(self, message: Job | WorkItem) -> None:
        for rank in self._ranks.values():
            rank.inbox.append(message)
            self._awake.append(rank)

    def _emit(self) -> None:
        for item in self._scheduler.pump():
            self._tell_all(item)

    def _hear(self, item: WorkItem, word: Do) -> None:
        if word is Do.BEGUN:
            self._scheduler.begun(item)
        elif self._scheduler.complete(item, moves=word is Do.MOVES):
            self._unfinished.discard(item.request)
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
                rank.script = rank.ahead.popleft()
                rank.due.extend(rank.script.run)
                rank.asked = self._clock.now
            while rank.due:
                if not self._act(rank, rank.script, rank.due[0]):
                    return
                rank.is_at_it = False
                rank.due.popleft()
            if rank.script.executed:
                times = (round(seconds * 1e9) for seconds in (rank.start, self._clock.now, rank.start - rank.asked))
                self._slices.append(Slice(rank.number, rank.script.item, *times))
            rank.script = None

    def _look_ahead(self, rank: _Rank) -> None:
        while rank.inbox and len(rank.ahead) < RECEIVES_AHEAD:
            message = rank.inbox.popleft()
            if isinstance(message, Job):
                self._admit(rank, message)
            elif message.request in rank.parts and (script := rank.parts[message.request].script(message)):
                rank.ahead.append(script)
                for post in script.ahead:
                    self._act(rank, script, post)

    def _admit(self, rank: _Rank, job: Job) -> None:
        experts = [self._profile.expert(job, step) for step in range(job.steps)]
        part = Part(self._profile.parallel, rank.place, job, experts)
        if part.takes_part:
            rank.parts[job.id] = part
            self._weigh(rank)

    def _weigh(self, rank: _Rank, working: int = 0) -> None:
        admitted = sum(self._profile.admitted_bytes(rank.place, part.job) for part in rank.parts.values())
        rank.peak_bytes = max(rank.peak_bytes, self._profile.resident_bytes(rank.place) + admitted + working)

    def _act(self, rank: _Rank, script: Script, action: Action) -> bool:
        """Do it, or begin to; whether the rank can go on to the next."""
        if isinstance(action, Message):
            return self._deal(rank, action)
        if isinstance(action, Meet):
            return self._meet(rank, action)
        job = self._jobs[script.item.request]
        if action is Do.START:
            rank.start = self._clock.now
            self._weigh(rank, self._profile.working_bytes(rank.place, script.item, job))
        elif action is Do.COMPUTE:
            return self._compute(rank, self._profile.compute_s(rank.place, script.item, job))
        elif action is Do.FORGET:
            del rank.parts[job.id]
        else:
            self._hear(script.item, action)
        return True

    def _compute(self, rank: _Rank, seconds: float) -> bool:
        if not rank.is_at_it:
            rank.is_at_it = True
            rank.busy_s += seconds
            rank.busy_until = self._clock.now + seconds
            self._clock.after(seconds, partial(self._awake.append, rank))
        return self._clock.now >= rank.busy_until

    def _meet(self, rank: _Rank, meeting: Meet) -> bool:
        if not rank.is_at_it:
            rank.is_at_it = True
            self._meetings[meeting] += 1
            if self._meetings[meeting] == len(meeting.ranks):
                self._awake.extend(self._ranks[number] for number in meeting.ranks)
        return self._meetings[meeting] == len(meeting.ranks)

    def _deal(self, rank: _Rank, message: Message) -> bool:
        wire = self._wire(message.edge)
        if isinstance(message, Wait):
            return wire.take(message.item)
        if isinstance(message, Post):
            wire.post(message.item)
        elif not rank.is_at_it:
            rank.is_at_it = True
            job = self._jobs[message.item.request]
            wire.send(message.item, self._profile.transfer_s(message.edge.kind, message.item, job))
        return isinstance(message, Post) or wire.underway <= self._underway_limit

    def _wire(self, edge: Edge) -> Wire:
        if edge not in self._wires:
            ends = [self._ranks[edge.source], self._ranks[edge.target]]
            self._wires[edge] = Wire(edge, self._clock, partial(self._awake.extend, ends))
        return self._wires[edge]

    def _who_waits(self) -> str:
        waits = [
            f"rank {rank.number} at {slice_name(rank.script.item)} waits {_words(rank.due[0])}"
            for rank in self._ranks.values()
            if rank.script
        ]
        who = "; ".join(waits) or "no rank has anything to do"
        left = f"{len(self._unfinished)} of {len(self._jobs)} requests are not done"
        return f"Deadlock after {self._clock.now:.3f} s, {left}: {who}."


def _words(action: Action) -> str:
    if isinstance(action, Send):
        return f"to send over {action.edge}, where no receive is posted"
    if isinstance(action, Wait):
        return f"for what {slice_name(action.item)} sends over {action.edge}"
    assert isinstance(action, Meet), "nothing else waits for others"
    return f"for ranks {', '.join(map(str, action.ranks))} to meet for the {action.name}"
