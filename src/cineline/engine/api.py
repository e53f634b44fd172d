"""The engine: starts the ranks, submits requests to the line, hands back handles.

It lives in the caller's process, which never joins `torch.distributed`, so that several engines can
live side by side. One thread listens to the ranks; a lock guards the scheduler and the handles.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

from cineline.core import control
from cineline.core.config import DEVICES, DeviceConfig, Dtype, ParallelConfig, Place, TextEncoder, asked_threads
from cineline.core.family import FamilySpec
from cineline.core.image import load_image
from cineline.core.output import check_output
from cineline.core.request import Group, Job, VideoRequest
from cineline.core.trace import write_trace
from cineline.engine.auto import divide
from cineline.engine.handle import RequestHandle
from cineline.engine.hub import fetch_weights, open_model
from cineline.engine.launch import (
    GRACE_S,
    Launcher,
    launch_local,
    launch_torchrun,
)
from cineline.engine.ranks import START_LIMIT_S, Ranks
from cineline.engine.torchrun import need_torchrun, torchrun_world
from cineline.errors import (
    CinelineError,
    EngineClosed,
    InvalidConfig,
    RankFailed,
    RequestCancelled,
    shown,
)
from cineline.schedule.scheduler import Scheduler

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

NOT_EXACT = {
    "rows": "are close to the exact ones (most values equal, others a grey level off), not equal.",
    "tiled": "differ from the exact ones, most of all where tiles meet.",
}
"""What is said of the ways to decode that are not exact."""


@dataclass
class _Line:
    """What the lock guards."""

    scheduler: Scheduler
    handles: dict[int, RequestHandle] = field(default_factory=dict)
    images: dict[int, Image.Image] = field(default_factory=dict)
    next_id: int = 0
    broken: CinelineError | None = None


class Engine:
    """A model on its ranks, ready for requests. Use it as a context manager, or call `close`.

    Args:
        model: a folder in diffusers format, a hub id, mini-ti2v, mini-t2v, or another family's spec; None for
            mini-ti2v.
        parallel: how the model is divided; "auto" lets the planner divide it over this machine's devices, for
            requests of the model's default size.
        variant: of the checkpoint's weights, such as fp16, where it has several.
        device: None takes cuda where there is one.
        dtype: None is float32 on the CPU, bfloat16 elsewhere.
        vae_dtype, text_encoder, pin_cores, allow_untested_device: as `device` and `dtype`, see `DeviceConfig`.
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
        device: str | None = None,
        dtype: Dtype | None = None,
        vae_dtype: Dtype = DeviceConfig.vae_dtype,
        text_encoder: TextEncoder = DeviceConfig.text_encoder,
        in_flight: int | None = None,
        trace: str | Path | None = None,
        launcher: Launcher = "local",
        pin_cores: bool = DeviceConfig.pin_cores,
        allow_untested_device: bool = DeviceConfig.allow_untested_device,
    ) -> None:
        device = device or default_device()
        if in_flight is not None and (type(in_flight) is not int or in_flight < 1):
            raise InvalidConfig(f"in_flight={shown(in_flight)} is no whole number from 1 on: give 1 or more.")
        if launcher not in get_args(Launcher):
            raise InvalidConfig(f"launcher={shown(launcher)} is not known: use {' or '.join(get_args(Launcher))}.")
        if launcher == "torchrun":
            need_torchrun()
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        config = DeviceConfig(device, dtype, vae_dtype, text_encoder, pin_cores, allow_untested_device)
        self.spec = open_model(model, variant)
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
        self._heads = [parallel.rank(Place(cfg=cfg)) for cfg in range(parallel.cfg)]
        self._trace = None if trace is None else Path(trace)
        if self._trace is not None:
            check_output(self._trace, (".json",))
        self.traffic: dict[int, dict[str, int]] = {}
        self._closed = False
        self._lock = threading.RLock()
        self._line = _Line(Scheduler(parallel, in_flight, self._admit))
        environment = config.rank_environment(parallel.ranks if launcher == "local" else torchrun_world()[1])
        fetch_weights(self.spec)
        if launcher == "local":
            family = self.spec.stages_class.partition(":")[0] if device == "cpu" else None
            self._ranks = Ranks(launch_local(parallel.ranks, environment, family))
        else:
            self._ranks = Ranks(launch_torchrun(parallel, environment, START_LIMIT_S))
        self.bytes_read = self._ranks.start(self.spec, parallel, cut, config, self._trace is not None)
        self._listener = threading.Thread(target=self._listen, name="cineline-engine", daemon=True)
        self._listener.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, request: VideoRequest) -> RequestHandle:
        """Queue a request; returns at once.

        Raises:
            InvalidRequest: it breaks one of the model's rules.
            EngineClosed, RankFailed: the engine takes no more.
        """
        image = None if request.image is None else load_image(request.image)
        if image is not None:
            request = request.model_copy(update={"image": image})
        with self._lock:
            job = self.spec.resolve(request, self._line.next_id)
            if self._line.broken is not None:
                raise self._line.broken
            if self._closed:
                raise EngineClosed("The engine is closed: make a new one.")
            self._line.next_id += 1
            handle = RequestHandle(job, self._cancel)
            self._line.handles[job.id] = handle
            if image is not None:
                self._line.images[job.id] = image
            self._line.scheduler.submit(job)
            self._emit(self._line.scheduler.pump())
        return handle

    def close(self) -> None:
        """End the ranks; requests that are not done raise `EngineClosed`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = not self._line.handles and self._line.broken is None
            self._fail_all(EngineClosed("The engine was closed before the request was done."))
            if idle:
                self._ranks.tell(control.Stop())
        # Idle ranks end by themselves and hand in their timelines; the others wait for tensors that never come.
        if idle:
            self._listener.join(GRACE_S)
        self._ranks.end(GRACE_S if idle else 0.0)
        self._listener.join(GRACE_S)
        self._ranks.disconnect()
        timelines = self._ranks.timelines
        self.traffic = {rank: dict(timeline.traffic) for rank, timeline in timelines.items()}
        if self._trace is not None and len(timelines) == len(self.bytes_read):
            write_trace([piece for timeline in timelines.values() for piece in timeline.slices], self._trace)

    # Running. All of these hold the lock.

    def _admit(self, job: Job) -> None:
        image = self._line.images.pop(job.id, None)
        if image is None:
            self._ranks.tell(control.Admit(job))
        else:
            self._ranks.tell(control.Admit(job), instead=dict.fromkeys(self._heads, control.Admit(job, image)))

    def _emit(self, groups: list[Group]) -> None:
        for group in groups:
            self._ranks.tell(group)

    def _cancel(self, handle: RequestHandle) -> bool:
        with self._lock:
            if self._line.handles.pop(handle.job.id, None) is None:
                return False
            self._line.images.pop(handle.job.id, None)
            drop = self._line.scheduler.cancel(handle.job.id)
            self._emit(([drop] if drop else []) + self._line.scheduler.pump())
            handle.fail(RequestCancelled(f"Request {handle.job.id} was cancelled at step {handle.progress[0]}."))
        return True

    def _take(self, done: control.Done) -> None:
        handle = self._line.handles.get(done.group.request)
        finished = self._line.scheduler.complete(done.group, done.moves)
        self._emit(self._line.scheduler.pump())
        if handle is None:
            return
        handle.take(done)
        if finished:
            del self._line.handles[handle.job.id]
            handle.finish()

    def _fail_all(self, error: CinelineError) -> None:
        for handle in self._line.handles.values():
            handle.fail(error)
        self._line.handles.clear()

    # Listening.

    def _listen(self) -> None:
        """Take in what the ranks say until all have ended, or one has failed."""
        try:
            failure = self._ranks.listen(self._hear)
        except Exception as error:  # the thread's edge: without it nobody would ever be answered
            failure = RankFailed(0, f"what it reported could not be taken in ({type(error).__name__}: {error})")
        if failure is not None:
            self._break(failure)

    def _hear(self, message: control.Begun | control.Done) -> None:
        with self._lock:
            if isinstance(message, control.Begun):
                self._line.scheduler.begun(message.group)
                self._emit(self._line.scheduler.pump())
            else:
                self._take(message)

    def _break(self, error: RankFailed) -> None:
        """A rank is lost, and with it the line: fail what is in it and end the others."""
        with self._lock:
            if not self._closed:
                self._line.broken = error
            self._fail_all(error)
        self._ranks.end(0.0)
        self._ranks.disconnect()


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
