"""The engine: starts the ranks, submits requests to the line, hands back handles.

It lives in the caller's process, which never joins `torch.distributed`, so that several engines can live side by side.
A thread takes in what the ranks say (`engine.supervisor`), and two for each rank write and read; none of them keeps the
engine alive.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from cineline.core.config import Compared, DeviceConfig, Dtype, ModelFiles, ParallelConfig, TextEncoder
from cineline.core.family import FamilySpec
from cineline.core.image import KeyFrames, load_image
from cineline.core.lora import LoraMode
from cineline.core.output import check_output
from cineline.core.recovery import Recovery
from cineline.core.request import IMAGES, Job, VideoRequest, videos_of, with_seed
from cineline.core.trace import write_trace
from cineline.engine.about import About
from cineline.engine.blueprint import Blueprint, check_launcher, default_device
from cineline.engine.folder import Kept
from cineline.engine.handle import RequestHandle, Ticket
from cineline.engine.hub import fetch_weights, open_model
from cineline.engine.launch import Launcher
from cineline.engine.line import CLOSED, UNDONE, Line
from cineline.engine.lora import add_loras
from cineline.engine.prompts import PROMPT_CACHE, prompts_in
from cineline.engine.ranks import Ranks, RankState
from cineline.engine.recent import Recent
from cineline.engine.record import Record
from cineline.engine.replica import ALONE, Replica
from cineline.engine.supervisor import serve
from cineline.errors import CinelineError, InvalidConfig, InvalidRequest, check_process, shown

CLOSE_LIMIT_S = 300.0
"""For the items that are under way when an engine is closed."""

IDLE_LIMIT_S = 5.0
"""The same where nothing should be."""

END_LIMIT_S = 30.0
"""For the engine's thread, once all ranks are killed."""


class Engine:
    """A model on its ranks, ready for requests. Use it as a context manager, or call `close`.

    Args:
        model: a folder in diffusers format, a hub id, mini-ti2v, mini-t2v, or another family's spec; None for
            mini-ti2v.
        parallel: how the model is divided; "auto" lets the planner divide it over this machine's devices, for
            requests of the model's default size.
        variant: of the checkpoint's weights, such as fp16, where it has several.
        files: that weights come from instead of the model's folder, or without a model all of them.
        loras: as [NAME=][high:|low:]FILE[@SCALE], in the order in which they are added.
        lora_mode: merge adds them to the weights, for all requests; runtime lets each request name its own.
        device: None takes cuda where there is one.
        dtype: None is float32 on the CPU, bfloat16 elsewhere.
        vae_dtype, text_encoder, pin_cores, allow_untested_device, memory_gb, compare_weights: as `device` and `dtype`,
            see `DeviceConfig`.
        in_flight: requests that denoise at once; None fills the line with one to spare.
        trace: write a Chrome trace there on close, where nothing was left undone; of the ranks' last start.
        live: keep the timeline's last slices while it runs, see `recent`.
        launcher: start the ranks here, be rank 0 of a torchrun world, or place them on a Ray cluster's nodes.
        snapshot_every, snapshot_dir, restarts: what is kept of requests, and how often lost ranks are started anew; see
            `Recovery`.
        prompt_cache: bytes, or as in "256MB", of prompts' embeddings that are kept on the first stage's device (each
            line's, with cfg), so that a prompt which comes again is not encoded again; 0 for none.
        replica: which it is of several engines; see `engine.replicas`.

    Attributes:
        bytes_read: of weights, by rank.
        traffic: after `close`, bytes that each rank sent: over its edges by what was sent, else by axis.

    Raises:
        InvalidConfig, CheckpointError, OutputError: before or while the ranks start; none is left running. Another
            process has the snapshot folder.
        RankFailed: a rank raised or died while it started.
    """

    def __init__(
        self,
        model: str | Path | FamilySpec | None = None,
        parallel: ParallelConfig | Literal["auto"] | None = None,
        *,
        variant: str | None = None,
        files: ModelFiles | None = None,
        loras: Sequence[str | Path] = (),
        lora_mode: LoraMode = "merge",
        device: str | None = None,
        dtype: Dtype | None = None,
        vae_dtype: Dtype = DeviceConfig.vae_dtype,
        text_encoder: TextEncoder = DeviceConfig.text_encoder,
        in_flight: int | None = None,
        trace: str | Path | None = None,
        live: bool = False,
        launcher: Launcher = "local",
        pin_cores: bool = DeviceConfig.pin_cores,
        allow_untested_device: bool = DeviceConfig.allow_untested_device,
        memory_gb: float | None = None,
        compare_weights: Compared = DeviceConfig.compare_weights,
        snapshot_every: int = Recovery.snapshot_every,
        snapshot_dir: str | Path | None = None,
        restarts: int | None = None,
        prompt_cache: int | str = PROMPT_CACHE,
        replica: Replica = ALONE,
    ) -> None:
        check_launcher(launcher)
        recovery = _recovery(snapshot_every, snapshot_dir, restarts, launcher)
        device = device or default_device()
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        given = pin_cores, allow_untested_device, memory_gb, compare_weights
        config = DeviceConfig(device, dtype, vae_dtype, text_encoder, *given)
        self.spec = add_loras(open_model(model, variant, files), loras, lora_mode)
        blueprint = Blueprint.draw(self.spec, parallel, config, in_flight, launcher, replica)
        self._about = About(blueprint)
        prompts = prompts_in(self.spec, dtype, prompt_cache)
        self._trace = None if trace is None else Path(trace)
        if self._trace is not None:
            check_output(self._trace, (".json",))
        self.traffic: dict[int, dict[str, int]] = {}
        self._takes_snapshots = recovery.restarts > 0 or recovery.snapshot_dir is not None
        every = recovery.snapshot_every if self._takes_snapshots else 0
        setup = blueprint.setup(self._trace is not None, live, every)
        fetch_weights(self.spec)
        setup = blueprint.compared(setup)
        self._process = os.getpid()
        self._room = blueprint.room
        self._record = Record(recovery.snapshot_dir, blueprint.run)
        self._ranks = Ranks(blueprint.launch, setup)
        try:
            self.bytes_read = self._ranks.start()
            self._record.started()
            self._line = Line(blueprint, self._ranks, self._record, prompts)
            # None of them knows the engine: when the caller has dropped it, they end the ranks.
            ends = self._line, self._ranks, self._record, recovery.restarts
            self._server = threading.Thread(target=serve, args=ends, name="cineline-engine", daemon=True)
            self._server.start()
            weakref.finalize(self, self._ranks.abandon).atexit = False  # ranks end with the process
        except BaseException:
            self._ranks.end(0.0)
            self._record.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # nobody waits for what is under way
            self.close(IDLE_LIMIT_S if self._line.idle else 0.0)

    def submit(self, request: VideoRequest, outputs: Mapping[str, Path] | None = None) -> RequestHandle:
        """Queue a request; returns at once.

        Args:
            outputs: files that the caller will write, by what they are. The snapshot folder has them for whoever
                resumes, and keeps the request until `RequestHandle.delivered`.

        Raises:
            InvalidRequest: it breaks one of the model's rules, or is too large for the devices' memory.
            EngineClosed, RankFailed: the engine takes no more.
            WrongProcess: this is a child that was forked from the engine's process.
        """
        return self._submit(request, outputs or {})

    def submit_all(self, request: VideoRequest) -> list[RequestHandle]:
        """Queue each of a request's `num_videos`, with seeds from its own on, in that order.

        Raises:
            As `submit`. One that breaks a rule is found before any is queued.
        """
        request = with_seed(request)
        videos = videos_of(request, self.spec.resolve(request, 0).seed)
        for video in videos:  # before any is queued
            self.spec.resolve(video, 0)
        return [self.submit(video) for video in videos]

    def check(self, request: VideoRequest) -> Job:
        """The request as it would run, with nothing left open; nothing is queued.

        Raises:
            InvalidRequest: as `submit`.
        """
        job = self.spec.resolve(request, 0)
        self._room.check(job)
        return job

    @property
    def failure(self) -> CinelineError | None:
        """Why it takes no more requests; None while it does."""
        return self._line.ended

    @property
    def ranks(self) -> list[RankState]:
        """What each rank computes now, and how long it has computed."""
        return self._ranks.states

    @property
    def recent(self) -> Recent:
        """What the ranks have computed lately: the slices of `trace`, told twice a second. Empty without `live`."""
        return self._ranks.recent

    def resume(self, directory: str | Path) -> list[RequestHandle]:
        """Go on with the requests of a snapshot folder that are not done, each from its last snapshot, in the order in
        which they were submitted. The folder is the engine's from now on. What is too large for this engine's devices
        stays there, and its handle raises `InvalidRequest`.

        Raises:
            InvalidConfig: it is of another model, or of other settings that bits depend on; another process or engine
                has it, or this engine has another one.
            OutputError: it cannot be used.
            EngineClosed, RankFailed: the engine takes no more.
            WrongProcess: this is a child that was forked from the engine's process.
        """
        check_process(self._process)
        self._line.check_open()
        if not self._takes_snapshots:
            raise InvalidConfig("An engine with restarts=0 takes no snapshots without a folder: give a snapshot_dir.")
        return [self._resume(kept) for kept in self._record.resume(Path(directory), self.spec)]

    def _resume(self, kept: Kept) -> RequestHandle:
        """Where it is refused, as too large for these devices, others go on, and its entry stays until `delivered`."""
        try:
            return self._submit(kept.request, kept.outputs, kept)
        except InvalidRequest as error:
            ticket = Ticket(self.spec.resolve(kept.request, -1), outputs=kept.outputs)
            ticket.fail(error)
            return RequestHandle(ticket, lambda *_: False, lambda _: self._record.forget(kept.name))

    def _submit(self, request: VideoRequest, outputs: Mapping[str, Path], kept: Kept | None = None) -> RequestHandle:
        check_process(self._process)
        if request.num_videos > 1:
            raise InvalidRequest(
                f"num_videos={shown(request.num_videos)} are as many requests: use Engine.submit_all, which gives a "
                "handle for each."
            )
        request = with_seed(request)
        given = {name: getattr(request, name) for name in IMAGES}
        loaded = {name: load_image(image, name) for name, image in given.items() if image is not None}
        request = request.model_copy(update=loaded)
        image = KeyFrames(loaded["image"], loaded.get("last_image")) if "image" in loaded else None
        ticket = self._line.submit(request, image, outputs, kept)
        describe = self._about.describer(request, ticket.job)
        return RequestHandle(ticket, self._line.cancel, self._record.delivered, self, describe)

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """End the ranks; requests that are not done raise `EngineClosed`.

        In a child that was forked from the engine's process it does nothing.

        Args:
            limit_s: seconds for the items that are under way. Ranks that are through with them hand in timeline and
                traffic; those that are not are killed then, as is a rank that is stopped, at once.
        """
        if os.getpid() != self._process:
            return
        first = self._line.end(CLOSED, UNDONE)
        try:
            if first:
                self._ranks.stop()
            if limit_s > 0:
                self._server.join(min(limit_s, threading.TIMEOUT_MAX))
        finally:
            self._ranks.kill()
            self._server.join(END_LIMIT_S)
            self._record.close()
        timelines = self._ranks.timelines
        if not first or len(timelines) < len(self.bytes_read):
            return
        self.traffic = {rank: dict(timeline.traffic) for rank, timeline in timelines.items()}
        if self._trace is not None:
            write_trace([piece for timeline in timelines.values() for piece in timeline.slices], self._trace)


def _recovery(every: int, folder: str | Path | None, restarts: int | None, launcher: Launcher) -> Recovery:
    """Under torchrun nothing is started anew but by torchrun itself."""
    if launcher == "torchrun" and restarts:
        raise InvalidConfig(
            f"restarts={shown(restarts)} cannot be under torchrun: use torchrun --max-restarts, with a snapshot_dir."
        )
    default = 0 if launcher == "torchrun" else Recovery.restarts
    return Recovery(every, None if folder is None else Path(folder), default if restarts is None else restarts)
