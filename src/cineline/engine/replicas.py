"""Several engines of one model side by side, as one: each request goes to the one that has least to do.

They share nothing but the process. Where one has ended the others go on, and take what it had once that is submitted
again; the last one's end is the end of all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from cineline.core.request import Job, VideoRequest
from cineline.engine.api import CLOSE_LIMIT_S, Engine
from cineline.engine.handle import RequestHandle
from cineline.engine.ranks import RankState
from cineline.engine.recent import Recent
from cineline.engine.replica import Replica
from cineline.errors import CinelineError, EngineClosed, RankFailed, anew

REPLICAS = "replica-*"
"""In a snapshot folder, those of all replicas but the first one."""

log = logging.getLogger(__name__)


def folder_of(snapshots: Path, replica: Replica) -> Path:
    """A replica's own, in the snapshot folder of all; the first one's is that itself, as of an engine alone."""
    return snapshots / REPLICAS.replace("*", str(replica.number)) if replica.number else snapshots


class Replicas:
    """Engines as one `Engine`.

    Args:
        make: one of them; called from threads, for all at once.
        count: how many.

    Raises:
        CinelineError: one could not be made; none is left.
    """

    def __init__(self, make: Callable[[Replica], Engine], count: int) -> None:
        self._lock = threading.Lock()
        self._engines = _made(make, count)
        self._open: list[list[RequestHandle]] = [[] for _ in self._engines]
        self._told: set[int] = set()
        self._recent, self._seen = Recent(), [0] * len(self._engines)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(CLOSE_LIMIT_S if kind is None else 0.0)

    @property
    def failure(self) -> CinelineError | None:
        """Why no more requests are taken: the last one has ended; None while there is one."""
        failures = [engine.failure for engine in self._engines]
        return None if None in failures else failures[0]

    @property
    def ranks(self) -> list[RankState]:
        """What each rank computes, numbered through all replicas."""
        found: list[RankState] = []
        for engine in self._engines:
            found += [state._replace(rank=len(found) + state.rank) for state in engine.ranks]
        return found

    @property
    def recent(self) -> Recent:
        """See `Engine.recent`; of all replicas, their ranks numbered as in `ranks`."""
        with self._lock:
            first = 0
            for number, engine in enumerate(self._engines):
                self._seen[number], found = engine.recent.since(self._seen[number])
                self._recent.add(replace(piece, rank=first + piece.rank) for piece in found)
                first += len(engine.ranks)
            return self._recent

    def check(self, request: VideoRequest) -> Job:
        """See `Engine.check`: they are all alike."""
        return self._engines[0].check(request)

    def submit(self, request: VideoRequest, outputs: Mapping[str, Path] | None = None) -> RequestHandle:
        """See `Engine.submit`.

        Raises:
            As there; EngineClosed and RankFailed where all have ended.
        """
        while True:
            number = self._least_busy()
            try:
                handle = self._engines[number].submit(request, outputs)
            except (EngineClosed, RankFailed):
                if self._engines[number].failure is None:
                    raise
                continue  # it ended a moment ago
            with self._lock:
                self._open[number].append(handle)
            return handle

    def _least_busy(self) -> int:
        """The first of those with the fewest requests that are not done.

        Raises:
            EngineClosed, RankFailed: all have ended.
        """
        with self._lock:
            self._open = [[handle for handle in there if not handle.done] for there in self._open]
            there = [number for number, engine in enumerate(self._engines) if engine.failure is None]
            for number in set(range(len(self._engines))) - {*there, *self._told}:
                self._told.add(number)
                log.warning(
                    "Replica %d has ended: %s Requests go to the others.", number, self._engines[number].failure
                )
            if there:
                return min(there, key=lambda number: len(self._open[number]))
        failure = self.failure
        assert failure is not None
        raise anew(failure)

    def resume(self, directory: str | Path) -> list[RequestHandle]:
        """See `Engine.resume`: each has a folder in it. Of a request that several have, as after runs with more and
        with fewer replicas, the one that is furthest goes on."""
        found: dict[tuple[Path, ...], RequestHandle] = {}
        for number, engine in enumerate(self._engines):
            own = engine.resume(folder_of(Path(directory), Replica(number, len(self._engines))))
            self._open[number] += own
            for handle in own:
                files = tuple(handle.outputs.values()) or (Path(str(handle.job.id)),)
                other = found.get(files)
                kept = handle if other is None else max(other, handle, key=lambda each: each.progress[0])
                if other is not None:
                    spare = other if kept is handle else handle
                    spare.cancel()
                    spare.delivered()
                found[files] = kept
        return list(found.values())

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> None:
        """See `Engine.close`; all at once."""
        _close(self._engines, limit_s)


AnyEngine = Engine | Replicas
"""What requests are submitted to."""


def _made(make: Callable[[Replica], Engine], count: int) -> list[Engine]:
    with ThreadPoolExecutor(count, "cineline-replica") as pool:
        started = [pool.submit(make, Replica(number, count)) for number in range(count)]
    errors = [error for each in started if (error := each.exception()) is not None]
    if errors:
        _close([each.result() for each in started if each.exception() is None], 0.0)
        raise errors[0]
    return [each.result() for each in started]


def _close(engines: list[Engine], limit_s: float) -> None:
    if not engines:
        return
    with ThreadPoolExecutor(len(engines), "cineline-closing") as pool:
        for closed in [pool.submit(engine.close, limit_s) for engine in engines]:
            closed.result()
