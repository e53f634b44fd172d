"""The thread that writes a folder of snapshots, so that nobody else waits for the disk (no torch)."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from PIL import Image

from cineline.core.control import Snapshot
from cineline.core.image import load_image
from cineline.core.output import renamed_file
from cineline.errors import reason, shown

log = logging.getLogger(__name__)

REQUEST = "request.json"
ENTRY = re.compile(r"[0-9]{4,}")
UNFINISHED = re.compile(r"\.[0-9]{4,}\.(new|removed)")
"""Entries that are being made, or taken away."""

TEMPORARY = re.compile(r"\.(run|request|image|last_image|step-[0-9]+-expert-[0-9]+)\.[0-9]+\.(json|png|safetensors)")
"""`core.output`'s names for files that are being written."""

SNAPSHOT = re.compile(r"step-([0-9]+)-expert-([0-9]+)\.safetensors")

NEWEST = 2
"""Snapshots of a request that stay: one may turn out to be broken."""


def snapshots_of(entry: Path) -> list[tuple[int, int, Path]]:
    """Step, expert and file of each, newest first."""
    found = [(SNAPSHOT.fullmatch(path.name), path) for path in entry.iterdir()]
    return sorted(((int(name[1]), int(name[2]), path) for name, path in found if name), reverse=True)


def synced(path: Path, content: bytes) -> None:
    """Write a file, and have it on the disk before it gets its name."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@dataclass
class Todo:
    """What is not on the disk of an entry.

    Attributes:
        content: of `request.json`. images: beside it, by their files' names. snapshot: the newest.
        gone: the entry itself is to go.
    """

    content: bytes | None = None
    images: dict[str, Path | Image.Image] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    gone: bool = False


class Keeper:
    """Writes entries in the order in which they were changed, on a thread of its own, which lets go of the lock at its
    end. What cannot be written is tried again with the entry's next change, and when the folder is closed.

    Args:
        path: the folder. lock: of it.
        names: of the entries that are there.
    """

    def __init__(self, path: Path, lock: FileLock, names: Iterable[str]) -> None:
        self._path = path
        self._lock = lock
        self._process = os.getpid()
        self._names = set(names)
        self._todo: dict[str, Todo] = {}
        self._due: dict[str, None] = {}
        self._closing = False
        self._warned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cineline-snapshots", daemon=True)
        self._thread.start()

    def add(self, name: str, content: bytes, images: Mapping[str, Path | Image.Image]) -> None:
        """A new entry."""
        with self._changed:
            self._names.add(name)
            self._change(name, Todo(content, dict(images)))

    def put(self, name: str, snapshot: Snapshot) -> None:
        """A snapshot of an entry, passed over where a later one waits, or the entry has gone."""
        with self._changed:
            todo = self._todo.get(name, Todo())
            if name in self._names and (todo.snapshot is None or todo.snapshot.step <= snapshot.step):
                todo.snapshot = snapshot
                self._change(name, todo)

    def remove(self, name: str) -> None:
        """An entry goes."""
        with self._changed:
            if name in self._names:
                self._names.remove(name)
                self._change(name, Todo(gone=True))

    def close(self, limit_s: float) -> None:
        """Write what is left, in so many seconds at most."""
        with self._changed:
            self._names.clear()
            self._due.update(dict.fromkeys(self._todo))
            self._closing = True
            self._changed.notify()
        self._thread.join(min(limit_s, threading.TIMEOUT_MAX))
        self.abandon()

    def abandon(self) -> None:
        """Write nothing more."""
        if os.getpid() == self._process:  # in a forked child the condition may be held by a thread that is not there
            with self._changed:
                self._due.clear()
                self._closing = True
                self._changed.notify()

    def _change(self, name: str, todo: Todo) -> None:
        if not self._closing:
            self._todo[name] = todo
            self._due[name] = None
            self._changed.notify()

    # The thread.

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
            lost = ", ".join(sorted(name for name, todo in self._todo.items() if todo.content is not None))
            if lost:
                log.warning("%s lacks requests that are not done: %s cannot be resumed.", shown(self._path), lost)
        finally:
            self._lock.release()

    def _write_next(self) -> bool:
        """False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._due or self._closing)
            if not self._due:
                return False
            name = next(iter(self._due))
            del self._due[name]
            todo = self._todo.pop(name)
        try:
            self._write(self._path / name, todo)
        except Exception as error:  # the thread's edge
            self._warn(name, todo, error)
            self._put_back(name, todo)
        return True

    def _write(self, entry: Path, todo: Todo) -> None:
        """All that is to be done, crossed off as it is."""
        if todo.gone:
            self._take_away(entry)
        if todo.content is not None:
            new = entry.with_name(f".{entry.name}.new")
            new.mkdir(exist_ok=True)
            for file, image in todo.images.items():
                _write_whole(new / file, _png(image))
            _write_whole(new / REQUEST, todo.content)
            new.rename(entry)
            todo.content, todo.images = None, {}
        if (snapshot := todo.snapshot) is not None:
            _write_whole(entry / f"step-{snapshot.step:05}-expert-{snapshot.expert}.safetensors", snapshot.state)
            todo.snapshot = None
            for *_, old in snapshots_of(entry)[NEWEST:]:
                old.unlink()

    def _take_away(self, entry: Path) -> None:
        """Under another name first, so that the entry is never there in part."""
        target = entry.with_name(f".{entry.name}.removed")
        shutil.rmtree(target, ignore_errors=True)
        with suppress(FileNotFoundError):  # it was never written
            entry.rename(target)
        shutil.rmtree(target, ignore_errors=True)  # or when the folder is opened again

    def _put_back(self, name: str, todo: Todo) -> None:
        """What is left of it, beside what has come since."""
        with self._changed:
            newer = self._todo.setdefault(name, todo)
            if newer is not todo and not newer.gone:
                newer.content, newer.images = todo.content, todo.images
                waiting = [each for each in (newer.snapshot, todo.snapshot) if each is not None]
                newer.snapshot = max(waiting, key=lambda each: each.step)

    def _warn(self, name: str, todo: Todo, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "Snapshots cannot be written to %s (%s): the run goes on; if it stops, request %s %s, and the same may "
                "happen to others.",
                shown(self._path),
                reason(error),
                name,
                _outlook(self._path / name, todo),
            )


def _outlook(entry: Path, todo: Todo) -> str:
    """What becomes of a request where the run stops now."""
    if todo.gone:
        return "is made once more"
    try:
        steps = [step for step, *_ in snapshots_of(entry)] if (entry / REQUEST).exists() else None
    except OSError:
        steps = None
    return "cannot be resumed" if steps is None else f"begins again at step {max(steps, default=0)}"


def _write_whole(path: Path, content: bytes) -> None:
    with renamed_file(path) as temporary:
        synced(temporary, content)


def _png(image: Path | Image.Image) -> bytes:
    """The image as requests have it, without loss."""
    loaded = load_image(image)
    loaded.info.clear()  # what it says of colours or sides is done already
    written = io.BytesIO()
    loaded.save(written, "PNG", compress_level=1)
    return written.getvalue()
