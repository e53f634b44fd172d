"""Files that results go to: checked before anything is computed, written whole or not at all (no torch)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cineline.errors import OutputError, reason, shown

ANIMATION_SUFFIXES = (".webp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", *ANIMATION_SUFFIXES)
STILL_SUFFIXES = (".png", ".jpg", ".jpeg")
"""Pictures: of a video of one frame (.webp holds one, too)."""

FRAME = re.compile(r"[0-9]{4,}\.png")
"""A file in a folder of frames."""

GIF_RATE = 50
"""Frames a second."""

NAME_LIMIT = 200
"""Bytes of a file's name; file systems take 255, and the temporary name is longer."""

LATENT_SUFFIXES = (".safetensors",)


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written.

    Raises:
        OutputError: its suffix is not one of `suffixes`, its folder does not exist or cannot be written.
    """
    if len(os.fsencode(path.name)) > NAME_LIMIT:
        raise OutputError(f"The file name {shown(path.name)} is longer than {NAME_LIMIT} bytes: shorten it.")
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"{shown(path)} ends in {shown(path.suffix)}: use {' or '.join(suffixes)}.")
    check_folder(path.parent)
    if path.is_dir():
        raise OutputError(f"{shown(path)} is a folder: give a file's name.")


def check_rate(path: Path, fps: int) -> None:
    """Refuse a rate that a file's format cannot hold.

    Raises:
        OutputError: a GIF's delays are whole 1/100 s, and players hold those below 2 for 10.
    """
    if path.suffix.lower() == ".gif" and fps > GIF_RATE:
        raise OutputError(
            f"{shown(path)} cannot have fps={fps}: a .gif has {GIF_RATE} at most; use less, or .webp or .mp4."
        )


def check_still(path: Path, frames: int) -> None:
    """Refuse more frames than a file's format holds.

    Raises:
        OutputError: a picture is to hold several.
    """
    if path.suffix.lower() in STILL_SUFFIXES and frames != 1:
        raise OutputError(
            f"{shown(path)} is a picture, and num_frames={frames}: use num_frames=1, a video's suffix, or a folder's "
            "name with / behind it, for a picture a frame."
        )


def check_frames_folder(path: Path) -> None:
    """Refuse a folder that frames cannot be written as: whatever else is in it would be lost.

    Raises:
        OutputError: it is a file, holds something else than frames, or the folder that it is in cannot be written.
    """
    if len(os.fsencode(path.name)) > NAME_LIMIT:
        raise OutputError(f"The folder name {shown(path.name)} is longer than {NAME_LIMIT} bytes: shorten it.")
    check_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{shown(path)} is a file, not a folder of frames: give another name.")
    others = [] if not path.exists() else [each.name for each in path.iterdir() if not FRAME.fullmatch(each.name)]
    if others or path in (Path(), Path("/")) or path.name == "..":
        raise OutputError(
            f"The folder {shown(path)} holds more than frames ({shown(others[0] if others else path.name)}): give one "
            "that is new, empty, or holds frames alone."
        )


def time_of(path: Path) -> int | None:
    """When a file was written last, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def is_changed(path: Path, before: int | None) -> bool:
    """Whether a file is there that was not at that time."""
    return time_of(path) not in (None, before)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written into.

    Raises:
        OutputError: it does not exist, is a file, or cannot be written.
    """
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"{shown(folder)} cannot be a folder ({reason(error)}): give another.") from None
    if not exists:
        raise OutputError(f"The folder {shown(folder)} does not exist: make it first.")
    if not folder.is_dir():
        raise OutputError(f"{shown(folder)} is no folder: give one.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {shown(folder)} cannot be written: choose another, or change its permissions.")


def unwritable(path: Path, error: OSError) -> str:
    """What is said of it."""
    return f"{shown(path)} cannot be written ({reason(error)}): check the disk and the folder."


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` at the end, and goes if writing fails.

    Raises:
        OutputError: instead of an operating-system error, and where the disk is full.
    """
    try:
        with renamed_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise OutputError(unwritable(path, error)) from None


@contextmanager
def renamed_file(path: Path) -> Iterator[Path]:
    """The same, with the operating system's own errors."""
    temporary = _temporary(path, os.getpid())
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the error that led here tells more
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder of frames: a new one beside it, which takes its place at the end.

    Raises:
        OutputError: it cannot be written, or holds something else than frames.
    """
    check_frames_folder(path)
    temporary = _temporary(path, os.getpid())
    try:
        try:
            temporary.mkdir()
            yield temporary
            for old in path.iterdir() if path.exists() else ():
                old.unlink()
            temporary.replace(path)  # which may be empty, and no more
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(unwritable(path, error)) from None


def _temporary(path: Path, process: int) -> Path:
    return path.with_name(f".{path.stem}.{process}{path.suffix}")


def remove_left_over(path: Path) -> None:
    """What a process that was killed has written of a file or a folder and not finished."""
    with suppress(OSError):
        for other in list(path.parent.iterdir()):
            number = other.name.removeprefix(f".{path.stem}.").removesuffix(path.suffix)
            if number.isdecimal() and other == _temporary(path, int(number)) and not psutil.pid_exists(int(number)):
                shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
