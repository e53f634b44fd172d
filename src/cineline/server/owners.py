"""Whose the engine's requests are, also for a while after they are over."""

from __future__ import annotations

from cineline.server.keys import Client
from cineline.server.store import StoredJob

MOST = 10_000
"""That are known; the oldest go. As many as there can be in the slices that an engine keeps, and more."""


class Owners:
    """Written by one thread, asked by any."""

    def __init__(self) -> None:
        self._jobs: dict[int, tuple[str, str]] = {}

    def note(self, request: int, job: StoredJob) -> None:
        """The engine's number of the job."""
        self._jobs[request] = job.id, job.owner
        if len(self._jobs) > MOST:
            self._jobs.pop(next(iter(self._jobs)))

    def job(self, request: int, client: Client) -> str | None:
        """Which of the client's jobs a request is; None for others'."""
        job, owner = self._jobs.get(request, (None, None))
        return job if owner == client.name else None
