"""Frames to a video file that plays everywhere: H.264, yuv420p, BT.709."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from cineline.errors import OutputError

SUFFIXES = (".mp4", ".mov", ".mkv")


def check_output(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Refuse a path that cannot be written, before anything is computed for it.

    Raises:
        OutputError: its suffix is not one of `suffixes`, its folder does not exist or cannot be written.
    """
    import os

    if path.suffix.lower() not in suffixes:
        raise OutputError(f"{path} ends in {path.suffix!r}: use one of {', '.join(suffixes)}.")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of {path.name} does not exist: make it first.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give a file's name.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder {folder} of {path.name} cannot be written: choose another.")


def write_video(frames: np.ndarray | None, fps: int, path: Path) -> None:
    """Write frames uint8 [F, H, W, 3] to `path`, by a temporary name first.

    Raises:
        OutputError: there are no frames, or the file cannot be written.
    """
    if frames is None:
        raise OutputError(f"{path} cannot be written: the request stopped at its latents (decode=False).")
    check_output(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        _encode(frames, fps, temporary)
        temporary.replace(path)
    except (OSError, av.error.FFmpegError) as error:
        raise OutputError(f"{path} cannot be written ({error}): check the disk.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _encode(frames: np.ndarray, fps: int, path: Path) -> None:
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
