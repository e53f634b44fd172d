"""The engine: starts the ranks, submits requests to the line, hands back handles.

It lives in the caller's process, which never joins `torch.distributed`, so that several engines can live side by side.
A thread takes in what the ranks say, and two for each rank write and read; none of them keeps the engine alive.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from cineline.core.config import DEVICES, DeviceConfig, Dtype, ModelFiles, ParallelConfig, TextEncoder, asked_threads
from cineline.core.control import Setup
from cineline.core.family import FamilySpec
from cineline.core.faults import planned
from cineline.core.image import load_image
from cineline.core.lora import LoraMode
from cineline.core.output import check_output
from cineline.core.request import VideoRequest
from cineline.core.trace import write_trace
from cineline.engine.auto import divide
from cineline.engine.handle import RequestHandle
from cineline.engine.hub import fetch_weights, open_model
from cineline.engine.launch import Launcher, check_launch, launch_local, launch_torchrun
from cineline.engine.line import CLOSED, UNDONE, Line
from cineline.engine.lora import add_loras
from cineline.engine.ranks import START_LIMIT_S, Ranks
from cineline.engine.room import Room, memory_of
from cineline.engine.torchrun import need_torchrun, torchrun_world
from cineline.errors import InvalidConfig, RankFailed, check_process, shown

log = logging.getLogger(__name__)

NOT_EXACT = {
    "rows": "are close to the exact ones (most values equal, others a grey level off), not equal.",
    "tiled": "differ from the exact ones, most of all where tiles meet.",
}
"""What is said of the ways to decode that are not exact."""


CLOSE_LIMIT_S = 300.0
"""For the items that are under way when an engine is closed."""

IDLE_LIMIT_S = 5.0
"""The same where nothing should be."""

LEAVE_LIMIT_S = 2.0
"""For ranks that are through, to end when they are let go."""

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
        vae_dtype, text_encoder, pin_cores, allow_untested_device, memory_gb: as `device` and `dtype`, see
            `DeviceConfig`.
        in_flight: requests that denoise at once; None fills the line with one to spare.
        trace: write a Chrome trace there on close, where nothing was left undone.
        launcher: start the ranks here, or be rank 0 of a torchrun world.

    Attributes:
        bytes_read: of weights, by rank.
        traffic: after `close`, bytes that each rank sent: over its edges by what was sent, else by axis.

    Raises:
        InvalidConfig, CheckpointError, OutputError: before or while the ranks start; none is left running.
        RankFailed: a rank raised or died while it started.
    """

    def __init__(
        self,
        model: str | Path | FamilySpec | None = None,
        parallel: ParallelConfig | Literal["auto"] | None = None,
        *,
        variant: str | None = None,
        files: ModelFiles | None = None,
        loras: Sequence[str] = (),
        lora_mode: LoraMode = "merge",
        device: str | None = None,
        dtype: Dtype | None = None,
        vae_dtype: Dtype = DeviceConfig.vae_dtype,
        text_encoder: TextEncoder = DeviceConfig.text_encoder,
        in_flight: int | None = None,
        trace: str | Path | None = None,
        launcher: Launcher = "local",
        pin_cores: bool = DeviceConfig.pin_cores,
        allow_untested_device: bool = DeviceConfig.allow_untested_device,
        memory_gb: float | None = None,
    ) -> None:
        device = device or default_device()
        if in_flight is not None and (type(in_flight) is not int or in_flight < 1):
            raise InvalidConfig(f"in_flight={shown(in_flight)} is no whole number from 1 on: give 1 or more.")
        if launcher not in get_args(Launcher):
            raise InvalidConfig(f"launcher={shown(launcher)} is not known: use {' or '.join(get_args(Launcher))}.")
        if launcher == "torchrun":
            need_torchrun()
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        config = DeviceConfig(device, dtype, vae_dtype, text_encoder, pin_cores, allow_untested_device, memory_gb)
        self.spec = add_loras(open_model(model, variant, files), loras, lora_mode)
        if parallel == "auto":
            if launcher == "torchrun":
                raise InvalidConfig("parallel='auto' is for ranks of this machine: give torchrun's a ParallelConfig.")
            parallel, in_flight = divide(self.spec, config, in_flight)
        parallel = self.spec.place(parallel or ParallelConfig())
        if parallel.vae_decode in NOT_EXACT:
            log.warning("vae_decode=%r: frames %s", parallel.vae_decode, NOT_EXACT[parallel.vae_decode])
        if launcher == "local":
            _check_devices(parallel, config)
        cut = self.spec.cut(parallel, config)
        parallel = parallel.filled(cut)
        self._trace = None if trace is None else Path(trace)
        if self._trace is not None:
            check_output(self._trace, (".json",))
        self.traffic: dict[int, dict[str, int]] = {}
        faults = planned()
        check_launch(launcher, parallel)
        environment = config.rank_environment(parallel.ranks if launcher == "local" else torchrun_world()[1])
        fetch_weights(self.spec)
        if launcher == "local":
            family = self.spec.stages_class.partition(":")[0] if device == "cpu" else None
            processes = launch_local(parallel.ranks, environment, family)
        else:
            processes = launch_torchrun(parallel.ranks, environment, START_LIMIT_S)
        self._process = os.getpid()
        self._ranks = Ranks(processes)
        try:
            setup = Setup(self.spec, 0, parallel, cut, config, 0, None, self._trace is not None, faults, start=0)
            self.bytes_read = self._ranks.start(setup)
            room = Room(self.spec, parallel, config, memory_of(config, parallel.ranks, launcher == "local"))
            self._line = Line(self.spec, parallel, in_flight, self._ranks, room.check)
            # Neither knows the engine: when the caller has dropped it, they end the ranks.
            ends = self._line, self._ranks
            self._server = threading.Thread(target=serve, args=ends, name="cineline-engine", daemon=True)
            self._server.start()
            weakref.finalize(self, self._ranks.abandon).atexit = False  # ranks end with the process
        except BaseException:
            self._ranks.end(0.0)
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

    def submit(self, request: VideoRequest) -> RequestHandle:
        """Queue a request; returns at once.

        Raises:
            InvalidRequest: it breaks one of the model's rules, or is too large for the devices' memory.
            EngineClosed, RankFailed: the engine takes no more.
            WrongProcess: this is a child that was forked from the engine's process.
        """
        check_process(self._process)
        image = None if request.image is None else load_image(request.image)
        if image is not None:
            request = request.model_copy(update={"image": image})
        return RequestHandle(self._line.submit(request, image), self._line.cancel, self)

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
        timelines = self._ranks.timelines
        if not first or len(timelines) < len(self.bytes_read):
            return
        self.traffic = {rank: dict(timeline.traffic) for rank, timeline in timelines.items()}
        if self._trace is not None:
            write_trace([piece for timeline in timelines.values() for piece in timeline.slices], self._trace)


def serve(line: Line, ranks: Ranks) -> None:
    """Take in what the ranks say until all are through, one has failed, or nobody is interested any more; then they are
    gone, and nobody waits for them."""
    try:
        failure = ranks.listen(line.hear, line.look)
    except Exception as error:  # the thread's edge: without it nobody would ever be answered
        failure = RankFailed(0, f"what it reported could not be taken in ({type(error).__name__}: {error})")
    line.end(failure or CLOSED, failure or UNDONE)
    ranks.end(0.0 if failure else LEAVE_LIMIT_S)


def _check_devices(parallel: ParallelConfig, config: DeviceConfig) -> None:
    """Refuse what this machine's accelerators cannot run; stages may share them, the ranks of a stage may not."""
    if config.device not in DEVICES and parallel.ring > 1:
        raise InvalidConfig(f"ring={parallel.ring} has no attention for device={shown(config.device)}: use ulysses.")
    if config.device == "cpu" or parallel.lanes == 1:
        return
    import torch

    found = torch.accelerator.device_count()
    if parallel.ranks > found:
        raise InvalidConfig(
            f"{parallel} is {parallel.ranks} ranks, which need an accelerator each, and here are {found}: "
            f"{parallel.advice(found)}."
        )


def default_device() -> str:
    """The device that is used where none is named.

    Raises:
        InvalidConfig: torch, which is asked, would take the environment's threads for something else.
    """
    asked_threads()
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
