"""What snapshots cost: the same line with and without them, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cineline.bench.line import LineCase, time_requests
from cineline.bench.measure import Run, interleave
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.engine.api import Engine
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint

COLUMNS = ("snapshots", "s a request", "throughput", "others' CPU")

NONE, MEMORY, DISK = "none", "in memory", "on disk too"


@dataclass(frozen=True)
class RecoveryCase:
    """What is timed: each arm once in each of the pairs.

    Attributes:
        parallel: how the model is divided. in_flight: requests at once. every: solver steps between snapshots.
        steps: solver steps of a request of 1,536 tokens. pairs: runs of each arm.
    """

    parallel: ParallelConfig
    in_flight: int
    every: int
    steps: int
    pairs: int


def time_recovery(case: RecoveryCase, config: DeviceConfig, tell: Callable[[str], None]) -> dict[str, list[Run]]:
    """Runs by arm: without snapshots, with them in memory, with them in a folder too."""
    requests = LineCase("ti2v", [], [], case.steps, 0).requests(case.in_flight)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_random_checkpoint(folder / "model", RandomConfig("ti2v", layers=8, heads=4, head_dim=128, ffn_dim=2048))
        ways: dict[str, dict[str, Any]] = {
            NONE: {"restarts": 0},
            MEMORY: {"snapshot_every": case.every},
            DISK: {"snapshot_every": case.every, "snapshot_dir": folder / "snapshots"},
        }
        arms: dict[str, Callable[[], float]] = {}
        for name, options in ways.items():
            engine = Engine(folder / "model", case.parallel, in_flight=case.in_flight, **asdict(config), **options)
            stack.enter_context(engine)
            time_requests(engine, requests[:1])
            arms[name] = partial(time_requests, engine, requests)
        return interleave(arms, case.pairs, tell)
