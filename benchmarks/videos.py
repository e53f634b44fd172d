"""From prompts to video files: the whole of what a user waits for, one core a rank and no more."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.bench.measure import Run, Summary, interleave, others, ratios
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.sink import Sink
from cineline.errors import CinelineError
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind

POLL_S = 0.05


@dataclass(frozen=True)
class VideosCase:
    """What is timed.

    Attributes:
        kind: of the model, with random weights.
        stages: P of each arm.
        count: requests at once.
        steps: solver steps of each.
        rounds: runs of each arm.
    """

    kind: WanKind
    stages: Sequence[int]
    count: int
    steps: int
    rounds: int

    @property
    def model(self) -> RandomConfig:
        """8 blocks of width 384, and a VAE of few channels."""
        return RandomConfig(self.kind, layers=8, heads=3, head_dim=128, ffn_dim=1536)

    def requests(self) -> list[VideoRequest]:
        """With guidance, 384 tokens each."""
        side = 256 if self.kind == "ti2v" else 128
        scales = {"guidance_scale": 4.0} | ({} if self.kind == "ti2v" else {"guidance_scale_2": 3.0})
        sizes = {"height": side, "width": side, "num_frames": 21, "num_inference_steps": self.steps}
        return [VideoRequest(prompt="a red square", seed=seed, **sizes, **scales) for seed in range(self.count)]


def time_videos(case: VideosCase, config: DeviceConfig, tell: Callable[[str], None]) -> dict[int, list[Run]]:
    """Runs by number of stages."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = save_random_checkpoint(folder / "model", case.model)
        engines = {
            stages: stack.enter_context(Engine(model, ParallelConfig(pp=stages), **asdict(config)))
            for stages in case.stages
        }
        arms = {
            f"pp={stages}": partial(_write_all, engine, stages, case.requests(), folder)
            for stages, engine in engines.items()
        }
        warm_up = [request.model_copy(update={"num_inference_steps": 1}) for request in case.requests()[:1]]
        for stages, engine in engines.items():
            _write_all(engine, stages, warm_up, folder)
        runs = interleave(arms, case.rounds, tell)
    return {stages: runs[f"pp={stages}"] for stages in case.stages}


def rows(case: VideosCase, results: Mapping[int, Sequence[Run]]) -> list[list[str]]:
    """Arm, seconds, how many times the first arm's speed, what others used."""
    first = results[case.stages[0]]
    return [
        [f"pp={count}", str(Summary.of([run.seconds for run in own])), str(ratios(first, own)), others(own)]
        for count, own in results.items()
    ]


def _write_all(engine: Engine, cores: int, requests: Sequence[VideoRequest], folder: Path) -> float:
    """Seconds from the first submit to the last whole file, this process on as many cores as there are ranks."""
    with _on_cores(cores):
        started = time.monotonic()
        sinks = [
            Sink(engine.submit(request), folder / f"{number}.mp4", None) for number, request in enumerate(requests)
        ]
        while sinks:
            time.sleep(POLL_S)
            if time.monotonic() - started > WAIT_LIMIT_S:
                raise CinelineError(f"Videos are not there after {WAIT_LIMIT_S:.0f} s: use fewer steps.")
            for sink in list(sinks):
                done = sink.handle.done
                sink.update()
                if done:
                    sink.finish()
                    sinks.remove(sink)
        return time.monotonic() - started


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """All threads of this process on the first cores, as the ranks are; back to where they were afterwards."""
    everywhere = os.sched_getaffinity(0)
    _pin(set(sorted(everywhere)[:count]))
    try:
        yield
    finally:
        _pin(everywhere)


def _pin(cores: set[int]) -> None:
    for thread in threading.enumerate():
        if thread.native_id is not None:
            os.sched_setaffinity(thread.native_id, cores)
