"""One rank's loop: in the stream's order, receive, compute, send."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cineline.channel import Edges, Pending, TensorSpec
from cineline.control import Admit, Begun, Done, Message, Stop
from cineline.mail import Letter, Mail
from cineline.models.pipeline_parallel import Hidden, PipelineParallelMixin, StagePart
from cineline.pace import Pace, marker
from cineline.request import Branch, Kind, WorkItem
from cineline.simulation.actions import RECEIVES_AHEAD
from cineline.trace import Slice


@dataclass(frozen=True)
class _Next:
    """An item and the receives that are posted for it: hidden states (or conditioning), the second prediction."""

    item: WorkItem
    hidden: Pending | None = None
    guidance: Pending | None = None


@dataclass
class _Request:
    """A request on this stage.

    Attributes:
        state: the family's.
        routes: for each step the stages that execute it.
        latents, history: the posted receives of the next step's latents (or of those to decode), and of the solver's
            history.
        texts: the posted receives of the prompts' embeddings.
        last_step: this stage's last one, -1 where it has none.
    """

    state: Any
    routes: Sequence[range]
    last_step: int
    latents: Letter | None = None
    history: Letter | None = None
    texts: dict[Branch, Letter] = field(default_factory=dict)

    @property
    def letters(self) -> list[Letter]:
        """All that it waits for."""
        return [letter for letter in (self.latents, self.history, *self.texts.values()) if letter is not None]


class StageLoop:
    """Executes the stream of work items on one stage.

    A step is executed by the stages of its route: all of them, or with split experts those of its expert. The
    route's first stage embeds the latents, its last one steps the solver and returns latents to the first;
    where the next step has another route it hands them over to that one's first, and the history to its last.

    Args:
        family: this stage's part of the model, loaded.
        part: which stage it is.
        edges: its ends of the edges.
        inbox: messages from the engine, in order.
        report: called with what the engine must know.
        record: called with the timeline's slices, or None.
    """

    def __init__(
        self,
        family: PipelineParallelMixin[Any],
        part: StagePart,
        edges: Edges,
        inbox: queue.SimpleQueue[Message],
        report: Callable[[Message], None],
        record: Callable[[Slice], None] | None = None,
    ) -> None:
        self._family = family
        self._part = part
        self._stage = part.place.pp
        self._edges = edges
        self._inbox = inbox
        self._report = report
        self._record = record
        self._pace = Pace(report, marker(part.device))
        self._requests: dict[int, _Request] = {}
        self._ahead: deque[_Next] = deque()
        self._returns = Mail(edges.return_in) if edges.return_in else None
        self._handovers = Mail(edges.handover_in) if edges.handover_in else None
        self._histories = Mail(edges.history_in) if edges.history_in else None
        self._loops = Mail(edges.loop_in) if edges.loop_in else None
        self._stopping = False

    @torch.no_grad()
    def run(self) -> None:
        """Execute items until the engine says stop."""
        while True:
            self._look_ahead()
            if not self._ahead:
                self._pace.settle()
                return
            self._execute(self._ahead.popleft())
            self._pace.end_item()

    def _look_ahead(self) -> None:
        """Take in messages, posting the receives of each item; waits only when there is nothing to do."""
        while len(self._ahead) < RECEIVES_AHEAD and not self._stopping:
            if self._inbox.empty():
                if self._ahead:
                    return
                self._pace.settle()
            message = self._inbox.get()
            if isinstance(message, Stop):
                self._stopping = True
            elif isinstance(message, Admit):
                self._admit(message)
            elif isinstance(message, WorkItem) and message.request in self._requests:
                self._ahead.append(self._post(message))

    def _admit(self, message: Admit) -> None:
        job = message.job
        if not self._part.takes_part(job):
            return
        state = self._family.admit(job, message.image)
        routes = [self._part.route(self._family.expert(state, step)) for step in range(job.steps)]
        last_step = max((step for step, route in enumerate(routes) if self._stage in route), default=-1)
        self._requests[job.id] = _Request(state, routes, last_step)
        ahead, all_of_them = RECEIVES_AHEAD + 1, len(self._requests)
        latents = [self._family.latents_spec(state)]
        if self._edges.forward_in is not None:
            for specs in self._forward_specs(state):
                self._edges.forward_in.reserve(specs, ahead)
        if self._edges.loop_in is not None:
            for spec in [*latents, *([self._family.embedding_spec(state)] if job.texts else [])]:
                self._edges.loop_in.reserve([spec], all_of_them)
        if self._edges.return_in is not None:
            self._edges.return_in.reserve(latents, all_of_them)
        if self._edges.handover_in is not None:
            self._edges.handover_in.reserve(latents, all_of_them)
        if self._edges.history_in is not None:
            self._edges.history_in.reserve(self._family.history_specs(state), all_of_them)
        if self._edges.guidance_in is not None and job.branches == 2:
            self._edges.guidance_in.reserve([self._family.prediction_spec(state)], ahead)

    def _forward_specs(self, state: Any) -> Iterator[tuple[TensorSpec, ...]]:
        """All that a request's items bring over the forward edge, but for the conditioning."""
        yield self._family.hidden_specs(state)
        if state.job.texts and self._part.is_first_lane:
            yield self._family.text_specs(state)
        if self._gets_chunks:
            for chunk in range(min(2, state.job.chunks)):  # the first one is shorter than the others
                yield self._family.decode_specs(state, chunk)

    def _post(self, item: WorkItem) -> _Next:
        request = self._requests[item.request]
        hidden = guidance = None
        if self._edges.forward_in is not None and item.kind is Kind.TEXT and self._part.is_first_lane:
            hidden = self._edges.forward_in.post(self._family.text_specs(request.state))
        elif self._edges.forward_in is not None and item.kind is Kind.DECODE and self._gets_chunks:
            hidden = self._edges.forward_in.post(self._family.decode_specs(request.state, item.number))
        elif item.kind is Kind.ENCODE and self._edges.forward_in is not None:
            specs = self._family.conditioning_specs(request.state)
            hidden = self._edges.forward_in.post(tuple(specs.values()), keep=True) if specs else None
        elif item.kind is Kind.DENOISE and self._stage in request.routes[item.number]:
            route = request.routes[item.number]
            if self._stage > route.start:
                assert self._edges.forward_in is not None
                hidden = self._edges.forward_in.post(self._family.hidden_specs(request.state))
            if (
                self._edges.guidance_in is not None
                and self._stage == route.stop - 1
                and request.state.job.branches == 2
            ):
                guidance = self._edges.guidance_in.post([self._family.prediction_spec(request.state)])
        return _Next(item, hidden, guidance)

    def _execute(self, due: _Next) -> None:
        item = due.item
        asked = time.time_ns()
        received = due.hidden.wait() if due.hidden else ()
        request = self._requests.get(item.request)
        if request is None:  # dropped, or done here, since the item was looked at
            return
        self._await_latents(item, request)
        if item.last and self._answers(item, request):
            self._report(Begun(item))
        start = time.time_ns()
        branch = self._part.branches(request.state.job)[item.branch]
        executed = self._run(item, branch, request, received, due.guidance)
        if due.hidden and item.kind is not Kind.ENCODE:  # the conditioning stays
            due.hidden.release()
        if item.kind is Kind.DENOISE and item.last:
            self._end_step(item, request)
        if self._record and executed:
            if self._part.device.type != "cpu":
                torch.accelerator.synchronize()
            self._record(Slice(self._part.rank, item._replace(branch=branch), start, time.time_ns(), start - asked))

    def _run(
        self, item: WorkItem, branch: Branch, request: _Request, received: Hidden, guidance: Pending | None
    ) -> bool:
        """Execute an item, if it is this rank's at all; whether it was."""
        if item.kind is Kind.TEXT and self._part.is_first_lane:
            self._encode_text(item, branch, request, received)
        elif item.kind is Kind.ENCODE:
            self._encode(request, received)
        elif item.kind is Kind.DENOISE and self._stage in request.routes[item.number]:
            self._denoise(item, branch, request, received, guidance)
        elif item.kind is Kind.DECODE and self._part.decodes:
            self._decode(item, request, received)
        elif item.kind is Kind.DROP:
            self._drop(item)
        else:
            return False
        return True

    def _answers(self, item: WorkItem, request: _Request) -> bool:
        """Whether the engine hears of this item from here: from the last stage that executes it."""
        if item.kind is Kind.DENOISE:
            return self._part.leads and self._stage == request.routes[item.number].stop - 1
        return item.kind in (Kind.TEXT, Kind.DECODE) and self._part.is_tail and self._part.leads

    @property
    def _gets_chunks(self) -> bool:
        return self._part.decodes and self._part.hands_chunks_on

    def _encode_text(self, item: WorkItem, branch: Branch, request: _Request, received: Hidden) -> None:
        """A prompt through this stage's layers; behind the last ones its embedding goes back to the head."""
        made = self._family.encode_text(request.state, branch, received)
        if self._part.is_tail:
            assert self._edges.loop_out is not None
            self._edges.loop_out.send(made, "text")
        else:
            assert self._edges.forward_out is not None
            self._edges.forward_out.send(_apart(made, received), "text")
        if self._loops is not None:
            request.texts[branch] = self._loops.post([self._family.embedding_spec(request.state)])
        if item.last and self._answers(item, request):
            self._pace.report(Done(item))

    def _encode(self, request: _Request, received: Hidden) -> None:
        state = request.state
        for branch, letter in request.texts.items():
            (state.texts[branch],) = letter.wait()
        names = self._family.conditioning_specs(state)
        if self._part.is_head:
            state.conditioning.update(self._family.encode(state))
            state.texts.clear()
        else:
            state.conditioning.update(zip(names, received, strict=True))
        if self._edges.forward_out and names:
            self._edges.forward_out.send([state.conditioning[name] for name in names], "conditioning")
        for letter in request.texts.values():
            letter.release()
        request.texts.clear()

    def _denoise(
        self, item: WorkItem, branch: Branch, request: _Request, received: Hidden, guidance: Pending | None
    ) -> None:
        state, step, route = request.state, item.number, request.routes[item.number]
        hidden = self._family.embed(state, step, branch) if self._stage == route.start else received
        hidden = self._family.run_blocks(state, step, branch, hidden)
        if self._stage < route.stop - 1:
            assert self._edges.forward_out is not None
            self._edges.forward_out.send(hidden)
            return
        state.predictions[branch] = self._family.predict(state, step, branch, hidden)
        if self._edges.guidance_out:
            self._edges.guidance_out.send([state.predictions.pop(branch)])
        elif item.last:
            self._advance(item, request, guidance)

    def _advance(self, item: WorkItem, request: _Request, guidance: Pending | None) -> None:
        """Route's end: a step's predictions are here, or the second one on its way: guidance, solver, the way back."""
        state, step = request.state, item.number
        if request.history:
            self._family.take_history(state, request.history.wait())
            request.history.release()
            request.history = None
        if guidance:
            (state.predictions[Branch.UNCOND],) = guidance.wait()
        latents = self._family.advance(state, step)
        state.predictions.clear()
        if guidance:
            guidance.release()
        goes_on, same_route = self._follows(request, step)
        if goes_on:
            senders = self._edges.return_out if same_route else self._edges.handover_out
            for sender in senders[: state.job.branches]:
                sender.send([latents])
        elif state.job.chunks and self._gets_chunks:
            to_head = self._edges.return_out[0] if request.routes[step].start == 0 else self._edges.loop_out
            assert to_head is not None
            to_head.send([latents])
        if self._history_moves(request, step):
            assert self._edges.history_out is not None
            self._edges.history_out.send([latents, *self._family.history(state)])
        if self._part.leads:
            result = None if goes_on else self._family.final_latents(state).float().cpu().numpy()
            self._pace.report(Done(item, result, moves=goes_on and not same_route))

    def _follows(self, request: _Request, step: int) -> tuple[bool, bool]:
        """Whether a step comes after this one, and whether it has the same route."""
        goes_on = step + 1 < len(request.routes)
        return goes_on, goes_on and request.routes[step + 1] == request.routes[step]

    def _history_moves(self, request: _Request, step: int) -> bool:
        """Whether latents and history go to another route's end: the next step's, or the one that decodes."""
        goes_on, same_route = self._follows(request, step)
        end = request.routes[step].stop
        decodes_elsewhere = request.state.job.chunks > 0 and self._part.leads and not self._part.hands_chunks_on
        return end != self._part.parallel.pp and not same_route and (goes_on or decodes_elsewhere)

    def _end_step(self, item: WorkItem, request: _Request) -> None:
        """After a step's last item, on every stage: get ready for what comes back, or forget the request."""
        state, step = request.state, item.number
        goes_on, same_route = self._follows(request, step)
        if request.latents and self._stage == request.routes[step].start:
            request.latents.release()  # the step's own latents, embedded by now
            request.latents = None
        if goes_on and self._stage == request.routes[step + 1].start:
            mail = self._returns if same_route else self._handovers
            assert mail is not None
            request.latents = mail.post([self._family.latents_spec(state)])
        if not goes_on and state.job.chunks and self._gets_chunks and self._part.is_head:
            mail = self._returns if request.routes[step].start == 0 else self._loops
            assert mail is not None
            request.latents = mail.post([self._family.latents_spec(state)])
        if self._histories and self._history_moves(request, step):
            request.history = self._histories.post(self._family.history_specs(state))
        if step >= request.last_step and not (self._part.decodes and state.job.chunks):
            del self._requests[item.request]
        elif not goes_on:
            self._family.end_denoising(state)

    def _await_latents(self, item: WorkItem, request: _Request) -> None:
        """Before the first item that needs them: the latents of a step, on its route's first stage, or of a decode."""
        if request.latents is None or request.latents.is_here:
            return
        starts_step = item.kind is Kind.DENOISE and self._stage == request.routes[item.number].start
        if starts_step or item.kind is Kind.DECODE:
            (request.state.latents,) = request.latents.wait()

    def _decode(self, item: WorkItem, request: _Request, received: Hidden) -> None:
        state = request.state
        if request.history:
            self._family.take_history(state, request.history.wait())
            request.history.release()
            request.history = None
        made = self._family.decode(state, item.number, received)
        if self._part.is_tail:
            frames = _apart(made, received)[0]
            self._pace.report(Done(item, frames.cpu().numpy()))
        elif self._gets_chunks:
            assert self._edges.forward_out is not None
            self._edges.forward_out.send(_apart(made, received), "decode")
        if item.number + 1 == state.job.chunks:
            if request.latents:
                request.latents.release()
            del self._requests[item.request]

    def _drop(self, item: WorkItem) -> None:
        for letter in self._requests.pop(item.request).letters:
            letter.drop()


def _apart(made: Hidden, received: Hidden) -> Hidden:
    """What a stage sends on, copied where it is what it was given: that buffer will be used again."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in received}
    return tuple(tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor for tensor in made)
