"""The line in one process: stage loops in threads over in-memory channels, and the real scheduler."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from local_channel import LIMIT_S, LocalChannel, RendezvousChannel
from PIL import Image
from toy_family import ToyStages

from cineline import ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig
from cineline.core.control import Admit, Begun, Done, Message, Snapshot, Stop
from cineline.core.family import FamilySpec
from cineline.core.image import KeyFrames
from cineline.core.request import Group, Job
from cineline.families.pipeline_parallel import PipelineParallelMixin, StagePart
from cineline.rank.loop import StageLoop
from cineline.rank.pulse import Pulse
from cineline.schedule.rule import edges_of
from cineline.schedule.scheduler import Scheduler
from cineline.transport.channel import Edges
from cineline.transport.queue import HostQueue


class LocalLine:
    """A model, a toy where nothing is said, on a thread for each rank; with `rendezvous`, no send returns before its
    receive is posted.
    """

    def __init__(
        self,
        spec: FamilySpec,
        parallel: ParallelConfig,
        in_flight: int | None,
        rendezvous: bool = False,
        stages_class: type[PipelineParallelMixin[Any]] = ToyStages,
        snapshot_every: int = 0,
        config: DeviceConfig | None = None,
    ) -> None:
        self.spec = spec
        self.reports: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.emitted: list[Group] = []
        self.taken: list[Snapshot] = []
        self._images: dict[int, KeyFrames] = {}
        self._resumed: Mapping[int, Snapshot] = {}
        config = config or DeviceConfig()
        cut = spec.cut(parallel, config)
        parallel = parallel.filled(cut)
        ranks = range(parallel.ranks)
        self._inboxes: list[queue.SimpleQueue[Message]] = [queue.SimpleQueue() for _ in ranks]
        self.scheduler = Scheduler(parallel, in_flight, self._admit)
        kind = RendezvousChannel if rendezvous else LocalChannel
        channels = {edge: kind() for edge in edges_of(parallel)}
        self.loops = []
        for rank in ranks:
            family, place = stages_class(spec), parallel.place(rank)
            part = StagePart(place, parallel, cut[place.pp], torch.device("cpu"), config)
            family.load(part)
            incoming = {edge: channel for edge, channel in channels.items() if edge.target == rank}
            outgoing = {edge: channel for edge, channel in channels.items() if edge.source == rank}
            edges = Edges(incoming, outgoing)
            ends = edges, HostQueue(), self._inboxes[rank], self.reports.put, self._keep, Pulse()
            self.loops.append(StageLoop(family, part, *ends, snapshot_every=snapshot_every))
        self._threads = [threading.Thread(target=loop.run, daemon=True) for loop in self.loops]
        for thread in self._threads:
            thread.start()

    def snapshots(self, number: int) -> list[Snapshot]:
        """Of a request, by step: with split experts two ranks report, and the later one may come first."""
        return sorted((each for each in self.taken if each.request == number), key=lambda each: each.step)

    def _keep(self, request: int, make: Callable[[], Snapshot]) -> None:
        self.reports.put(make())

    def _admit(self, job: Job) -> None:
        resumed = self._resumed.get(job.id)
        for loop, inbox in zip(self.loops, self._inboxes, strict=True):
            image = self._images.get(job.id) if loop._part.is_head else None
            inbox.put(Admit(job, image, resumed.state if resumed else None))

    def _tell(self, message: Message) -> None:
        for inbox in self._inboxes:
            inbox.put(message)

    def emit(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.emitted.append(group)
            self._tell(group)

    def run(
        self,
        requests: Sequence[VideoRequest],
        cancel_after: Mapping[int, int] | None = None,
        resumed: Mapping[int, Snapshot] | None = None,
    ) -> dict[int, tuple[torch.Tensor, np.ndarray | None]]:
        """Results by number of request. Request n is cancelled after `cancel_after[n]` reports of any kind.
        Those `resumed` go on from their snapshots."""
        cancel_after, self._resumed = cancel_after or {}, resumed or {}
        for number, request in enumerate(requests):
            if isinstance(request.image, Image.Image):
                last = request.last_image
                self._images[number] = KeyFrames(request.image, last if isinstance(last, Image.Image) else None)
            job = self.spec.resolve(request, number)
            if begun := self._resumed.get(number):
                job = replace(job, first_step=begun.step, first_expert=begun.expert)
            self.scheduler.submit(job)
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
            if isinstance(report, Snapshot):
                self.taken.append(report)
            elif isinstance(report, Begun):
                self.scheduler.begun(report.group)
            elif isinstance(report, Done):
                number = report.group.request
                finished = self.scheduler.complete(report.group, report.moves)
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
        while not self.reports.empty():
            if isinstance(report := self.reports.get(), Snapshot):
                self.taken.append(report)
        done = set(range(len(requests))) - cancel_after.keys()
        return {
            number: (latents[number], np.concatenate(frames[number]) if frames[number] else None) for number in done
        }
