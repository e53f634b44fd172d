"""The simulator's device-queue mode: hosts run ahead of devices, which follow NCCL's rules.

Scripts and scheduler are the product's; a host does what `rank.loop`, `rank.pace` and `transport.channel` do. A device
has a compute stream, and a communicator for each end of an edge. A message's two ends begin together, each when what
was in the communicator is done, and of the compute stream: before a send what was in it when its host put it in the
queue, before a receive the last reader of its buffer. A receive that is posted is a kernel that waits for its sender.
So a host that waits for its whole device, because its allocator gives memory back or a kernel is loaded late, waits
for senders, too.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from cineline.core.costs import Profile
from cineline.core.request import Group, Job
from cineline.core.trace import slice_name
from cineline.errors import Deadlock
from cineline.rank.pace import ITEMS_AHEAD
from cineline.schedule.rule import Rule, Scripts, scripts_of
from cineline.schedule.scheduler import Scheduler
from cineline.schedule.simulator import Deed
from cineline.schedule.wire import Clock
from cineline.schedule.words import SENDS_UNDERWAY, Compute, Do, Edge, Free, Meet, Post, Script, Send, Wait
from cineline.transport.queue import AcceleratorQueue

Syncs = Callable[[int, int], bool]
"""Whether a rank's host waits for its whole device before its deed of that number."""


@dataclass(eq=False)
class Work:
    """What is in a device's queue, or what else a host may wait for.

    Attributes:
        met: what begins together, of so many `parties`: a message's ends, or a collective's.
        behind: what must be done before.
    """

    name: str
    seconds: float = 0.0
    parties: int = 1
    met: list[Work] = field(default_factory=list)
    behind: list[Work] = field(default_factory=list)
    is_done: bool = False
    then: list[Callable[[], None]] = field(default_factory=list)


class Queues(Clock):
    """The devices' queues, and the clock."""

    def put(self, work: Work, *before: Work | None) -> Work:
        """Put it in a queue, behind these."""
        work.behind = [other for other in before if other and not other.is_done]
        for other in work.behind:
            other.then.append(partial(self._begin, work))
        self._begin(work)
        return work

    def _begin(self, work: Work) -> None:
        if work not in work.met and all(other.is_done for other in work.behind):
            work.met.append(work)
            for each in work.met if len(work.met) == work.parties else ():
                self.after(work.seconds, partial(self._end, each))

    def _end(self, work: Work) -> None:
        work.is_done = True
        for happen in work.then:
            happen()


def buffers() -> deque[Work | None]:
    """Of an edge, that nothing has read."""
    return deque([None] * (AcceleratorQueue.looks_ahead + 1))


@dataclass(eq=False)
class Host:
    """A rank's host, and its ends of its device's queues.

    Attributes:
        at: the item. waits_for: what it does; called: where it has nothing to do.
        compute: the stream's end. ends: of an edge, all that were put in its communicator.
        free: of an edge's buffers that are not lent, what was in the compute stream when they were given back.
        said: reports of the item at work. underway: marks behind items, with theirs.
    """

    rank: int
    inbox: deque[Job | Group] = field(default_factory=deque)
    scripts: dict[int, Scripts] = field(default_factory=dict)
    coming: deque[tuple[Group, Script]] = field(default_factory=deque)
    ahead: deque[tuple[Group, Script]] = field(default_factory=deque)
    at: str = "its start"
    called: Work = field(default_factory=lambda: Work("a header"))
    waits_for: Work = field(default_factory=lambda: Work("nothing"))
    compute: Work | None = None
    ends: defaultdict[Edge, list[Work]] = field(default_factory=lambda: defaultdict(list))
    free: defaultdict[Edge, deque[Work | None]] = field(default_factory=lambda: defaultdict(buffers))
    said: list[Deed] = field(default_factory=list)
    underway: deque[tuple[Work, list[Deed]]] = field(default_factory=deque)

    def __str__(self) -> str:
        behind = ", ".join(work.name for work in self.waits_for.behind if not work.is_done)
        return f"rank {self.rank} at {self.at} waits for {self.waits_for.name}" + f" ({behind})" * bool(behind)


class DeviceLine:
    """A line of hosts and devices.

    Args:
        profile, jobs, in_flight: as `simulate`'s.
        launch_s: each rank's host needs for an item, while the device may compute it already.
        syncs: where a host waits for its whole device.
        waits: a host stops at a Wait until the message is here, as the product's does; else only the device does.
        looks_ahead: items whose receives are posted, as the product's on an accelerator; elsewhere it looks further.

    Attributes:
        makespan_s: to the last request's end. stream: what the scheduler emitted. done: what each rank did, in order.
    """

    def __init__(
        self,
        profile: Profile,
        jobs: Sequence[Job],
        in_flight: int | None,
        launch_s: Sequence[float],
        syncs: Syncs = lambda rank, deed: False,
        waits: bool = True,
        looks_ahead: int = AcceleratorQueue.looks_ahead,
    ) -> None:
        self.makespan_s = 0.0
        self.stream: list[Group] = []
        self.done: dict[int, list[Deed]] = {rank: [] for rank in range(profile.parallel.ranks)}
        self._profile, self._launch_s, self._syncs = profile, launch_s, syncs
        self._waits, self._looks_ahead = waits, looks_ahead
        self._jobs = {job.id: job for job in jobs}
        self._unfinished = set(self._jobs)
        self._hosts = [Host(rank) for rank in self.done]
        self._queues = Queues()
        self._met: dict[object, list[Work]] = defaultdict(list)
        self._receives: dict[object, Work] = {}
        self._scheduler = Scheduler(profile.parallel, in_flight, self._tell_all)

    def run(self) -> DeviceLine:
        """Until all is done.

        Raises:
            Deadlock: work is left and nobody can go on: who waits for what.
        """
        for job in self._jobs.values():
            self._scheduler.submit(job)
            self._emit()
        for host in self._hosts:
            self._go_on(host, self._life(host))
        while self._queues.tick():
            pass
        if self._unfinished or any(host.waits_for is not host.called for host in self._hosts):
            raise Deadlock(f"Deadlock after {self._queues.now:.2f} s: {'; '.join(map(str, self._hosts))}.")
        return self

    # The engine, which hears and is heard at once.

    def _tell_all(self, message: Job | Group) -> None:
        for host in self._hosts:
            host.inbox.append(message)
            if not host.called.met:
                self._queues.put(host.called)

    def _emit(self) -> None:
        for group in self._scheduler.pump():
            self.stream.append(group)
            self._tell_all(group)

    def _hear(self, said: Deed) -> None:
        if said.action is Do.BEGUN:
            self._scheduler.begun(said.group)
        elif self._scheduler.complete(said.group, moves=said.action is Do.MOVES):
            self._unfinished.discard(said.group.request)
            self.makespan_s = self._queues.now
        self._emit()

    # Hosts: each waits for what its life yields.

    def _go_on(self, host: Host, life: Iterator[Work]) -> None:
        for host.waits_for in life:
            if not host.waits_for.is_done:
                host.waits_for.then.append(partial(self._queues.after, 0.0, partial(self._go_on, host, life)))
                return

    def _life(self, host: Host) -> Iterator[Work]:
        while True:
            yield from self._look_ahead(host)
            group, script = host.ahead.popleft()
            host.at = slice_name(script.item._replace(request=group.request))
            for action in script.run:
                yield from self._do(host, Deed(group, script, action))
            host.underway.append((self._queues.put(Work("a mark"), host.compute), host.said))
            host.said = []
            while host.underway and (len(host.underway) > ITEMS_AHEAD or host.underway[0][0].is_done):
                yield from self._settle_oldest(host)

    def _settle_oldest(self, host: Host) -> Iterator[Work]:
        mark, said = host.underway.popleft()
        yield mark
        for deed in said:
            self._hear(deed)

    def _look_ahead(self, host: Host) -> Iterator[Work]:
        while len(host.ahead) < self._looks_ahead:
            if host.coming:
                group, script = host.coming.popleft()
                host.ahead.append((group, script))
                for post in script.ahead:
                    yield from self._do(host, Deed(group, script, post))
            elif host.ahead and not host.inbox:
                return
            else:
                yield from self._take_in(host)

    def _take_in(self, host: Host) -> Iterator[Work]:
        while host.underway and not host.inbox:
            yield from self._settle_oldest(host)
        if not host.inbox:
            host.called = Work("a header")
            yield host.called
        message = host.inbox.popleft()
        if isinstance(message, Group):
            due = host.scripts.get(message.request, {}).get(message._replace(request=0), ())
            host.coming.extend((message, script) for script in due)
            return
        parallel, steps = self._profile.parallel, range(message.steps)
        experts = tuple(self._profile.expert(message, step) for step in steps)
        host.scripts[message.id] = scripts_of(Rule(parallel, message.shape, experts, parallel.place(host.rank)))

    def _do(self, host: Host, deed: Deed) -> Iterator[Work]:
        if self._syncs(host.rank, len(self.done[host.rank])):
            ends = [end for ends in host.ends.values() for end in ends]
            yield self._queues.put(Work("its whole device"), host.compute, *ends)
        self.done[host.rank].append(deed)
        match deed.action:
            case Post() | Send() as message:
                self._put(host, message, deed.group.request)
            case Free(edge):
                host.free[edge].append(host.compute)
            case Wait(_, item, value):
                received = self._receives.pop((host.rank, deed.group.request, item, value))
                if self._waits:
                    yield received
                self._compute(host, Work("a receive"), received)
            case Meet(ranks, _, name) as meeting:
                met = self._met[deed.group.request, meeting]
                self._compute(host, Work(f"all ranks' {name}", parties=len(ranks), met=met))
            case Compute():
                place = self._profile.parallel.place(host.rank)
                seconds = self._profile.compute_s(place, deed.script.item, self._jobs[deed.group.request])
                self._compute(host, Work("its computation", seconds))
                yield self._queues.put(Work("its launches", self._launch_s[host.rank]))
            case Do.BEGUN:
                self._hear(deed)
            case Do.DONE | Do.MOVES:
                host.said.append(deed)
            case Do.FORGET:
                del host.scripts[deed.group.request]

    def _compute(self, host: Host, work: Work, *before: Work) -> None:
        host.compute = self._queues.put(work, host.compute, *before)

    def _put(self, host: Host, message: Post | Send, request: int) -> None:
        edge, item, value = message.edge, message.item._replace(request=request), message.value
        ends = host.ends[edge]
        work = Work(f"the {value.value} of {slice_name(item)} over {edge}", parties=2)
        work.seconds = self._profile.transfer_s(value, item, self._jobs[request])
        work.met = self._met[edge, len(ends), item, value]
        ends.append(self._queues.put(work, self._before(host, message), *ends[-1:]))
        if isinstance(message, Post):
            self._receives[host.rank, request, message.item, value] = work
        elif len(ends) > SENDS_UNDERWAY:
            self._compute(host, Work("sends underway"), ends[-1 - SENDS_UNDERWAY])

    @staticmethod
    def _before(host: Host, message: Post | Send) -> Work | None:
        """What a message waits for of the compute stream: a receive for the one that read its buffer before."""
        if isinstance(message, Post) and not message.value.stays and host.free[message.edge]:
            return host.free[message.edge].popleft()
        return host.compute
