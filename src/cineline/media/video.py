"""Frames to a video file that plays everywhere (H.264, yuv420p, BT.709), or to an animated picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from cineline.core.output import ANIMATION_SUFFIXES, VIDEO_SUFFIXES, check_output, check_rate, whole_file
from cineline.errors import OutputError, shown


@contextmanager
def video_writer(path: Path, fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a video as its frames come: call what it gives with frames uint8 [F, H, W, 3], one or more at a time.

    The file is whole at the end, or is not there at all.

    Raises:
        OutputError: the file cannot be written.
    """
    check_output(path, VIDEO_SUFFIXES)
    check_rate(path, fps)
    opened = _animation if path.suffix.lower() in ANIMATION_SUFFIXES else _h264
    with whole_file(path) as temporary, opened(temporary, fps) as write:
        yield write


def write_video(frames: np.ndarray | None, fps: int, path: Path) -> None:
    """Write frames uint8 [F, H, W, 3] to `path`, whole or not at all.

    Raises:
        OutputError: there are no frames, or the file cannot be written.
    """
    if frames is None:
        raise OutputError(
            f"{shown(path)} cannot be written: the request stopped at its latents (decode=False), or its frames were "
            "taken."
        )
    with video_writer(path, fps) as write:
        write(frames)


@contextmanager
def _animation(path: Path, fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """An endless animation, for web pages: WebP without loss, GIF with 256 colours.

    WebP's frames begin at whole milliseconds, GIF's at whole 1/100 s: each at the one nearest to its time.
    """
    pictures: list[Image.Image] = []
    yield lambda frames: pictures.extend(Image.fromarray(frame) for frame in frames)
    first, *others = pictures
    unit = 10 if path.suffix.lower() == ".gif" else 1
    begins = [round(number * 1000 / fps / unit) * unit for number in range(len(pictures) + 1)]
    delays = [after - begin for begin, after in pairwise(begins)]
    first.save(path, save_all=True, append_images=others, duration=delays, loop=0, lossless=True)


@contextmanager
def _h264(path: Path, fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG

        def write(frames: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(picture))

        yield write
        container.mux(stream.encode())
