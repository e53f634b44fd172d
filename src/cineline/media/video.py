"""Frames to a video file that plays everywhere (H.264, yuv420p, BT.709), to an animated picture, or to pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from cineline.core.output import (
    ANIMATION_SUFFIXES,
    STILL_SUFFIXES,
    VIDEO_SUFFIXES,
    check_output,
    check_rate,
    check_still,
    whole_file,
    whole_folder,
)
from cineline.errors import OutputError, shown
from cineline.media.about import MOV_LIMIT, picture_options

log = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""Above it Pillow's documentation advises against."""

H264 = {"crf": "17", "preset": "medium"}
CPU = Path("/proc/cpuinfo")


@cache
def _h264_options() -> dict[str, str]:
    """libx264's code for AVX-512 (that of av 18) lets its macroblock tree depend on what was in memory before: the same
    frames then give several files. Its code for AVX2 gives one, of the same size, in about the same time."""
    try:
        has_avx512 = "avx512" in CPU.read_text()
    except OSError:
        has_avx512 = False
    return H264 | ({"x264-params": "asm=avx2"} if has_avx512 else {})


@contextmanager
def video_writer(path: Path, fps: int, about: str | None = None) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a video, or a picture of its one frame, as its frames come: call what it gives with frames uint8
    [F, H, W, 3], one or more at a time.

    The file is whole at the end, or is not there at all.

    Args:
        about: what it says of itself, see `media.about`.

    Raises:
        OutputError: the file cannot be written.
    """
    check_output(path, (*VIDEO_SUFFIXES, *STILL_SUFFIXES))
    check_rate(path, fps)
    suffix = path.suffix.lower()
    opened = _still if suffix in STILL_SUFFIXES else _animation if suffix in ANIMATION_SUFFIXES else _h264
    with whole_file(path) as temporary, opened(temporary, fps, about) as write:
        yield write


@contextmanager
def frames_writer(path: Path, about: str | None = None) -> Iterator[Callable[[np.ndarray], None]]:
    """As `video_writer`, for a folder of 0001.png and so on; the folder is whole at the end, or is as it was.

    Raises:
        OutputError: the folder cannot be written, or holds something else than frames.
    """
    with whole_folder(path) as temporary:
        numbers, options = count(1), picture_options(Path("a.png"), about)

        def write(frames: np.ndarray) -> None:
            for frame, number in zip(frames, numbers, strict=False):  # a number is taken for a frame only
                Image.fromarray(frame).save(temporary / f"{number:04}.png", **options)

        yield write


def write_video(
    frames: np.ndarray | None, fps: int, path: Path, as_folder: bool = False, about: str | None = None
) -> None:
    """Write frames uint8 [F, H, W, 3] to `path`, whole or not at all.

    Args:
        as_folder: a picture a frame. about: what it says of itself.

    Raises:
        OutputError: there are no frames, or the file cannot be written.
    """
    if frames is None:
        raise OutputError(
            f"{shown(path)} cannot be written: the request stopped at its latents (decode=False), or its frames were "
            "taken."
        )
    if not as_folder:
        check_still(path, len(frames))
    with frames_writer(path, about) if as_folder else video_writer(path, fps, about) as write:
        write(frames)


@contextmanager
def _still(path: Path, fps: int, about: str | None) -> Iterator[Callable[[np.ndarray], None]]:
    """A picture: PNG without loss, JPEG at its best."""
    pictures: list[Image.Image] = []
    yield lambda frames: pictures.extend(Image.fromarray(frame) for frame in frames)
    (picture,) = pictures
    picture.save(path, quality=JPEG_QUALITY, subsampling=0, **picture_options(path, about))


@contextmanager
def _animation(path: Path, fps: int, about: str | None) -> Iterator[Callable[[np.ndarray], None]]:
    """An endless animation, for web pages: WebP without loss, GIF with 256 colours.

    WebP's frames begin at whole milliseconds, GIF's at whole 1/100 s: each at the one nearest to its time.
    """
    pictures: list[Image.Image] = []
    yield lambda frames: pictures.extend(Image.fromarray(frame) for frame in frames)
    first, *others = pictures
    unit = 10 if path.suffix.lower() == ".gif" else 1
    begins = [round(number * 1000 / fps / unit) * unit for number in range(len(pictures) + 1)]
    delays = [after - begin for begin, after in pairwise(begins)]
    options = picture_options(path, about)
    first.save(path, save_all=True, append_images=others, duration=delays, loop=0, lossless=True, **options)


@contextmanager
def _h264(path: Path, fps: int, about: str | None) -> Iterator[Callable[[np.ndarray], None]]:
    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    with av.open(str(path), "w", options=options) as container:
        if about is not None and path.suffix.lower() == ".mov" and len(about) > MOV_LIMIT:
            log.warning("A .mov does not say what made it: it has no room for so long a prompt.")
        elif about is not None:
            container.metadata["comment"] = about
        stream = container.add_stream("libx264", rate=fps, options=_h264_options())
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
