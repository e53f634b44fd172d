"""The stage loop does what the simulator replays: on every rank the same events in the same order."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_channel import LIMIT_S, LocalChannel
from test_line import SplitToyStages, parallels, requests
from toy_family import ToySpec, ToyStages, ToyState

from cineline import ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig, Place
from cineline.core.control import Admit, Begun, Done, Message, Snapshot, Stop
from cineline.core.request import Group, Job, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.rank.loop import StageLoop, _Request, _Turn
from cineline.rank.pulse import Pulse
from cineline.schedule.rule import edges_of
from cineline.schedule.simulator import Deed, Simulation, simulate
from cineline.schedule.words import (
    RECEIVES_AHEAD,
    Action,
    Compute,
    Do,
    Edge,
    Free,
    Post,
    Script,
    Send,
    Value,
    Wait,
    Way,
)
from cineline.transport.channel import Edges, Pending, Receiver, Sender, TensorSpec
from cineline.transport.queue import HostQueue

Event = tuple[Any, ...]

SPEC = ToySpec()


@dataclass(frozen=True)
class Costs:
    """Of the toy: every item takes a while, an odd one longer."""

    parallel: ParallelConfig

    def expert(self, job: Job, step: int) -> int:
        if self.parallel.expert_placement == "shared":
            return 0
        return int(step >= job.seed % (job.steps + 1))

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        return 1.0 + 0.3 * (item.number % 2) + 0.1 * place.pp

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        return 0.2

    def resident_bytes(self, place: Place) -> int:
        return 0

    admitted_bytes = working_bytes = lambda self, *arguments: 0


class Log(list[Event]):
    """What one rank does, in order."""

    def __init__(self) -> None:
        self._posts: dict[Edge, int] = defaultdict(int)

    def post(self, edge: Edge) -> Event:
        """The edge's next receive."""
        self._posts[edge] += 1
        self.append(("post", edge, self._posts[edge]))
        return edge, self._posts[edge]


class LoggedRequests(dict[int, _Request]):
    """A loop's requests, whose end is logged."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __delitem__(self, number: int) -> None:
        self.log.append(("forget", number))
        super().__delitem__(number)


@dataclass
class LoggedPending:
    pending: Pending
    name: Event
    log: Log
    tensors: tuple[torch.Tensor, ...] = ()

    def wait(self) -> tuple[torch.Tensor, ...]:
        self.log.append(("wait", *self.name))
        self.tensors = self.pending.wait()
        return self.tensors

    def release(self) -> None:
        self.log.append(("free", *self.name))
        self.pending.release()


@dataclass
class LoggedEnd:
    """An end of an edge."""

    channel: LocalChannel
    edge: Edge
    log: Log

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        pass

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        return LoggedPending(self.channel.post(specs), self.log.post(self.edge), self.log)

    def settle(self) -> None:
        pass

    def send(self, tensors: Sequence[torch.Tensor], value: Value) -> None:
        self.log.append(("send", self.edge, value))
        self.channel.send(tensors, value)


class LoggedToy(ToyStages):
    """The toy's stages, which log what the loop calls."""

    def __init__(self, log: Log) -> None:
        super().__init__(SPEC)
        self.log = log

    def compute(self, state: ToyState, item: WorkItem, starts: bool, ends: bool) -> None:
        self.log.append(("compute", state.job.id, item, starts, ends))
        super().compute(state, item, starts, ends)

    def finish(self, state: ToyState, item: WorkItem) -> None:
        self.log.append(("finish", state.job.id, item))
        super().finish(state, item)

    def end_denoising(self, state: ToyState) -> None:
        self.log.append(("denoised", state.job.id))
        super().end_denoising(state)


class LoggedSplitToy(LoggedToy, SplitToyStages):
    """With two experts."""


def run_loops(
    found: Simulation, jobs: Sequence[Job], parallel: ParallelConfig, loop_class: type[StageLoop] = StageLoop
) -> list[Log]:
    """Let every rank follow the stream that the simulator's scheduler has emitted."""
    channels = {edge: LocalChannel() for edge in edges_of(parallel)}
    stages_class = LoggedSplitToy if parallel.expert_placement == "split" else LoggedToy
    cut, logs, threads = SPEC.cut(parallel, DeviceConfig()), [], []
    for rank in range(parallel.ranks):
        log, place = Log(), parallel.place(rank)
        incoming: dict[Edge, Receiver] = {}
        outgoing: dict[Edge, Sender] = {}
        for edge, channel in channels.items():
            if edge.target == rank:
                incoming[edge] = LoggedEnd(channel, edge, log)
            elif edge.source == rank:
                outgoing[edge] = LoggedEnd(channel, edge, log)
        family = stages_class(log)
        part = StagePart(place, parallel, cut[place.pp], torch.device("cpu"), DeviceConfig())
        family.load(part)
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        messages: list[Message] = [*map(Admit, jobs), *found.stream, Stop()]
        for message in messages:
            inbox.put(message)
        ends = Edges(incoming, outgoing), HostQueue(), inbox, partial(heard, log=log), unasked, Pulse()
        loop = loop_class(family, part, *ends)
        loop._requests = LoggedRequests(log)
        threads.append(threading.Thread(target=loop.run, daemon=True))
        logs.append(log)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    return logs


def heard(word: Message, log: Log) -> None:
    if isinstance(word, Begun):
        log.append(("begun", word.group))
    elif isinstance(word, Done):
        log.append(("moves" if word.moves else "done", word.group))


def unasked(request: int, make: Callable[[], Snapshot]) -> None:
    raise AssertionError("a snapshot that nobody wants")


def replayed(done: Sequence[Deed]) -> Log:
    """What the simulator did on a rank, as if all headers had been there at once: when they come decides how far it has
    looked ahead, not what it does in an item."""
    runs: dict[tuple[Group, Script], list[Action]] = defaultdict(list)
    for group, script, action in done:
        if action not in script.ahead:
            runs[group, script].append(action)
    log, names = Log(), dict[tuple[int, Value, WorkItem], Event]()

    def replay(number: int, script: Script, action: Action, group: Group) -> None:
        match action:
            case Post():
                names[number, action.value, action.item] = log.post(action.edge)
            case Wait():
                log.append(("wait", *names[number, action.value, action.item]))
            case Free():
                log.append(("free", *names[number, action.value, action.item]))
            case Send():
                log.append(("send", action.edge, action.value))
            case Compute():
                log.append(("compute", number, script.item, action.starts, action.ends))
            case Do.FINISH:
                log.append(("finish", number, script.item))
            case Do.BEGUN | Do.DONE | Do.MOVES:
                log.append((action.name.lower(), group))
            case Do.DENOISED | Do.FORGET:
                log.append((action.name.lower(), number))

    ahead = iter(runs)
    for at, ((group, script), run) in enumerate(runs.items()):
        for later, looked_at in islice(ahead, RECEIVES_AHEAD if at == 0 else 1):
            for post in looked_at.ahead:
                replay(later.request, looked_at, post, later)
        for action in run:
            replay(group.request, script, action, group)
    return log


def is_same(parallel: ParallelConfig, wanted: Sequence[VideoRequest], loop_class: type[StageLoop] = StageLoop) -> bool:
    jobs = [SPEC.resolve(request, number) for number, request in enumerate(wanted)]
    found = simulate(Costs(parallel), jobs, 3)
    logs = run_loops(found, jobs, parallel, loop_class)
    expected = [replayed(found.done[rank]) for rank in range(parallel.ranks)]
    return logs == expected


@settings(max_examples=100, deadline=None)
@given(parallel=parallels, wanted=st.lists(requests, min_size=1, max_size=5))
def test_every_rank_does_what_the_simulator_replays(parallel: ParallelConfig, wanted: list[VideoRequest]) -> None:
    assert is_same(parallel, wanted)


class WaitsFirst(StageLoop):
    """CFG's two lines wait for each other: all receives are waited for before anything is computed."""

    def _act(self, turn: _Turn, action: Action) -> None:
        if action is Do.START:
            for wait in (
                later for later in turn.script.run if isinstance(later, Wait) and later.value is Value.PREDICTION
            ):
                super()._act(turn, wait)
        if not (isinstance(action, Wait) and action.value is Value.PREDICTION):
            super()._act(turn, action)


class FreesLate(StageLoop):
    """No buffer is given back before the request ends."""

    def _act(self, turn: _Turn, action: Action) -> None:
        if not isinstance(action, Free):
            super()._act(turn, action)


class SendsLast(StageLoop):
    """What is made is sent when all else is done."""

    def _act(self, turn: _Turn, action: Action) -> None:
        if not isinstance(action, Send):
            super()._act(turn, action)
        if action is turn.script.run[-1]:
            for send in (earlier for earlier in turn.script.run if isinstance(earlier, Send)):
                super()._act(turn, send)


class PostsLate(StageLoop):
    """Receives are posted only when it is an item's turn."""

    def _post(self, request: _Request, post: Post) -> None:
        if post.edge.way is Way.BACK:
            super()._post(request, post)

    def _execute(self, turn: _Turn) -> None:
        for post in turn.script.ahead:
            super()._post(turn.request, post)
        super()._execute(turn)


class Remembers(StageLoop):
    """A request is never forgotten."""

    def _act(self, turn: _Turn, action: Action) -> None:
        if action is not Do.FORGET:
            super()._act(turn, action)


@pytest.mark.parametrize("mutant", [WaitsFirst, FreesLate, SendsLast, PostsLate, Remembers])
def test_a_loop_that_does_otherwise_is_found(mutant: type[StageLoop]) -> None:
    wanted = [VideoRequest(prompt="a", num_inference_steps=3, guidance_scale=3.0, seed=seed) for seed in range(2)]
    assert is_same(ParallelConfig(pp=2, cfg=2), wanted)
    assert not is_same(ParallelConfig(pp=2, cfg=2), wanted, mutant)
