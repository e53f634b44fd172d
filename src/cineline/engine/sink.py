"""Where one request's result goes, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from cineline.core.output import preview_beside, unwritable
from cineline.engine.handle import RequestHandle
from cineline.errors import CinelineError, OutputError
from cineline.media.result import save_latents
from cineline.media.video import frames_writer, video_writer

PREVIEW_FPS = 4
"""A latent frame is four frames of 16 a second."""

PREVIEW_SCALE = 4
"""Pixels of the file along a side of a preview's pixel."""


class Sink:
    """The files of one request, whole at its end or not there at all.

    Frames are written as they are decoded, so that a video is never in memory as a whole.

    Args:
        video, latents: the files; None where one is not wanted. frames: instead of a video's, a folder of pictures.
        metadata: whether the files say what made them.

    Attributes:
        handle: of the request.
        missing: the files that are not there yet.
        failed: why one of them will never be, if so; the other one is written all the same.
    """

    def __init__(
        self,
        handle: RequestHandle,
        video: Path | None,
        latents: Path | None,
        frames: Path | None = None,
        *,
        metadata: bool = True,
    ) -> None:
        self.handle = handle
        self._as_folder = video is None
        self._metadata = metadata
        video = video or frames
        self.missing = [path for path in (latents, video) if path is not None]
        self.failed: OutputError | None = None
        self._video = video
        self._latents = latents
        self._opened = ExitStack()
        self._write: Callable[[np.ndarray], None] | None = None

    def update(self) -> None:
        """Write what has been decoded since the last time.

        Raises:
            OutputError: the video cannot be written, and nothing else is wanted.
        """
        for frames in self.handle.take_frames():
            self._take(frames)
        for preview in self.handle.take_previews()[-1:]:
            self._show(preview)
        if self.failed is not None and self._latents is None:
            raise self.failed

    def finish(self) -> list[Path]:
        """The request is done: write the rest; the files that are there now.

        Raises:
            CinelineError: it was not done.
        """
        result = self.handle.result(0)
        if result.frames is not None:  # decoded since `update`
            self._take(result.frames)
        there = []
        if self._video is not None:
            with self._noting(self._video):
                self._opened.close()
                there.append(self._video)
        if self._latents is not None:
            with self._noting(self._latents):
                save_latents(result.latents, self._latents, self._about)
                there.insert(0, self._latents)
        self.missing = [path for path in self.missing if path not in there]
        self._forget_preview()
        return there

    @property
    def _preview(self) -> Path:
        """Beside the file that is wanted, until that is there."""
        beside = next(iter(self.handle.outputs.values()), self._latents or Path("preview"))
        return preview_beside(beside)

    def _forget_preview(self) -> None:
        """Also what a process that has ended left; a file of that name beside a request without previews is others'."""
        if self.handle.job.preview is not None:
            with suppress(OSError):
                self._preview.unlink(missing_ok=True)

    def _show(self, preview: np.ndarray) -> None:
        """A picture that cannot be written is no reason to stop."""
        with suppress(OSError, OutputError), video_writer(self._preview, PREVIEW_FPS) as write:
            write(np.repeat(np.repeat(preview, PREVIEW_SCALE, axis=1), PREVIEW_SCALE, axis=2))

    def _take(self, frames: np.ndarray) -> None:
        if self._video is None:
            return
        with self._noting(self._video):
            if self._write is None:
                self._write = self._opened.enter_context(self._writer(self._video))
            self._write(frames)
        if self.failed is not None:
            self.give_up(self.failed)  # at once: the space may be what the others lack
            self._video = None

    def _writer(self, path: Path) -> AbstractContextManager[Callable[[np.ndarray], None]]:
        if self._as_folder:
            return frames_writer(path, self._about)
        return video_writer(path, self.handle.job.fps, self._about)

    @property
    def _about(self) -> str | None:
        return self.handle.describe() if self._metadata and self.handle.describe else None

    @contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        """Goes on where a file cannot be written."""
        try:
            yield
        except OutputError as error:
            self.failed = self.failed or error
        except OSError as error:
            self.failed = self.failed or OutputError(unwritable(path, error))

    def give_up(self, error: BaseException) -> None:
        """Leave no file that is not whole."""
        self._forget_preview()
        with suppress(OSError, CinelineError):  # what led here tells more
            self._opened.__exit__(type(error), error, None)
