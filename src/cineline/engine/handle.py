"""What `Engine.submit` hands back: progress, result, cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np

from cineline.core.control import Done
from cineline.core.request import Job, Kind
from cineline.errors import CinelineError, ResultTimeout
from cineline.media.result import Video


class RequestHandle:
    """One submitted request.

    Attributes:
        job: the request as it runs, with nothing left open.
    """

    def __init__(self, job: Job, cancel: Callable[[RequestHandle], bool]) -> None:
        self.job = job
        self._cancel = cancel
        self._future: Future[Video] = Future()
        self._steps_done = 0
        self._latents: np.ndarray | None = None
        self._lock = threading.Lock()
        self._chunks: list[np.ndarray] = []
        self._chunks_done = 0

    @property
    def progress(self) -> tuple[int, int]:
        """Solver steps done, and of how many."""
        return self._steps_done, self.job.steps

    @property
    def decoded(self) -> tuple[int, int]:
        """Decode chunks done, and of how many."""
        return self._chunks_done, self.job.chunks

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        return self._future.done()

    def cancel(self) -> bool:
        """Stop the request; false if it was already done. The others are not touched."""
        return self._cancel(self)

    def result(self, timeout: float | None = None) -> Video:
        """Wait for the video, `timeout` seconds at most.

        Raises:
            ResultTimeout: it is not done yet.
            RequestCancelled, RankFailed, EngineClosed: it will never be.
        """
        try:
            return self._future.result(timeout)
        except FutureTimeout:
            raise ResultTimeout(
                f"Request {self.job.id} is not done after {timeout} s (step {self._steps_done} of {self.job.steps}): "
                "wait longer or cancel it."
            ) from None

    def take_frames(self) -> list[np.ndarray]:
        """Frames decoded since the last call, each uint8 [F, H, W, 3]; the result has those that were not taken."""
        with self._lock:
            taken, self._chunks = self._chunks, []
        return taken

    def take(self, done: Done) -> None:
        """Engine: a step or a chunk is done."""
        if done.group.kind is Kind.DENOISE:
            # With split experts two ranks report, and the later step's word may come first.
            self._steps_done = max(self._steps_done, done.group.number + 1)
            self._latents = self._latents if done.result is None else done.result
        elif done.group.kind is Kind.DECODE:
            assert done.result is not None
            with self._lock:
                self._chunks.append(done.result)
            self._chunks_done += 1

    def finish(self) -> None:
        """Engine: all of it is done."""
        import torch  # late: the engine itself needs none

        assert self._latents is not None
        chunks = self.take_frames()
        frames = np.concatenate(chunks) if chunks else None
        latents = torch.from_numpy(self._latents.copy())
        self._latents = None
        self._future.set_result(Video(latents, frames, self.job.fps))

    def fail(self, error: CinelineError) -> None:
        """Engine: it will never be."""
        if not self._future.done():
            self._future.set_exception(error)
