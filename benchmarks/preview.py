"""What previews cost: the same line with one at every step and with none, in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cineline.bench.line import LineCase, time_requests
from cineline.bench.measure import Run, interleave
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint

COLUMNS = ("preview", "s a request", "throughput", "others' CPU")

NONE, EACH = "none", "each step"


@dataclass(frozen=True)
class PreviewCase:
    """What is timed: each arm once in each of the pairs.

    Attributes:
        stages: P. in_flight: requests at once. steps: solver steps of a request of 1,536 tokens. pairs: runs of each.
    """

    stages: int
    in_flight: int
    steps: int
    pairs: int

    @property
    def model(self) -> RandomConfig:
        """A TI2V one."""
        return RandomConfig("ti2v", layers=8, heads=4, head_dim=128, ffn_dim=2048)

    @property
    def requests(self) -> list[VideoRequest]:
        """Those of a run."""
        return LineCase("ti2v", [], [], self.steps, 0).requests(self.in_flight)


def time_previews(case: PreviewCase, config: DeviceConfig, tell: Callable[[str], None]) -> dict[str, list[Run]]:
    """Runs by arm; the map is fitted before the first one."""
    ways = {NONE: case.requests, EACH: [request.model_copy(update={"preview": 1}) for request in case.requests]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_random_checkpoint(folder, case.model)
        parallel = ParallelConfig(pp=case.stages)
        engine = stack.enter_context(Engine(folder, parallel, in_flight=case.in_flight, **asdict(config)))
        time_requests(engine, ways[EACH][:1])
        arms = {name: partial(time_requests, engine, requests) for name, requests in ways.items()}
        return interleave(arms, case.pairs, tell)
