"""What an engine keeps of its requests, and how often it starts lost ranks anew (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cineline.errors import InvalidConfig, shown


@dataclass(frozen=True)
class Recovery:
    """How much is lost with a rank, or with the whole process.

    Attributes, beyond what the options' texts say:
        snapshot_every: what is lost with a rank is so many steps of a request at most, and what was under way.
        snapshot_dir: made if its parent is there; one process has it at a time.
        restarts: a step or decode chunk that was not done before is progress. Under torchrun there are none:
            `torchrun --max-restarts` goes on from `snapshot_dir`.
    """

    snapshot_every: Annotated[int, "Solver steps from one snapshot of a request to the next"] = 1
    snapshot_dir: Annotated[Path | None, "Keep snapshots there too, for --resume"] = None
    restarts: Annotated[int, "Times in a row without progress that lost ranks are started anew; 0 for none"] = 3

    def __post_init__(self) -> None:
        for name, least in (("snapshot_every", 1), ("restarts", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InvalidConfig(f"{name}={shown(value)} is no whole number from {least} on: give {least} or more.")
