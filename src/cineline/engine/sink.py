"""Where one request's result goes, as it comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cineline.core.output import whole_file
from cineline.engine.handle import RequestHandle
from cineline.errors import CinelineError, OutputError, reason
from cineline.media.video import video_writer

if TYPE_CHECKING:
    import numpy as np


class Sink:
    """The files of one request, whole at its end or not there at all.

    Frames are written as they are decoded, so that a video is never in memory as a whole.

    Args:
        video, latents: the files; None where one is not wanted.

    Attributes:
        handle: of the request.
    """

    def __init__(self, handle: RequestHandle, video: Path | None, latents: Path | None) -> None:
        self.handle = handle
        self._video = video
        self._latents = latents
        self._opened = ExitStack()
        self._write: Callable[[np.ndarray], None] | None = None

    def update(self) -> None:
        """Write what has been decoded since the last time.

        Raises:
            OutputError: the file cannot be written.
        """
        for frames in self.handle.take_frames():
            self._take(frames)

    def finish(self) -> list[Path]:
        """The request is done: write the rest; the files that are there now.

        Raises:
            CinelineError: it was not done, or a file cannot be written.
        """
        video = self.handle.result(0)
        if self._latents is not None:
            from safetensors.torch import save_file

            with whole_file(self._latents) as temporary:
                save_file({"latents": video.latents.contiguous()}, temporary)
        if video.frames is not None:  # decoded since `update`
            self._take(video.frames)
        self._opened.close()
        return [path for path in (self._latents, self._video) if path is not None]

    def _take(self, frames: np.ndarray) -> None:
        if self._write is None and self._video is not None:
            self._write = self._opened.enter_context(video_writer(self._video, self.handle.job.fps))
        try:
            if self._write is not None:
                self._write(frames)
        except OSError as error:
            raise OutputError(
                f"{self._video} cannot be written ({reason(error)}): check the disk and the folder."
            ) from None

    def give_up(self, error: BaseException) -> None:
        """Leave no file that is not whole."""
        with suppress(OSError, CinelineError):  # what led here tells more
            self._opened.__exit__(type(error), error, None)
