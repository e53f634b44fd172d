"""The line in one process: stage loops in threads over in-memory channels, and the real scheduler."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import numpy as np
import torch
from toy_family import ToySpec, ToyStages

from cineline import ParallelConfig, VideoRequest
from cineline.channel import Edges, LocalChannel, Pending, TensorSpec
from cineline.config import DeviceConfig
from cineline.control import Admit, Begun, Done, Message, Stop
from cineline.models.pipeline_parallel import StagePart
from cineline.request import Job, WorkItem
from cineline.scheduler import Scheduler
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
        return pending

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self._posts.acquire(timeout=LIMIT_S), "deadlock: nobody receives"
        super().send(tensors)


class LocalLine:
    """A toy model on `stages` threads; with `rendezvous`, no send returns before its receive is posted."""

    def __init__(self, spec: ToySpec, stages: int, in_flight: int | None, rendezvous: bool = False) -> None:
        self.spec = spec
        self.reports: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.emitted: list[WorkItem] = []
        self._inboxes: list[queue.SimpleQueue[Message]] = [queue.SimpleQueue() for _ in range(stages)]
        self.scheduler = Scheduler(stages, in_flight, self._admit)
        channel = RendezvousChannel if rendezvous and stages > 1 else LocalChannel
        forward = [channel() for _ in range(stages - 1)]
        back = channel()
        self.loops = []
        for stage, layers in enumerate(ParallelConfig(pp=stages).cut(spec.layers)):
            family = ToyStages(spec)
            part = StagePart(stage, stages, layers, torch.device("cpu"), DeviceConfig())
            family.load(part)
            edges = Edges(
                forward_in=forward[stage - 1] if stage else None,
                forward_out=forward[stage] if stage < stages - 1 else None,
                return_in=back if part.is_head else None,
                return_out=back if part.is_tail else None,
            )
            self.loops.append(StageLoop(family, part, edges, self._inboxes[stage], self.reports.put))
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
                finished = self.scheduler.complete(report.item)
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
