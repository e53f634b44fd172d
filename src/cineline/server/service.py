"""What the service does, whatever it is asked over: jobs are made, looked at, listed, taken and deleted here."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cineline.core.family import FamilySpec
from cineline.core.request import IMAGES, Job, VideoRequest
from cineline.engine.handle import Phase, RequestHandle
from cineline.errors import OutputError, reason
from cineline.server.dispatcher import Dispatcher
from cineline.server.files import ID, animated, new_id
from cineline.server.keys import Client
from cineline.server.metrics import Now
from cineline.server.orders import Order, Orders
from cineline.server.outcomes import Outcomes
from cineline.server.refusal import Refusal, invalid
from cineline.server.schemas import JobError, VideoObject, VideoPage
from cineline.server.store import OPEN, NewJob, StoredJob

PAGE_LIMIT = 100
DISK_STATUS = 507


@dataclass(frozen=True)
class Idempotency:
    """What makes two requests of a client one.

    Attributes:
        key: the client's. fingerprint: of what it sent.
    """

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str | None, fields: Mapping[str, Any], images: Mapping[str, Image.Image]) -> Idempotency | None:
        """None where the client gave no key.

        Raises:
            Refusal: the key cannot be one.
        """
        if key is None:
            return None
        if not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
            raise invalid("Idempotency-Key is not 1 to 255 ASCII characters: give another.", None, "invalid_header")
        digest = hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode())
        for name, image in sorted(images.items()):
            digest.update(repr((name, image.size)).encode() + image.tobytes())
        return cls(key, digest.hexdigest())


class Service:
    """The jobs of all clients; for any thread.

    Attributes:
        stopping: no more jobs are taken.
    """

    def __init__(
        self,
        spec: FamilySpec,
        names: Sequence[str],
        defaults: Mapping[str, Any],
        outcomes: Outcomes,
        dispatcher: Dispatcher,
    ) -> None:
        self.stopping = False
        self.names = names
        self._outcomes = outcomes
        self._spec, self._dispatcher, self._pace = spec, dispatcher, outcomes.pace
        self._settings, self._store, self._folder = outcomes.settings, outcomes.store, outcomes.folder
        self._orders = Orders(spec, names, defaults, self._settings.fit_sizes, self._check)
        self._taking = threading.Lock()
        self._open: dict[str, tuple[int, list[tuple[StoredJob, VideoObject]]]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken, and an engine is there for them."""
        engine = self._dispatcher.engine
        return not self.stopping and engine is not None and engine.failure is None

    @property
    def now(self) -> Now:
        """For the metrics."""
        running = self._dispatcher.running.values()
        denoising = sum(each.handle.phase == "denoising" for each in running)
        queued = self._store.counts()["queued"]
        return Now(queued, len(running), denoising, self.is_ready, self._folder.is_full, self._dispatcher.ranks)

    def _check(self, request: VideoRequest) -> Job:
        """By the engine, which knows the devices' memory; by the model's rules alone until there is one."""
        engine = self._dispatcher.engine
        return self._spec.resolve(request, 0) if engine is None else engine.check(request)

    def create(
        self, client: Client, fields: Mapping[str, Any], images: Mapping[str, Image.Image], key: str | None
    ) -> tuple[VideoObject, bool]:
        """Queue a job, which is on the disk when this returns; false with one that the client's key has made before.

        Raises:
            Refusal: it cannot be made, or not now.
        """
        order = self._orders.read(fields, images, client.priority)
        same = Idempotency.of(key, fields, images)
        if (before := self._same(client, same)) is not None:
            return before, False
        self._check_limits(client, order)  # before anything is written
        new = self._new(client, order, same)
        try:
            with self._taking:  # so that limits hold, and a key makes one job
                if (before := self._same(client, same)) is not None:
                    return before, False
                self._check_limits(client, order)
                self._store.add(new)
        except sqlite3.Error as error:
            raise _unkept(error) from None
        finally:
            if self._store.get(new.id) is None:
                self._folder.remove(new.id)
        self._dispatcher.wake()
        return self.get(client, new.id), True

    def _same(self, client: Client, same: Idempotency | None) -> VideoObject | None:
        """The job that the client's key has made before."""
        before = None if same is None else self._store.by_key(client.name, same.key)
        if before is None or same is None:
            return None
        if before.fingerprint != same.fingerprint:
            words = "This Idempotency-Key was used for another request: use a new one."
            raise Refusal(409, words, "idempotency_conflict")
        return self.get(client, before.id)

    def _check_limits(self, client: Client, order: Order) -> None:
        if self.stopping or self._dispatcher.failure is not None:
            raise Refusal(503, "The service is about to end: try again in a moment.", "stopping", retry_after_s=10)
        counts = self._store.counts()
        open_jobs = sum(counts[state] for state in OPEN)
        wait_s = self._pace.seconds_for(order.work)
        if open_jobs >= self._settings.queue_limit:
            raise Refusal(
                429, f"{open_jobs} jobs wait already: come back in {wait_s} s.", "queue_full", retry_after_s=wait_s
            )
        if client.open_jobs is not None:
            counts = self._store.counts(client.name)
            own = sum(counts[state] for state in OPEN)
            if own >= client.open_jobs:
                raise Refusal(
                    429,
                    f"{own} of your jobs are open, as many as your key may have: wait for one to be done.",
                    "too_many_jobs",
                    retry_after_s=wait_s,
                )
        if self._folder.is_full:
            raise Refusal(
                DISK_STATUS,
                "The service's disk is full: delete videos, or try later.",
                "storage_full",
                retry_after_s=60,
            )

    def _new(self, client: Client, order: Order, same: Idempotency | None) -> NewJob:
        """A row to be, its images on the disk."""
        job, request = new_id(), order.request
        images = {name: image for name in IMAGES if isinstance(image := getattr(request, name), Image.Image)}
        try:
            for name, image in images.items():
                self._folder.keep_image(job, name, image)
        except OutputError as error:
            self._folder.remove(job)
            raise _unkept(error) from None
        fields = request.model_dump(exclude=set(IMAGES), exclude_unset=True)
        key, fingerprint = (None, None) if same is None else (same.key, same.fingerprint)
        return NewJob(job, client.name, order.priority, order.work, fields, list(images), order.said, key, fingerprint)

    def _own(self, client: Client, job: str) -> StoredJob:
        """A client's job; others' are not there."""
        stored = self._store.get(job) if ID.fullmatch(job) else None
        if stored is None or stored.owner != client.name:
            raise Refusal(404, "There is no such video: it was deleted, has expired, or never was.", "video_not_found")
        return stored

    def get(self, client: Client, job: str) -> VideoObject:
        """A job as it is now.

        Raises:
            Refusal: there is none.
        """
        handles = self._handles
        return self._shown(self._own(client, job), handles)

    def open_jobs(self, client: Client) -> list[VideoObject]:
        """A client's jobs that wait or run, in order. Only what changes is made anew, however many ask how often."""
        handles, changes = self._handles, self._store.changes
        before, found = self._open.get(client.name, (-1, []))
        if before != changes:
            found = [(job, self._shown(job, {})) for job in self._store.open_of(client.name)]
            self._open[client.name] = changes, found
        return [self._shown(job, handles) if job.id in handles else video for job, video in found]

    def ended_since(self, client: Client, moment: float) -> list[VideoObject]:
        """A client's jobs that ended then or later, in order."""
        return [self._shown(job, {}) for job in self._store.ended_since(client.name, moment)]

    @property
    def changes(self) -> int:
        """Of jobs' states so far."""
        return self._store.changes

    def page(self, client: Client, after: str | None, limit: int, order: str) -> VideoPage:
        """Jobs behind that one, newest first or oldest first.

        Raises:
            Refusal: there is no such job, or no such order.
        """
        if not 1 <= limit <= PAGE_LIMIT:
            raise invalid(f"limit={limit} is out of range: use 1 to {PAGE_LIMIT}.", "limit")
        behind = None if after is None else self._own(client, after).number
        handles = self._handles
        found = self._store.page(client.name, behind, limit + 1, order == "asc")
        data = [self._shown(job, handles) for job in found[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return VideoPage(data=data, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)

    def preview(self, client: Client, job: str, behind: int) -> tuple[int, str] | None:
        """The newest picture of what is coming, if it is of a later step: that step, and a data URL of WebP."""
        running = self._dispatcher.running.get(job)
        taken = None if running is None or running.job.owner != client.name else running.preview
        if taken is None or taken[0] <= behind:
            return None
        return taken[0], f"data:image/webp;base64,{base64.b64encode(animated(taken[1])).decode()}"

    def delete(self, client: Client, job: str) -> str:
        """The job and its files are gone; what runs of it stops.

        Raises:
            Refusal: there is none, or the disk is too full even for that.
        """
        stored = self._own(client, job)
        try:
            self._outcomes.remove(stored.id)
        except sqlite3.Error as error:
            words = f"The job cannot be deleted ({reason(error)}): try again."
            raise Refusal(DISK_STATUS, words, "storage_full", retry_after_s=60) from None
        self._dispatcher.cancel(stored.id)
        return stored.id

    def finished(self, client: Client, job: str) -> StoredJob:
        """A completed job, whose video is at `folder.video`.

        Raises:
            Refusal: there is none, it is not done, or has failed.
        """
        stored = self._own(client, job)
        if stored.state == "failed":
            raise Refusal(422, f"The video was not made: {stored.error_message}", stored.error_code or "failed")
        if stored.state != "completed":
            raise Refusal(404, "The video is not done yet: wait for status 'completed'.", "video_not_ready")
        return stored

    def line(self, client: Client) -> list[dict[str, Any]]:
        """What each rank computes, with the job where it is the client's own."""
        owners = {each.handle.job.id: each.job for each in self._dispatcher.running.values()}
        states = []
        for rank in self._dispatcher.ranks:
            job = None if rank.request is None else owners.get(rank.request)
            own = job.id if job is not None and job.owner == client.name else None
            item = rank.item.partition(" of request")[0] or None
            states.append({"rank": rank.rank, "item": item, "video": own})
        return states

    @property
    def _handles(self) -> Mapping[str, RequestHandle]:
        """Of what the engine has; to be asked for before the store, so that a job that ends between is not shown as one
        that waits."""
        return {job: running.handle for job, running in self._dispatcher.running.items()}

    def _shown(self, job: StoredJob, handles: Mapping[str, RequestHandle]) -> VideoObject:
        handle = handles.get(job.id) if job.state == "in_progress" else None
        phase, step, decoded, chunks, restarts = _way(job, handle)
        status = "queued" if job.state == "in_progress" and phase == "waiting" else job.state
        said = job.said
        steps = said["num_inference_steps"]
        progress = 100 if job.state == "completed" else min(99, 100 * (step + decoded) // (steps + (chunks or 0)))
        error = _error(job)
        return VideoObject(
            id=job.id,
            status=status,
            progress=progress,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None or error is not None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            error=error,
            phase=phase,
            step=step,
            decoded=decoded,
            chunks=chunks,
            restarts=restarts,
            inference_time_s=_took(job),
            **said,
        )


def _error(job: StoredJob) -> JobError | None:
    return None if job.error_code is None else JobError(code=job.error_code, message=job.error_message or "")


def _took(job: StoredJob) -> float | None:
    """Seconds of one that is done."""
    if job.state != "completed" or job.completed_at is None or job.started_at is None:
        return None
    return round(job.completed_at - job.started_at, 3)


def _unkept(error: Exception) -> Refusal:
    return Refusal(DISK_STATUS, f"The job cannot be kept ({reason(error)}): try later.", "storage_full")


def _way(job: StoredJob, handle: RequestHandle | None) -> tuple[Phase, int, int, int | None, int]:
    """Phase, steps, chunks, of how many, restarts."""
    if handle is None:
        steps = job.said["num_inference_steps"] if job.state == "completed" else 0
        return ("waiting" if job.state in OPEN else "done"), steps, 0, None, 0
    phase, (step, _), (decoded, chunks) = handle.phase, handle.progress, handle.decoded
    return ("decoding" if phase == "done" else phase), step, decoded, chunks, handle.restarts
