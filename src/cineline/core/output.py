"""Files that results go to: checked before anything is computed, written whole or not at all (no torch)."""

from __future__ import annotations

import os
import re
import shutil
import stat
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
    """When a file was written last, in nanoseconds, and of a folder its number, for whatever is put into one changes
    its time; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns


def is_changed(path: Path, before: int | None) -> bool:
    """Whether a file or folder is there that was not at that time."""
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
    """As `whole_file`, for a folder of frames: a new one beside it, which takes its place at the end. What others have
    put into the old one meanwhile is in the new one then.

    Raises:
        OutputError: it cannot be written, or holds something else than frames.
    """
    check_frames_folder(path)
    path = path.resolve()  # the folder that a link leads to
    temporary = _temporary(path, os.getpid())
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this one's number
        try:
            temporary.mkdir()
            yield temporary
            _take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(unwritable(path, error)) from None


def _take_place(new: Path, path: Path) -> None:
    """The old folder is there until the new one is, and stays where that cannot be."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        others = [each for each in old.iterdir() if not FRAME.fullmatch(each.name)]
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    for other in others:
        other.rename(path / other.name)
    shutil.rmtree(old)


def is_made(path: Path) -> bool:
    """Whether a file is there, or a folder with a frame in it."""
    return any(FRAME.fullmatch(each.name) for each in path.iterdir()) if path.is_dir() else path.exists()


def preview_beside(path: Path) -> Path:
    """The file of a preview, until that one is there."""
    return path.with_name(f"{path.stem}.preview.webp")


def _temporary(path: Path, process: int) -> Path:
    return path.with_name(f".{path.stem}.{process}{path.suffix}")


def remove_left_over(path: Path) -> None:
    """What a process that was killed has written of a file or a folder and not finished."""
    with suppress(OSError):
        for other in list(path.parent.iterdir()):
            number = other.name.removeprefix(f".{path.stem}.").removesuffix(path.suffix)
            if number.isdecimal() and other == _temporary(path, int(number)) and not psutil.pid_exists(int(number)):
                shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
