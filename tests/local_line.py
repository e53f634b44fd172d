"""The line in one process: stage loops in threads over in-memory channels, and the real scheduler."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from toy_family import ToySpec, ToyStages

from cineline import ParallelConfig, VideoRequest
from cineline.channel import Edges, LocalChannel, Pending, TensorSpec
from cineline.config import DeviceConfig
from cineline.control import Admit, Begun, Done, Message, Stop
from cineline.mesh import edges_of
from cineline.models.pipeline_parallel import StagePart
from cineline.request import Job, WorkItem
from cineline.scheduler import scheduler_for
from cineline.stage import StageLoop

LIMIT_S = 30.0


class RendezvousChannel(LocalChannel):
    """Sends wait until the other end has posted its receive: the least that any backend does, and so the
    one under which a wrong order of sends and receives is a deadlock."""

    def __init__(self) -> None:
        super().__init__()
        self._posts = threading.Semaphore(0)

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        pending = super().post(specs, keep)
        self._posts.release()
        return OncePending(pending)

    def send(self, tensors: Sequence[torch.Tensor], kind: str | None = None) -> None:
        assert self._posts.acquire(timeout=LIMIT_S), "deadlock: nobody receives"
        super().send(tensors)


class OncePending:
    """As strict as gloo: a second wait for the same receive would hang."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._waited = False

    def wait(self) -> tuple[torch.Tensor, ...]:
        assert not self._waited, "a receive is waited for twice"
        self._waited = True
        return self._pending.wait()

    def release(self) -> None:
        assert self._waited, "a buffer is given back before the message is in it"


class StrictChannel(LocalChannel):
    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        return OncePending(super().post(specs, keep))


class LocalLine:
    """A toy model on a thread for each rank; with `rendezvous`, no send returns before its receive is posted."""

    def __init__(
        self,
        spec: ToySpec,
        parallel: ParallelConfig,
        in_flight: int | None,
        rendezvous: bool = False,
        stages_class: type[ToyStages] = ToyStages,
    ) -> None:
        self.spec = spec
        self.reports: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.emitted: list[WorkItem] = []
        ranks = range(parallel.ranks)
        self._inboxes: list[queue.SimpleQueue[Message]] = [queue.SimpleQueue() for _ in ranks]
        self.scheduler = scheduler_for(parallel, in_flight, self._admit)
        ends: list[dict[str, list[LocalChannel]]] = [defaultdict(list) for _ in ranks]
        for edge in edges_of(parallel):
            channel = RendezvousChannel() if rendezvous and edge.source != edge.target else StrictChannel()
            ends[edge.source][f"{edge.kind}_out"].append(channel)
            ends[edge.target][f"{edge.kind}_in"].append(channel)
        cut = spec.cut(parallel, DeviceConfig())
        self.loops = []
        for rank in ranks:
            family, place = stages_class(spec), parallel.place(rank)
            part = StagePart(place, parallel, cut[place.pp], torch.device("cpu"), DeviceConfig())
            family.load(part)
            several = {name: tuple(ends[rank].pop(name, ())) for name in ("return_out", "handover_out")}
            edges = Edges(**{name: channels[0] for name, channels in ends[rank].items()}, **several)
            self.loops.append(StageLoop(family, part, edges, self._inboxes[rank], self.reports.put))
        self._threads = [threading.Thread(target=loop.run, daemon=True) for loop in self.loops]
        for thread in self._threads:
            thread.start()

    def _admit(self, job: Job) -> None:
        self._tell(Admit(job))

    def _tell(self, message: Message) -> None:
        for inbox in self._inboxes:
            inbox.put(message)

    def emit(self, items: Sequence[WorkItem]) -> None:
        for item in items:
            self.emitted.append(item)
            self._tell(item)

    def run(
        self, requests: Sequence[VideoRequest], cancel_after: dict[int, int]
    ) -> dict[int, tuple[torch.Tensor, np.ndarray | None]]:
        """Results by number of request. Request n is cancelled after `cancel_after[n]` reports of any kind."""
        for number, request in enumerate(requests):
            self.scheduler.submit(self.spec.resolve(request, number))
            self.emit(self.scheduler.pump())
        left = set(range(len(requests)))
        latents: dict[int, torch.Tensor] = {}
        frames: dict[int, list[np.ndarray]] = {number: [] for number in left}
        heard = 0
        while left:
            for number in [number for number in left if cancel_after.get(number, heard + 1) <= heard]:
                drop = self.scheduler.cancel(number)
                self.emit(([drop] if drop else []) + self.scheduler.pump())
                left.discard(number)
            if not left:
                break
            report = self.reports.get(timeout=LIMIT_S)
            heard += 1
            if isinstance(report, Begun):
                self.scheduler.begun(report.item)
            elif isinstance(report, Done):
                number = report.item.request
                finished = self.scheduler.complete(report.item, report.moves)
                if report.result is not None and report.result.dtype == np.uint8:
                    frames[number].append(report.result)
                elif report.result is not None:
                    latents[number] = torch.from_numpy(report.result)
                if finished:
                    left.discard(number)
            self.emit(self.scheduler.pump())
        self._tell(Stop())
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        done = set(range(len(requests))) - cancel_after.keys()
        return {
            number: (latents[number], np.concatenate(frames[number]) if frames[number] else None) for number in done
        }
