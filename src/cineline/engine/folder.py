"""What is kept of requests on disk while they run, so that another process can go on with them (no torch).

    DIR/lock                                   of the process that uses the folder
    DIR/run.json                               the model, and how it was run last
    DIR/0001/request.json                      a request that is not done, numbered in order of submission
    DIR/0001/image.png                         its first frame, where it has one; last_image.png alike
    DIR/0001/step-00012-expert-0.safetensors   its newest snapshots

A file is there whole or not at all, and an entry is there when its `request.json` is. It goes when its request is done.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from cineline.core import control
from cineline.core.image import load_image
from cineline.core.output import check_folder, time_of, unwritable, whole_file
from cineline.core.request import IMAGES, Job, VideoRequest
from cineline.engine.keeper import ENTRY, REQUEST, TEMPORARY, UNFINISHED, Keeper, snapshots_of, synced
from cineline.errors import InvalidConfig, InvalidRequest, OutputError, check_process, reason, shown

LOCK, RUN = "lock", "run.json"

NOT_SETTINGS = ("id", "first_step", "first_expert", "prompts", "preview")
"""Fields of a job that say where it is, not what it makes."""


@dataclass(frozen=True)
class Run:
    """How a model was run: plain JSON, in which tuples are lists.

    Attributes:
        model: as `--model` takes it, absolute where it is a folder; None for a family's own spec.
        variant: of its weights. files: given instead of its own, by `ModelFiles`' names; absolute.
        identity: see `identity_of`.
        bits: settings that bits depend on. made_with: what they may depend on, too.
        line: how the model was divided; may be another when the requests are resumed.
        options: of the engine, likewise.
    """

    model: str | None
    variant: str | None
    files: Mapping[str, str]
    identity: str
    bits: Mapping[str, Any]
    made_with: Mapping[str, str]
    line: Mapping[str, Any]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("files", "bits", "made_with", "line", "options"):
            object.__setattr__(self, name, json.loads(_json(dict(getattr(self, name)))))


@dataclass(frozen=True)
class Kept:
    """A request that is not done.

    Attributes:
        name: of its entry.
        request: as it was given, its image in memory.
        settings: of its job, see `settings_of`.
        outputs: its files by kind, such as "video" and "latents"; absolute.
        before: when each of them had last been written at submission (`st_mtime_ns`); None where it was not there.
        snapshot: the newest that is whole, `request` -1; None where it begins anew.
    """

    name: str
    request: VideoRequest
    settings: Mapping[str, Any]
    outputs: Mapping[str, Path]
    before: Mapping[str, int | None]
    snapshot: control.Snapshot | None


@dataclass(frozen=True)
class Entry:
    """What `request.json` holds; an image is the name of its file."""

    request: dict[str, Any]
    settings: dict[str, Any]
    outputs: dict[str, str]
    before: dict[str, int | None]


def settings_of(job: Job) -> dict[str, Any]:
    """All that a job makes depends on, beside its image, as plain JSON: to be compared with `Kept.settings`."""
    settings = {name: value for name, value in asdict(job).items() if name not in NOT_SETTINGS}
    plain: dict[str, Any] = json.loads(_json(settings))
    return plain


def run_of(path: Path) -> Run:
    """What was run last in a folder, which a process may be using.

    Raises:
        InvalidConfig: it is no snapshot folder.
    """
    if not (path / RUN).exists():
        raise InvalidConfig(f"{shown(path)} has no {RUN}, as snapshot folders do: give what --snapshot-dir named.")
    return _read(path / RUN, Run, "give another folder, or remove that file")


def entries_in(path: Path) -> list[Path]:
    """The entries of requests that are not done, in order of submission; none where there is no folder."""
    names = [file.parent.name for file in path.glob(f"*/{REQUEST}")]
    return [path / name for name in sorted(filter(ENTRY.fullmatch, names), key=int)]


class SnapshotFolder:
    """A folder of requests and their snapshots, of one process at a time; it may be killed at any moment.

    `add`, `put` and `remove` are for any thread, and leave writing to a thread of the folder's own. Where that cannot
    write, one warning says so, and the run goes on.

    Args:
        path: made where it does not exist.

    Attributes:
        path: absolute.
        run: what was run here last; None in a new folder.

    Raises:
        InvalidConfig: another process uses it, or its `run.json` is none.
        OutputError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._process = os.getpid()
        lock = _locked(self.path)
        try:
            self.run = run_of(self.path) if (self.path / RUN).exists() else None
            self._tidy()
            numbers = [int(path.name) for path in self.path.iterdir() if ENTRY.fullmatch(path.name)]
            self._next = max(numbers, default=0) + 1
            self._keeper = Keeper(self.path, lock, [entry.name for entry in entries_in(self.path)])
        except OSError as error:
            lock.release()
            raise error if isinstance(error, OutputError) else OutputError(unwritable(self.path, error)) from None
        except BaseException:
            lock.release()
            raise
        self._lock = threading.Lock()
        weakref.finalize(self, self._keeper.abandon).atexit = False  # the lock ends with the process

    def unfinished(self) -> list[Kept]:
        """The requests that are not done, in order of submission; for before there are new ones.

        Raises:
            InvalidConfig: an entry cannot be read.
        """
        return [kept_in(entry) for entry in entries_in(self.path)]

    def begin(self, run: Run) -> None:
        """Say what is run here from now on.

        Raises:
            OutputError: it cannot be written.
        """
        check_process(self._process)
        with whole_file(self.path / RUN) as temporary:
            synced(temporary, _json(asdict(run)))
        self.run = run

    def add(self, job: Job, request: VideoRequest, outputs: Mapping[str, Path]) -> str:
        """Keep a request; the name of its entry.

        Args:
            outputs: its files by kind.
        """
        check_process(self._process)
        given = request.model_dump(exclude=set(IMAGES), exclude_unset=True)
        images = {name: getattr(request, name) for name in IMAGES if getattr(request, name) is not None}
        given |= {name: _file_of(name) for name in images}
        files = {kind: path.absolute() for kind, path in outputs.items()}
        before = {kind: time_of(path) for kind, path in files.items()}
        entry = Entry(given, settings_of(job), {kind: str(path) for kind, path in files.items()}, before)
        with self._lock:
            name = f"{self._next:04}"
            self._next += 1
        self._keeper.add(name, _json(asdict(entry)), {_file_of(name): image for name, image in images.items()})
        return name

    def put(self, name: str, snapshot: control.Snapshot) -> None:
        """Keep a snapshot of an entry's request; of several that wait to be written only the newest is."""
        check_process(self._process)
        self._keeper.put(name, snapshot)

    def remove(self, name: str) -> None:
        """An entry's request is done."""
        check_process(self._process)
        self._keeper.remove(name)

    def close(self, limit_s: float) -> None:
        """Write what waits, in so many seconds at most, and let go of the folder; in a forked child nothing is done.

        Where a write takes longer than that, the folder is let go of when it ends.
        """
        if os.getpid() == self._process:
            self._keeper.close(limit_s)

    def clear(self) -> None:
        """Remove all entries, and what was run; for before there are new ones.

        Raises:
            OutputError: something cannot be removed.
        """
        check_process(self._process)
        try:
            for entry in entries_in(self.path):
                shutil.rmtree(entry)
            (self.path / RUN).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(unwritable(self.path, error)) from None
        self.run = None

    def _tidy(self) -> None:
        """Remove what a process that was killed has left half done, and nothing of anybody else's."""
        for path in list(self.path.iterdir()):
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
            elif UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
        for entry in entries_in(self.path):
            for file in list(entry.iterdir()):
                if TEMPORARY.fullmatch(file.name):
                    file.unlink()


def _locked(path: Path) -> FileLock:
    """The lock of a folder, which is made where it does not exist."""
    try:
        if not path.exists():
            check_folder(path.parent)
            path.mkdir()
        check_folder(path)
        lock = FileLock(path / LOCK, blocking=False, thread_local=False)
        lock.acquire()
    except Timeout:
        raise InvalidConfig(
            f"The folder {shown(path)} is in use by another run, and is for one at a time: wait until that has ended, "
            "or give another."
        ) from None
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(unwritable(path, error)) from None
    return lock


def kept_in(entry: Path) -> Kept:
    """What an entry has.

    Raises:
        InvalidConfig: it cannot be read, or its request cannot be any more.
    """
    stored = _read(entry / REQUEST, Entry, f"remove {shown(entry)} to go on without that request")
    try:
        images = {name: load_image(entry / _file_of(name), name) for name in IMAGES if stored.request.get(name)}
        request = VideoRequest(**stored.request | images)
    except InvalidRequest as error:
        raise InvalidConfig(f"{shown(entry)} cannot be resumed: {error}") from None
    outputs = {kind: Path(path) for kind, path in stored.outputs.items()}
    return Kept(entry.name, request, stored.settings, outputs, stored.before, _newest(entry))


def _file_of(name: str) -> str:
    """Of an image's field."""
    return f"{name}.png"


def _newest(entry: Path) -> control.Snapshot | None:
    """The newest snapshot that is whole. Newer ones that are not are removed, since they would count among those that
    stay."""
    for step, expert, file in snapshots_of(entry):
        try:
            with safe_open(file, framework="np"):  # holds its header against its length
                return control.Snapshot(-1, step, expert, file.read_bytes())
        except SafetensorError:
            with suppress(OSError):
                file.unlink()
        except OSError:
            continue
    return None


Read = TypeVar("Read")


def _read(path: Path, kind: type[Read], remedy: str) -> Read:
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_bytes().decode("utf-8", "surrogatepass")))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{shown(path)} cannot be read ({reason(error)}): {remedy}.") from None


def _json(value: Mapping[str, Any]) -> bytes:
    """For a person, too; `surrogatepass` since a path may be no text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass")
