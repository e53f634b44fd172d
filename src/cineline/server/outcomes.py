"""How a job ends: in the store, in its files, in the metrics."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from cineline.errors import (
    CinelineError,
    InvalidRequest,
    NotFinite,
    OutOfMemory,
    OutputError,
    RankFailed,
    RequestCancelled,
    RequestTimedOut,
    reason,
    shown,
)
from cineline.server.files import DataFolder
from cineline.server.metrics import Metrics
from cineline.server.pace import Pace
from cineline.server.settings import ServeConfig
from cineline.server.store import OPEN, Store, StoredJob

CODES: tuple[tuple[type[CinelineError], str], ...] = (
    (OutOfMemory, "out_of_memory"),
    (NotFinite, "not_finite"),
    (RequestTimedOut, "timed_out"),
    (InvalidRequest, "invalid_request"),
    (OutputError, "storage_failed"),
    (RankFailed, "rank_failed"),
)
"""What clients are told, by the kind of error."""

MOST_SETBACKS = 3
"""Times that a job is begun anew after what may have been its own fault: the engine's end, or a full disk."""

log = logging.getLogger(__name__)


class Unforeseen(CinelineError):
    """Of one job."""


def unforeseen(job: StoredJob, error: Exception) -> Unforeseen:
    """What the job's client is told; the log has the rest."""
    log.error("Job %s failed.", job.id, exc_info=error)
    return Unforeseen(f"The job failed ({type(error).__name__}): try again, and tell whoever runs the service.")


@dataclass(frozen=True)
class Outcomes:
    """Ends jobs.

    Attributes:
        pace: of those that were completed.
    """

    store: Store
    folder: DataFolder
    settings: ServeConfig
    metrics: Metrics
    pace: Pace = field(default_factory=Pace)

    def recover(self) -> None:
        """After any end of a process: complete what has its file, and remove what is of no job.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            for job in self.store.in_state("in_progress"):
                if self.folder.is_whole(job.id, job.said["num_frames"]):
                    self.complete(job)
                else:
                    self.folder.video(job.id).unlink(missing_ok=True)
            open_jobs = {job.id for job in self.store.in_state(*OPEN)}
            self.folder.tidy(open_jobs | {job.id for job in self.store.in_state("completed")})
            self.folder.fit_snapshots(open_jobs)
        except (sqlite3.Error, OSError) as error:
            raise OutputError(f"{shown(self.folder.path)} cannot be used ({reason(error)}): check the disk.") from None

    def complete(self, job: StoredJob) -> None:
        """Its file has its name, and is on the disk before the store says so."""
        nbytes = self.folder.seal_video(job.id)
        if not self.store.complete(job.id, nbytes, self.settings.keep_for_s):  # deleted meanwhile
            self.folder.remove(job.id)
            return
        self.folder.remove_inputs(job.id)
        self.metrics.jobs.labels("completed").inc()
        if job.started_at is not None:
            self.metrics.took.observe(max(0.0, time.time() - job.started_at))

    def fail(self, job: StoredJob, error: CinelineError) -> None:
        """It will never be."""
        code = next((code for kind, code in CODES if isinstance(error, kind)), "failed")
        if self.store.fail(job.id, code, str(error), self.settings.keep_for_s):
            self.folder.remove(job.id)
            self.metrics.jobs.labels(code).inc()

    def set_back(self, job: StoredJob, error: CinelineError, is_abandoned: bool = False) -> None:
        """Begin it anew, or fail it: the disk may have room later, what nobody foresaw may not come again, and where
        its engine has ended (`is_abandoned`) another takes it; what is of the request's own it is told."""
        if isinstance(error, RequestCancelled) or self.store.get(job.id) is None:
            return  # it was deleted
        may_pass = is_abandoned or isinstance(error, (OutputError, Unforeseen))
        if may_pass and job.setbacks + 1 < MOST_SETBACKS:
            log.warning("Job %s begins anew: %s", job.id, error)
            self.store.queue_again(job.id, setback=True)
        else:
            self.fail(job, error)

    def queue_lost(self, running: Collection[str]) -> None:
        """What should be with the engine and is not among these begins anew."""
        for job in self.store.in_state("in_progress"):
            if job.id not in running:
                self.store.queue_again(job.id)

    def expire(self) -> None:
        """Finished jobs whose time is over go, and those that take too much."""
        for job in self.store.expired(self.settings.keep_for_bytes):
            self.remove(job)

    def remove(self, job: str) -> None:
        """It and its files go.

        Raises:
            sqlite3.Error: it is still there.
        """
        try:
            self.store.remove(job)
        except sqlite3.OperationalError:  # a full disk, which has room for that once the files are gone
            self.folder.remove(job)
            self.store.remove(job)
        self.folder.remove(job)
