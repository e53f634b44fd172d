"""What the simulator must know of a model's division (no torch)."""

from __future__ import annotations

from typing import Protocol

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Job, WorkItem
from cineline.schedule.words import Value


class Profile(Protocol):
    """What an item costs, for one division of one model. Lanes of a stage count as one rank, their first."""

    @property
    def parallel(self) -> ParallelConfig:
        """The division, placed: nothing left open."""
        ...

    def expert(self, job: Job, step: int) -> int:
        """Which expert a step needs."""
        ...

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        """A rank's own seconds for an item, with collectives within its stage, and of a decode by rows those of all."""
        ...

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        """Seconds of the message in which a value travels that `item` makes."""
        ...

    def resident_bytes(self, place: Place) -> int:
        """Weights and what is always there."""
        ...

    def admitted_bytes(self, place: Place, job: Job) -> int:
        """Held from admission to the request's end on that rank."""
        ...

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        """Held while the item runs."""
        ...
