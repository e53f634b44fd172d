"""What `Engine.submit` hands back: progress, result, cancel."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from cineline.core.control import Done
from cineline.core.request import Group, Job, Kind
from cineline.errors import CinelineError, ResultTimeout, anew, check_process
from cineline.media.result import Video

MOST_PREVIEWS = 8
"""Of a request that wait to be taken; older ones go."""


Phase = Literal["waiting", "encoding", "denoising", "decoding", "done"]

PHASES: Mapping[Kind | None, Phase] = {
    None: "waiting",
    Kind.TEXT: "encoding",
    Kind.ENCODE: "encoding",
    Kind.DENOISE: "denoising",
    Kind.DECODE: "decoding",
}
"""By the kind of the last group of items that the tail has begun."""


class Ticket:
    """The engine's side of a request: what has come of it.

    Attributes:
        job: the request as it runs, with nothing left open.
        outputs: files that its caller will write.
        timeout_s, deadline: seconds that it has, and when they are over (`time.monotonic`).
        fitting: what becomes of the request's images, in words.
        spoiled: the first group that the end of the line has heard of as not finite.
        future: its end.
        steps_done, chunks_done: so far.
        begun: the kind of the last group that the tail has begun, since the ranks were started last.
        restarts: of the ranks, since it was submitted. blamed: how many of them were for a failure in its items.
        is_abandoned: it fails because its engine has ended.
    """

    def __init__(self, job: Job, timeout_s: float | None = None, outputs: Mapping[str, Path] | None = None) -> None:
        self.job = job
        self.outputs = outputs or {}
        self.fitting = ""
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self._timed_out_at = self.deadline = time.monotonic() + self.timeout_s
        self.spoiled: Group | None = None
        self.future: Future[Video] = Future()
        self.steps_done = job.first_step
        self.chunks_done = 0
        self.begun: Kind | None = None
        self.restarts = 0
        self.blamed = 0
        self.is_abandoned = False
        self._latents: np.ndarray | None = None
        self._lock = threading.Lock()
        self._chunks: list[np.ndarray] = []
        self._previews: deque[np.ndarray] = deque(maxlen=MOST_PREVIEWS)

    def take(self, done: Done) -> bool:
        """A step or a chunk is done; whether it was not before, as what is done once more after a restart was."""
        number, before = done.group.number, (self.steps_done, self.chunks_done)
        if done.group.kind is Kind.DENOISE:
            # With split experts two ranks report, and the later step's word may come first.
            self.steps_done = max(self.steps_done, number + 1)
            if done.result is not None and number + 1 == self.job.steps:
                self._latents = done.result
            elif done.result is not None:
                with self._lock:
                    self._previews.append(done.result)
        elif done.group.kind is Kind.DECODE and number == self.chunks_done:
            assert done.result is not None
            with self._lock:
                self._chunks.append(done.result)
            self.chunks_done += 1
        return before != (self.steps_done, self.chunks_done)

    def restart(self) -> None:
        """It is done once more, from a snapshot on."""
        self.restarts += 1
        self.begun = None
        self.spoiled, self.deadline = None, self._timed_out_at

    def take_frames(self) -> list[np.ndarray]:
        """Frames that have come since the last call."""
        with self._lock:
            taken, self._chunks = self._chunks, []
        return taken

    def take_previews(self) -> list[np.ndarray]:
        """Previews that have come since the last call."""
        with self._lock:
            taken = list(self._previews)
            self._previews.clear()
        return taken

    def finish(self) -> None:
        """All of it is done."""
        try:
            self.future.set_result(self._video())
        except Exception as error:  # no memory for it, say: nobody else's
            self.future.set_exception(error)

    def _video(self) -> Video:
        import torch  # late: the engine itself needs none

        assert self._latents is not None
        chunks = self.take_frames()
        frames = np.concatenate(chunks) if chunks else None
        latents = torch.from_numpy(self._latents.copy())
        self._latents = None
        return Video(latents, frames, self.job.fps)

    def fail(self, error: CinelineError, is_abandoned: bool = False) -> None:
        """It will never be."""
        if not self.future.done():
            self.is_abandoned = is_abandoned
            self.future.set_exception(error)


class RequestHandle:
    """One submitted request. Until it is done the engine lives, whoever else lets go of it.

    Decoded frames stay in memory until they are taken or nobody has the handle any more: those of one request at a
    time while it is decoded, then all that the caller keeps.

    Args:
        cancel: of the engine's line; whether what the snapshot folder has is kept. deliver: of its record.
        engine: itself. describe: see there.

    Attributes:
        job: the request as it runs, with nothing left open.
        outputs: files that whoever submitted it wants, by what they are.
        describe: says what is made and of which model, as JSON (see `engine.about`); None for no words.
    """

    def __init__(
        self,
        ticket: Ticket,
        cancel: Callable[[Ticket, bool], bool],
        deliver: Callable[[int], None] = lambda _: None,
        engine: object = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        self.describe = describe
        self.job = ticket.job
        self.outputs = ticket.outputs
        self._ticket = ticket
        self._cancel = cancel
        self._deliver = deliver
        self._engine = engine
        self._process = os.getpid()
        let_go = weakref.WeakMethod(self._let_go)  # whoever waits for the request holds the handle, not the engine
        ticket.future.add_done_callback(lambda _: (method := let_go()) and method())

    def _let_go(self) -> None:
        self._engine = None

    @property
    def progress(self) -> tuple[int, int]:
        """Solver steps done, and of how many."""
        check_process(self._process)
        return self._ticket.steps_done, self.job.steps

    @property
    def fitting(self) -> str:
        """What becomes of its images, in words; empty where it has none."""
        return self._ticket.fitting

    @property
    def decoded(self) -> tuple[int, int]:
        """Decode chunks done, and of how many."""
        check_process(self._process)
        return self._ticket.chunks_done, self.job.chunks

    @property
    def phase(self) -> Phase:
        """What it is at; one that waits for its decode is decoding."""
        check_process(self._process)
        if self._ticket.future.done():
            return "done"
        all_steps = self._ticket.steps_done == self.job.steps and self._ticket.begun is not None
        return "decoding" if all_steps else PHASES[self._ticket.begun]

    @property
    def restarts(self) -> int:
        """How often the ranks were started anew since it was submitted; it went on from its last snapshot."""
        check_process(self._process)
        return self._ticket.restarts

    @property
    def is_abandoned(self) -> bool:
        """Its engine has ended before it was done: another one may take it."""
        check_process(self._process)
        return self._ticket.is_abandoned

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        check_process(self._process)
        return self._ticket.future.done()

    def cancel(self) -> bool:
        """Stop the request; false if it was already done. The others are not touched."""
        check_process(self._process)
        return self._cancel(self._ticket, False)

    def park(self) -> bool:
        """Stop the request, and leave what the snapshot folder has of it for `Engine.resume`; false if it was done."""
        check_process(self._process)
        return self._cancel(self._ticket, True)

    def delivered(self) -> None:
        """All of its `outputs` are written: the snapshot folder need not keep it any more."""
        check_process(self._process)
        self._deliver(self.job.id)

    def result(self, timeout: float | None = None) -> Video:
        """Wait for the video, `timeout` seconds at most.

        Raises:
            ResultTimeout: it is not done yet.
            RequestCancelled, RequestTimedOut, NotFinite, RankFailed, EngineClosed: it will never be.
            WrongProcess: this is a child that was forked since.
        """
        check_process(self._process)
        try:
            error = self._ticket.future.exception(timeout)
        except FutureTimeout:
            raise ResultTimeout(
                f"Request {self.job.id} is not done after {timeout} s (step {self.progress[0]} of {self.job.steps}): "
                "wait longer or cancel it."
            ) from None
        if isinstance(error, CinelineError):
            raise anew(error)
        return replace(self._ticket.future.result(), describe=self.describe)

    def take_frames(self) -> list[np.ndarray]:
        """Frames decoded since the last call, each uint8 [F, H, W, 3]; the result has those that were not taken."""
        check_process(self._process)
        return self._ticket.take_frames()

    def take_previews(self) -> list[np.ndarray]:
        """Small pictures of what is coming, made every `preview` steps since the last call (the newest 8), each uint8
        [F', H', W', 3]: a pixel a latent, a picture a latent frame."""
        check_process(self._process)
        return self._ticket.take_previews()
