"""Who waits for a job on an open connection, to know whether anybody wants it when one of them hangs up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Waiters:
    """By job; of one event loop."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._theirs: set[str] = set()

    @contextmanager
    def waiting(self, job: str, made: bool) -> Iterator[None]:
        """One waits, who has made the job, or has found it by its key."""
        self._waiting[job] += 1
        if made:
            self._theirs.add(job)
        try:
            yield
        finally:
            self._waiting[job] -= 1
            if not self._waiting[job]:
                del self._waiting[job]
                self._theirs.discard(job)

    def keep(self, job: str) -> None:
        """Somebody wants it who does not wait."""
        self._theirs.discard(job)

    def is_for_one(self, job: str) -> bool:
        """Whether it is wanted by a single one who waits, and by nobody else."""
        return job in self._theirs and self._waiting[job] == 1
