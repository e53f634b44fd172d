"""What a snapshot folder has of an engine's requests; nothing where there is no folder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cineline.core import control
from cineline.core.family import FamilySpec
from cineline.core.output import check_folder, is_changed, remove_left_over
from cineline.core.request import Job, VideoRequest
from cineline.engine.folder import Kept, Run, SnapshotFolder, settings_of
from cineline.errors import CinelineError, InvalidConfig, RankFailed, shown

CLOSE_LIMIT_S = 30.0
"""For what is still to be written when an engine ends."""

FREE_LIMIT_S = 5.0
"""For the folder to be let go of where nothing is to be written."""

REMEDIES = {"OMP_NUM_THREADS": "set it so"}
"""Where it is not an option."""

log = logging.getLogger(__name__)


class Record:
    """The entries of the open requests.

    An entry goes when its request is over, in whatever way, but for three: the engine ends before it; a rank's failure
    ended it, so that it may be done on another line; or its caller, who said where its outputs go, has not written
    them yet.

    Args:
        folder: None for none. run: the engine's, which a folder must be of.

    Raises:
        InvalidConfig: the folder has requests of another run.
    """

    def __init__(self, folder: Path | None, run: Callable[[], Run]) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}
        self._awaited: set[int] = set()
        self._unfinished: Sequence[Kept] = ()
        self._said = self._said_unkept = False
        self._next_run: Run | None = None
        self._folder: SnapshotFolder | None = None
        if folder is not None:
            self._open(folder)

    def _open(self, path: Path) -> None:
        folder = SnapshotFolder(path)
        try:
            unfinished, run = folder.unfinished(), self._run()
            if unfinished and folder.run is not None:
                check_run(path, folder.run, run)
            for file in (file for kept in unfinished for file in kept.outputs.values()):
                check_folder(file.parent)
            if not unfinished or folder.run is None:
                folder.begin(run)
        except BaseException:
            folder.close(FREE_LIMIT_S)
            raise
        self._folder, self._unfinished, self._next_run = folder, unfinished, run

    def started(self) -> None:
        """The ranks are there: whoever resumes from now on does it as this run has."""
        if self._folder is not None and self._folder.run != self._next_run:
            assert self._next_run is not None
            self._folder.begin(self._next_run)

    def resume(self, path: Path, spec: FamilySpec) -> list[Kept]:
        """What the folder has that is not done, in order, each with the outputs that are not there yet.

        Raises:
            InvalidConfig: it is of another run, or there is another folder already.
            InvalidRequest: a request cannot be any more.
            OutputError: it cannot be used, or a folder for outputs cannot.
        """
        if self._folder is None:
            self._open(path)
            self.started()
        elif self._folder.path.resolve() != path.resolve():
            raise InvalidConfig(
                f"{shown(path)} cannot be resumed by an engine with snapshot_dir={shown(self._folder.path)}: "
                "use an engine with that folder, or with none."
            )
        assert self._folder is not None
        for kept in self._unfinished:
            _check_settings(kept, settings_of(spec.resolve(kept.request, 0)))
        left = []
        for kept in self._unfinished:
            missing = {what: path for what, path in kept.outputs.items() if not is_changed(path, kept.before[what])}
            if kept.outputs and not missing:  # its process ended between the last of them and the entry's end
                self._folder.remove(kept.name)
                continue
            for file in missing.values():
                remove_left_over(file)
            decodes = kept.request.decode and (not kept.outputs or bool(missing.keys() - {"latents"}))
            request = kept.request.model_copy(update={"decode": decodes})
            left.append(replace(kept, request=request, outputs=missing))
        self._unfinished = ()
        return left

    def begin(self, job: Job, request: VideoRequest, outputs: Mapping[str, Path], name: str | None = None) -> None:
        """A request is submitted; `name` is its entry's, where it has one."""
        if self._folder is None:
            return
        if name is None and self._unfinished and not self._said:
            count = len(self._unfinished)
            log.warning("%s has %d other requests: engine.resume goes on with them.", self._folder.path, count)
            self._said = True
        with self._lock:
            absolute = {what: path.absolute() for what, path in outputs.items()}
            self._names[job.id] = name or self._folder.add(job, request, absolute)
            if outputs:
                self._awaited.add(job.id)

    def keep(self, snapshot: control.Snapshot) -> None:
        """Of an open request."""
        name = self._names.get(snapshot.request)
        if self._folder is not None and name is not None:
            self._folder.put(name, replace(snapshot, request=0))

    def unkept(self, lost: control.Unkept) -> None:
        """No new snapshot of a request can be made; said of the first."""
        if not self._said_unkept:
            words = "Request %d has no new snapshot (%s): if a rank is lost it begins at an older one, or anew."
            log.warning(words, lost.request, lost.cause)
            self._said_unkept = True

    def done(self, number: int) -> None:
        """The request is."""
        if number not in self._awaited:
            self._remove(number)

    def failed(self, number: int, error: CinelineError) -> None:
        """The request alone has."""
        if not isinstance(error, RankFailed):
            self._remove(number)

    def leave(self, number: int) -> None:
        """Its entry stays for whoever resumes."""
        with self._lock:
            self._names.pop(number, None)

    def forget(self, name: str) -> None:
        """Nobody will go on with an entry of a request that was not submitted."""
        if self._folder is not None:
            self._folder.remove(name)

    def delivered(self, number: int) -> None:
        """All outputs of a request that is done are written."""
        self._remove(number)

    def _remove(self, number: int) -> None:
        with self._lock:
            name = self._names.pop(number, None)
            self._awaited.discard(number)
        if self._folder is not None and name is not None:
            self._folder.remove(name)

    def close(self) -> None:
        """What is to be kept is written, and the folder is free for others."""
        if self._folder is not None:
            self._folder.close(CLOSE_LIMIT_S)


def check_run(path: Path, there: Run, here: Run) -> None:
    """Refuse to go on with what would give other bits.

    Raises:
        InvalidConfig: the folder is of another model, or of other settings.
    """
    for name, value in there.bits.items():
        if here.bits.get(name) != value:
            raise InvalidConfig(
                f"{shown(path)} was made with {name}={shown(value)}, and {shown(here.bits.get(name))} would give other "
                f"bits: {REMEDIES.get(name, 'resume with the former')}, or use another folder."
            )
    if here.identity != there.identity:
        raise InvalidConfig(
            f"{shown(path)} was made by model={shown(there.model)}, and model={shown(here.model)} is another, or has "
            "changed since: resume with the former, or use another folder."
        )
    for name, value in there.made_with.items():
        now = here.made_with.get(name)
        if now != value:
            log.warning("%s was made with %s %s, and here is %s: bits may be others.", path, name, value, now)


def _check_settings(kept: Kept, now: Mapping[str, object]) -> None:
    for name, value in kept.settings.items():
        if now.get(name) != value:
            raise InvalidConfig(
                f"Request {kept.name} began with {name}={shown(value)}, and the model's defaults would now give "
                f"{name}={shown(now.get(name))}: use the defaults that it began with, or remove its folder."
            )
