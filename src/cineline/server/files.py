"""The data folder: where each file of a job is, by its id, and what is there that no job needs.

DATA/lock                one service uses the folder at a time
DATA/jobs.sqlite3        the jobs
DATA/videos/ID.mp4       of a completed job, whole
DATA/inputs/ID.image.png the first frame of a job that is open; ID.last_image.png the last one
DATA/snapshots           the engine's (docs/recovery.md)
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from cineline.core.output import check_folder, unwritable, whole_file
from cineline.core.request import IMAGES
from cineline.engine.folder import entries_in, kept_in
from cineline.engine.keeper import REQUEST
from cineline.engine.replicas import REPLICAS
from cineline.errors import InvalidConfig, OutputError, reason, shown

ID = re.compile(r"video_[0-9a-f]{32}")

log = logging.getLogger(__name__)

RESERVE = 256 * 2**20
"""Bytes of the disk that new jobs leave free: those that run have their files to write."""


PREVIEW_MS = 250
"""Of a frame: a latent frame is four of 16 a second."""


def new_id() -> str:
    """Of a job; nobody guesses it."""
    return f"video_{secrets.token_hex(16)}"


class DataFolder:
    """The folder, of this process alone until it ends.

    Raises:
        InvalidConfig: another service has it. OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.videos, self.inputs, self.snapshots = (self.path / name for name in ("videos", "inputs", "snapshots"))
        self.jobs = self.path / "jobs.sqlite3"
        try:
            if not self.path.exists():
                check_folder(self.path.parent)
                self.path.mkdir()
            check_folder(self.path)
            self._lock = FileLock(self.path / "lock", blocking=False, thread_local=False)
            self._lock.acquire()
            for folder in (self.videos, self.inputs):
                folder.mkdir(exist_ok=True)
        except Timeout:
            raise InvalidConfig(
                f"The folder {shown(self.path)} is in use by another service, and is for one at a time: end that one, "
                "or give another folder."
            ) from None
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(unwritable(self.path, error)) from None

    def close(self) -> None:
        """Others may have it."""
        self._lock.release()

    @property
    def is_full(self) -> bool:
        """Whether the disk has no room for what new jobs would write."""
        return not self.has_room(alone=False)

    def has_room(self, alone: bool) -> bool:
        """Whether a job that waits may go. One `alone` may have half of the reserve: its end gives room back."""
        return shutil.disk_usage(self.path).free >= (RESERVE // 2 if alone else RESERVE)

    def video(self, job: str) -> Path:
        """Where a job's video is, or will be."""
        return self.videos / f"{job}.mp4"

    def image(self, job: str, name: str) -> Path:
        """Where an image of a job is, by the request's field."""
        return self.inputs / f"{job}.{name}.png"

    def keep_image(self, job: str, name: str, image: Image.Image) -> None:
        """Without loss, and on the disk when it returns.

        Raises:
            OutputError: it cannot be written.
        """
        image.info.clear()
        with whole_file(self.image(job, name)) as temporary:
            image.save(temporary, compress_level=1)
            _sync(temporary)

    def seal_video(self, job: str) -> int:
        """Have a video that has its name on the disk, too; its bytes."""
        path = self.video(job)
        _sync(path)
        _sync(path.parent)
        return path.stat().st_size

    def is_whole(self, job: str, frames: int) -> bool:
        """Whether the video is there with all its frames."""
        try:
            with av.open(str(self.video(job))) as container:
                return sum(packet.size > 0 for packet in container.demux(video=0)) == frames
        except (av.FFmpegError, OSError, IndexError):
            return False

    def remove(self, job: str) -> None:
        """Its files."""
        with suppress(OSError):
            self.video(job).unlink()
        self.remove_inputs(job)

    def remove_inputs(self, job: str) -> None:
        """Its images."""
        for name in IMAGES:
            with suppress(OSError):
                self.image(job, name).unlink()

    def tidy(self, kept: set[str]) -> None:
        """Remove the files of jobs that are not among these, and what a process that was killed has left half
        written; nothing of anybody else's."""
        for path in [*self.videos.iterdir(), *self.inputs.iterdir()]:
            found = ID.search(path.name)
            if found and path.suffix in (".mp4", ".png") and (path.name.startswith(".") or found[0] not in kept):
                path.unlink(missing_ok=True)

    def fit_snapshots(self, open_jobs: set[str]) -> None:
        """Those of jobs that are gone go, and those that were made where the folder had another path are of this one.
        What this version cannot read or resume goes too: its job begins anew, or is told why it cannot."""
        folders = [self.snapshots, *self.snapshots.glob(REPLICAS)]
        for entry in (entry for folder in folders for entry in entries_in(folder)):
            file = entry / REQUEST
            try:
                stored = json.loads(file.read_bytes().decode("utf-8", "surrogatepass"))
                outputs, given = stored["outputs"], Path(stored["outputs"]["video"])
            except (ValueError, LookupError, TypeError):  # of which job nobody knows
                _remove_entry(entry)
                continue
            if given.stem not in open_jobs:
                _remove_entry(entry)
                continue
            if given != self.video(given.stem):
                outputs["video"] = str(self.video(given.stem))
                with whole_file(file) as temporary:
                    temporary.write_bytes(json.dumps(stored, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                    _sync(temporary)
            try:
                kept_in(entry)
            except InvalidConfig as error:
                log.warning("Job %s begins anew: %s", given.stem, reason(error))
                _remove_entry(entry)


def _remove_entry(entry: Path) -> None:
    (entry / REQUEST).unlink()  # first: without it the rest is no entry
    shutil.rmtree(entry)


def thumbnail(video: Path) -> bytes:
    """The first frame as WebP."""
    with av.open(str(video)) as container:
        picture = Image.fromarray(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    written = io.BytesIO()
    picture.save(written, "WEBP", quality=85)
    return written.getvalue()


def animated(frames: np.ndarray) -> bytes:
    """Frames uint8 [F, H, W, 3] as WebP."""
    first, *others = map(Image.fromarray, frames)
    written = io.BytesIO()
    first.save(written, "WEBP", save_all=True, append_images=others, duration=PREVIEW_MS, loop=0, lossless=True)
    return written.getvalue()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
