"""Does a rank's faults on purpose (`core.faults`): a family around its own, there only where faults are planned."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from cineline.core.faults import Fault, Moment
from cineline.core.image import KeyFrames
from cineline.core.request import Job, Kind, WorkItem
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, RequestState, StagePart
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec

log = logging.getLogger(__name__)

EXIT_CODE = 77
"""Of a fault; no other cause has it."""

TOO_MUCH = 1 << 60
"""Bytes that no device has."""

REHEARSAL = -1
"""The request of rehearsals: they would use up the faults of request 0."""


def with_faults(
    family: PipelineParallelMixin[Any],
    faults: Sequence[Fault],
    rank: int = 0,
    start: int = 0,
    connection: Connection | None = None,
) -> PipelineParallelMixin[Any]:
    """The family with the faults of this rank in this start of the ranks; itself where there are none.

    Args:
        connection: to the engine.
    """
    own = [fault for fault in faults if (fault.rank, fault.start) == (rank, start)]
    return _Faulty(family, own, connection) if own else family


class _Faulty(PipelineParallelMixin[RequestState]):
    """What the family does, with faults."""

    def __init__(
        self, family: PipelineParallelMixin[Any], faults: Sequence[Fault], connection: Connection | None
    ) -> None:
        super().__init__(family.spec)
        self._family = family
        self._faults = faults
        self._left = [fault.times for fault in faults]
        self._connection = connection
        self._device = torch.device("cpu")

    def load(self, part: StagePart) -> int:
        self._device = part.device
        self._meet("load")
        return self._family.load(part)

    def admit(self, job: Job, image: KeyFrames | None) -> RequestState:
        self._meet("admit", job)
        state: RequestState = self._family.admit(job, image)
        return state

    def compute(self, state: RequestState, item: WorkItem, starts: bool, ends: bool) -> None:
        self._meet("before", state.job, item)
        self._family.compute(state, item, starts, ends)
        self._meet("after", state.job, item, state, ends)

    def finish(self, state: RequestState, item: WorkItem) -> None:
        self._family.finish(state, item)
        self._meet("finish", state.job, item, state)

    def answer(self, state: RequestState, item: WorkItem) -> torch.Tensor | None:
        self._meet("answer", state.job, item)
        return self._family.answer(state, item)

    def take(self, state: RequestState, value: Value, item: WorkItem, tensors: Hidden) -> None:
        self._meet("take", state.job, item)
        self._family.take(state, value, item, tensors)

    def give(self, state: RequestState, value: Value, item: WorkItem) -> Hidden:
        self._meet("give", state.job, item)
        return self._family.give(state, value, item)

    def rehearsals(self) -> Iterable[tuple[Job, KeyFrames | None]]:
        for job, image in self._family.rehearsals():
            yield replace(job, id=REHEARSAL), image

    # Without faults.

    def specs(self, state: RequestState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        return self._family.specs(state, value, item)

    def end_denoising(self, state: RequestState) -> None:
        self._family.end_denoising(state)

    def expert(self, state: RequestState, step: int) -> int:
        return self._family.expert(state, step)

    def export(self, state: RequestState) -> Mapping[str, Any]:
        return self._family.export(state)

    def restore(self, state: RequestState, exported: Mapping[str, Any]) -> None:
        self._family.restore(state, exported)

    # Faults.

    def _meet(
        self,
        at: Moment,
        job: Job | None = None,
        item: WorkItem | None = None,
        state: RequestState | None = None,
        ends: bool = False,
    ) -> None:
        """A moment: all faults that fit it. With a `state`, in which something has been made."""
        request = None if job is None else job.id
        if request == REHEARSAL:
            return
        for number, fault in enumerate(self._faults):
            if not self._left[number] or not fault.fits(at, request, item):
                continue
            if fault.do in ("nan", "inf"):
                assert state and item
                spoiled = _spoil(state, item, at, ends, float(fault.do))
                if not spoiled:  # frames are bytes: it waits for what can hold one
                    continue
            self._left[number] -= 1
            log.warning("A fault on purpose: %s.", fault)
            self._do(fault)

    def _do(self, fault: Fault) -> None:
        match fault.do:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(EXIT_CODE)
            case "raise":
                raise RuntimeError(f"a fault on purpose ({fault})")
            case "delay":
                time.sleep(fault.seconds or 0.0)
            case "memory":
                torch.empty(TOO_MUCH, dtype=torch.uint8, device=self._device)
            case "hang_up":
                assert self._connection
                # One way alone: a rank whose engine says no more ends itself.
                _shut_down(self._connection.fileno(), socket.SHUT_WR)
            case "cut":
                _cut(None if self._connection is None else self._connection.fileno())


def _spoil(state: RequestState, item: WorkItem, at: Moment, ends: bool, value: float) -> bool:
    """One such value in what the item has made; whether something in it can hold one."""
    if at == "finish":
        assert state.latents is not None
        (state.latents,), spoiled = _with(value, (state.latents,))
    elif item.kind is Kind.ENCODE:
        state.conditioning, spoiled = _with(value, state.conditioning)
    elif item.kind is Kind.DENOISE and ends:
        (state.predictions[item.branch],), spoiled = _with(value, (state.predictions[item.branch],))
    else:
        state.hidden, spoiled = _with(value, state.hidden)
    return spoiled


def _with(value: float, tensors: Hidden) -> tuple[Hidden, bool]:
    """The same with such a value, in a copy: the tensor may be the line's, or others' too."""
    for number, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.numel():
            spoiled = tensor.clone()
            spoiled[(0,) * tensor.dim()] = value
            return (*tensors[:number], spoiled, *tensors[number + 1 :]), True
    return tensors, False


def _cut(spared: int | None) -> None:
    """Shut down this process's TCP connections but that one; edges are among them."""
    for entry in psutil.Process().net_connections("tcp"):
        if entry.status == psutil.CONN_ESTABLISHED and entry.fd != spared:
            with contextlib.suppress(OSError):  # the other end was faster
                _shut_down(entry.fd, socket.SHUT_RDWR)


def _shut_down(descriptor: int, how: int) -> None:
    """By way of another descriptor of the same socket, so that the owner's stays open."""
    with socket.socket(fileno=os.dup(descriptor)) as own:
        own.shutdown(how)
