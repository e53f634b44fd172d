"""One rank's loop: in the stream's order it does what the scripts say."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from cineline.core.control import Admit, Begun, Done, KeepSnapshot, Message, Say, Spoiled, Stop
from cineline.core.request import Group, Kind, WorkItem
from cineline.core.trace import Slice
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, StagePart
from cineline.rank.guard import Guard
from cineline.rank.pace import Pace
from cineline.rank.pulse import Pulse
from cineline.rank.snapshots import Snapshots
from cineline.schedule.rule import Rule, Scripts, drop_of, scripts_of
from cineline.schedule.words import (
    Action,
    Compute,
    Do,
    Free,
    Keep,
    Meet,
    Post,
    Script,
    Send,
    Value,
    Wait,
    Way,
)
from cineline.transport.channel import Edges, Pending
from cineline.transport.queue import DeviceQueue, TimedMark


@dataclass
class _Request:
    """A request on this rank.

    Attributes:
        state: the family's. scripts: what the rank does for it. drop: and where it is cancelled.
        guard: of what it makes.
        coming: receives that are posted, or whose buffers are in use, by what it is and who makes it.
    """

    state: Any
    scripts: Scripts
    drop: Script
    guard: Guard
    coming: dict[tuple[Value, WorkItem], Pending] = field(default_factory=dict)


class _Turn(NamedTuple):
    """An item of the stream, of which this rank has something to do."""

    request: _Request
    group: Group
    script: Script


class StageLoop:
    """Executes the stream of work items on one rank.

    Args:
        family: this rank's part of the model, loaded.
        part: which rank it is.
        edges: its ends of the edges. device: its device's queue.
        inbox: messages from the engine, in order.
        report: called with what the engine must know. keep: with snapshots.
        pulse: told what is computed.
        record: called with the timeline's slices, or None.
        snapshot_every: solver steps from one snapshot to the next; 0 for none.
    """

    def __init__(
        self,
        family: PipelineParallelMixin[Any],
        part: StagePart,
        edges: Edges,
        device: DeviceQueue,
        inbox: queue.SimpleQueue[Message],
        report: Say,
        keep: KeepSnapshot,
        pulse: Pulse,
        record: Callable[[Slice], None] | None = None,
        snapshot_every: int = 0,
    ) -> None:
        self._family = family
        self._part = part
        self._inbox = inbox
        self._report = report
        self._pulse = pulse
        self._record = record
        self._edges = edges
        self._device = device
        self._pace = Pace(device)
        self._snapshots = Snapshots(family, snapshot_every, device, self._pace, keep)
        self._requests: dict[int, _Request] = {}
        self._coming: deque[_Turn] = deque()
        self._ahead: deque[_Turn] = deque()
        self._stopping = False

    @torch.no_grad()
    def run(self) -> None:
        """Execute items until the engine says stop."""
        while self._look_ahead():
            turn = self._ahead.popleft()
            self._pulse.turns(turn.group.request)
            self._execute(turn)
            self._pulse.rests()
            self._pace.end_item()
        self._pace.settle()

    def _look_ahead(self) -> bool:
        """Post the receives of the next items; waits only when there is nothing to do, false when there never will."""
        while len(self._ahead) < self._device.looks_ahead:
            if self._coming:
                turn = self._coming.popleft()
                self._ahead.append(turn)
                for post in turn.script.ahead:
                    self._post(turn.request, post)
            elif self._stopping or (self._ahead and self._inbox.empty()):
                break
            else:
                self._take_in()
        return bool(self._ahead)

    def _take_in(self) -> None:
        """The engine's next message."""
        if self._inbox.empty():
            self._pace.settle()
        message = self._inbox.get()
        if isinstance(message, Stop):
            self._stopping = True
        elif isinstance(message, Admit):
            self._pulse.turns(message.job.id)
            self._admit(message)
            self._pulse.rests()
        elif isinstance(message, Group) and (request := self._requests.get(message.request)):
            dropped = message.kind is Kind.DROP
            scripts = (request.drop,) if dropped else request.scripts.get(message._replace(request=0), ())
            self._coming.extend(_Turn(request, message, script) for script in scripts)

    def _admit(self, message: Admit) -> None:
        job, place = message.job, self._part.place
        if place.cfg >= job.branches:  # without guidance there is nothing for the second line
            return
        state = self._family.admit(job, message.image)
        experts = tuple(self._family.expert(state, step) for step in range(job.steps))
        rule = Rule(self._part.parallel, state.job.shape, experts, place)
        assert (message.resume is None) == (job.first_step == 0), "a snapshot and where it begins go together"
        if message.resume is not None and self._part.rank in rule.chain(Group(Kind.DENOISE, job.id, job.first_step)):
            self._snapshots.restore(state, message.resume)
        scripts = scripts_of(rule)
        guard = Guard(self._device, self._pace, partial(self._spoiled, job.id))
        self._requests[job.id] = _Request(state, scripts, drop_of(rule), guard)
        actions = [action for own in scripts.values() for script in own for action in (*script.ahead, *script.run)]
        posts = [action for action in actions if isinstance(action, Post) and not action.value.stays]
        messages = {(post.edge, self._family.specs(state, post.value, post.item)) for post in posts}
        for edge, specs in sorted(messages, key=lambda message: -sum(spec.nbytes for spec in message[1])):
            count = self._device.looks_ahead + 1 if edge.way is Way.AHEAD else len(self._requests)
            self._edges.incoming[edge].reserve(specs, count)

    def _execute(self, turn: _Turn) -> None:
        if turn.group.request not in self._requests:  # a drop of what has ended since it was looked at
            return
        if not self._record or not turn.script.computes:
            for action in turn.script.run:
                self._act(turn, action)
            turn.request.guard.settle(turn.script.item)
            return
        asked = start = self._device.timed_mark()
        for action in turn.script.run:
            if action is Do.START:
                start = self._device.timed_mark()
            self._act(turn, action)
        turn.request.guard.settle(turn.script.item)
        item = turn.script.item._replace(request=turn.group.request)
        self._pace.after(partial(self._note, item, asked, start, self._device.timed_mark()))

    def _note(self, item: WorkItem, asked: TimedMark, start: TimedMark, end: TimedMark) -> None:
        """A slice of the timeline, once the device has got to its end."""
        assert self._record is not None
        times = start.time_ns(), end.time_ns(), start.time_ns() - asked.time_ns()
        self._record(Slice(self._part.rank, item, *times))

    def _act(self, turn: _Turn, action: Action) -> None:
        request, group, item = turn.request, turn.group, turn.script.item
        family, state = self._family, request.state
        match action:
            case Post():
                self._post(request, action)
            case Wait():
                if pending := self._pending(request, action):
                    tensors = pending.wait()
                    family.take(state, action.value, action.item, tensors)
                    request.guard.came((state.latents,) if action.value is Value.HISTORY else tensors)
                    if action.value.stays:
                        del request.coming[action.value, action.item]
            case Send():
                self._pulse.ends()  # from here on it may wait for others
                made = family.give(state, action.value, action.item)
                assert made or action.value.stays, f"there is nothing to send for {action}"
                if made:
                    self._edges.outgoing[action.edge].send(_apart(made, request), action.value)
            case Keep():
                family.take(state, action.value, action.item, family.give(state, action.value, action.item))
            case Free():
                request.coming.pop((action.value, action.item)).release()
            case Compute():
                family.compute(state, item, action.starts, action.ends)
                request.guard.made(state.made(item, action.ends))
            case Do.FINISH:
                family.finish(state, item)
                request.guard.made((state.latents,))
            case Do.BEGUN:
                self._report(Begun(group))
            case Do.DONE | Do.MOVES:
                request.guard.settle(item)
                self._snapshots.take(state, group, request.guard)
                answer = self._answer(request, item)
                self._pace.after(partial(self._tell, request, group, answer, moves=action is Do.MOVES))
            case Do.DENOISED:
                family.end_denoising(state)
            case Do.FORGET:
                del self._requests[group.request]
                for pending in request.coming.values():
                    pending.release()
            case Do.START:
                self._pulse.starts(item._replace(request=group.request), state.job)
            case Meet():
                pass  # ranks meet inside what the family computes

    def _post(self, request: _Request, post: Post) -> None:
        if specs := self._family.specs(request.state, post.value, post.item):
            pending = self._edges.incoming[post.edge].post(specs, keep=post.value.stays)
            request.coming[post.value, post.item] = pending

    def _pending(self, request: _Request, wait: Wait) -> Pending | None:
        """The receive; None where there is nothing in it, which a request's conditioning may be."""
        pending = request.coming.get((wait.value, wait.item))
        assert pending or wait.value.stays, f"no receive is posted for {wait}"
        return pending

    def _answer(self, request: _Request, item: WorkItem) -> torch.Tensor | None:
        """On its way to the host."""
        tensor = None if item.kind is Kind.DROP else self._family.answer(request.state, item)
        return None if tensor is None else self._device.to_host(*_apart((tensor,), request))

    def _spoiled(self, request: int, item: WorkItem) -> None:
        self._report(Spoiled(item._replace(request=request), self._part.place.pp))

    def _tell(self, request: _Request, group: Group, answer: torch.Tensor | None, moves: bool) -> None:
        spoiled = request.guard.spoiled
        self._report(Done(group, None if answer is None or spoiled else answer.numpy(), moves, spoiled))


def _apart(made: Hidden, request: _Request) -> Hidden:
    """What goes out, copied where it is what came in: that buffer will be used again."""
    taken = {tensor.untyped_storage().data_ptr() for pending in request.coming.values() for tensor in pending.tensors}
    return tuple(tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor for tensor in made)
