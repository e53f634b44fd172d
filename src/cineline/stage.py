"""One rank's loop: in the stream's order, receive, compute, send."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cineline.channel import Edges, Pending
from cineline.control import Admit, Begun, Done, Message, Stop
from cineline.models.pipeline_parallel import Hidden, PipelineParallelMixin, StagePart
from cineline.pace import Pace, marker
from cineline.request import Branch, Kind, WorkItem
from cineline.trace import Slice

RECEIVES_AHEAD = 2
"""Receives posted ahead of their use, so that tensors travel while the stage computes."""


class StageLoop:
    """Executes the stream of work items on one stage.

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
        self._edges = edges
        self._inbox = inbox
        self._report = report
        self._record = record
        self._pace = Pace(report, marker(part.device))
        self._states: dict[int, Any] = {}
        self._ahead: deque[tuple[WorkItem, Pending | None]] = deque()
        self._dropped_returns: deque[tuple[int, Pending]] = deque()
        self._returns = 0
        self._stopping = False

    @torch.no_grad()
    def run(self) -> None:
        """Execute items until the engine says stop."""
        while True:
            self._look_ahead()
            if not self._ahead:
                self._pace.settle()
                return
            item, pending = self._ahead.popleft()
            self._execute(item, pending)
            self._pace.end_item()

    def _look_ahead(self) -> None:
        """Take in messages, posting the receive of each item; waits only when there is nothing to do."""
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
            elif isinstance(message, WorkItem):
                self._ahead.append((message, self._post(message)))

    def _admit(self, message: Admit) -> None:
        state = self._states[message.job.id] = self._family.admit(message.job, message.image)
        if self._edges.forward_in is not None:
            self._edges.forward_in.reserve(self._family.hidden_specs(state), RECEIVES_AHEAD + 1)
        if self._edges.return_in is not None:
            self._edges.return_in.reserve([self._family.latents_spec(state)], len(self._states))

    def _post(self, item: WorkItem) -> Pending | None:
        if self._edges.forward_in is None:
            return None
        if item.kind is Kind.ENCODE:
            specs = self._family.conditioning_specs(self._states[item.request])
            return self._edges.forward_in.post(tuple(specs.values()), keep=True) if specs else None
        if item.kind is Kind.DENOISE:
            return self._edges.forward_in.post(self._family.hidden_specs(self._states[item.request]))
        return None

    def _execute(self, item: WorkItem, pending: Pending | None) -> None:
        asked = time.time_ns()
        received = pending.wait() if pending else ()
        self._await_latents(item)
        if item.last and self._part.is_tail and item.kind is not Kind.DROP:
            self._report(Begun(item))
        start = time.time_ns()
        if item.kind is Kind.ENCODE:
            self._encode(item, received)
        elif item.kind is Kind.DENOISE:
            self._denoise(item, received)
            if pending:
                pending.release()
        elif item.kind is Kind.DECODE and self._part.is_tail:
            self._decode(item)
        elif item.kind is Kind.DROP:
            self._drop(item)
        if self._record:
            if self._part.device.type != "cpu":
                torch.accelerator.synchronize()
            self._record(Slice(self._part.stage, item, start, time.time_ns(), start - asked))

    def _encode(self, item: WorkItem, received: Hidden) -> None:
        state = self._states[item.request]
        names = self._family.conditioning_specs(state)
        if self._part.is_head:
            state.conditioning.update(self._family.encode(state))
        else:
            state.conditioning.update(zip(names, received, strict=True))
        if self._edges.forward_out and names:
            self._edges.forward_out.send([state.conditioning[name] for name in names])

    def _denoise(self, item: WorkItem, received: Hidden) -> None:
        state = self._states[item.request]
        step, branch = item.number, item.branch
        hidden = self._family.embed(state, step, branch) if self._part.is_head else received
        hidden = self._family.run_blocks(state, step, branch, hidden)
        if self._edges.forward_out:
            self._edges.forward_out.send(hidden)
        else:
            self._finish(item, state, self._family.predict(state, step, branch, hidden))
        if not item.last:
            return
        if step + 1 < state.job.steps:
            self._post_return(state)
        elif not (self._part.is_tail and state.job.chunks):
            del self._states[item.request]

    def _finish(self, item: WorkItem, state: Any, prediction: torch.Tensor) -> None:
        """Tail: keep the prediction; with the step's last one, guidance, solver and the way back."""
        state.predictions[item.branch] = prediction
        if not item.last:
            return
        latents = self._family.advance(state, item.number)
        state.predictions.clear()
        if item.number + 1 < state.job.steps:
            assert self._edges.return_out is not None
            self._edges.return_out.send([latents])
            self._pace.report(Done(item))
        else:
            self._pace.report(Done(item, self._family.final_latents(state).float().cpu().numpy()))

    def _post_return(self, state: Any) -> None:
        """Head: get ready for the latents of the step just begun. Both ends of the edge follow the
        stream's order, so a receive is posted even where a drop comes before its use."""
        if self._edges.return_in is None:
            return
        if state.returning is not None:
            state.returning.release()  # the step's own latents, embedded by now
        state.returning = self._edges.return_in.post([self._family.latents_spec(state)])
        self._returns += 1
        state.return_number = self._returns

    def _await_latents(self, item: WorkItem) -> None:
        """Head, first branch of a step: wait for the step's latents."""
        first = item.kind is Kind.DENOISE and item.branch is Branch.COND and item.number > 0
        if not (first and self._part.is_head):
            return
        state = self._states[item.request]
        (state.latents,) = state.returning.wait()
        # The edge is in order: what was due before is here too, and nobody wants it any more.
        while self._dropped_returns and self._dropped_returns[0][0] < state.return_number:
            dropped = self._dropped_returns.popleft()[1]
            dropped.wait()
            dropped.release()

    def _decode(self, item: WorkItem) -> None:
        state = self._states[item.request]
        frames: np.ndarray = self._family.decode(state, item.number)
        if item.number + 1 == state.job.chunks:
            del self._states[item.request]
        self._pace.report(Done(item, frames))

    def _drop(self, item: WorkItem) -> None:
        state = self._states.pop(item.request, None)
        if state is not None and state.returning is not None:
            # Its buffer must live until the latents are in it.
            self._dropped_returns.append((state.return_number, state.returning))
