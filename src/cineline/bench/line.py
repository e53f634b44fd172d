"""Real compute, one core and one thread a stage: the line against one stage and against diffusers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.bench.measure import Run, Summary, interleave, others, ratios
from cineline.bench.reference import Reference, reference
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.errors import InvalidConfig, shown
from cineline.families.wan.mag_cache import skipped_steps
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.ratios import write_ratios
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.schedule.scheduler import speed_up_limit

DIFFUSERS = "diffusers"
"""The arm that all others are compared with."""

ONE_RANK = str(ParallelConfig())

RATIO = 0.98
"""Of each step's residual to the last one's, where steps are skipped: random weights have none of their own."""

COLUMNS = ("M", "arm", "s a request", "x diffusers", "x one rank", "limit", "others' CPU")


@dataclass(frozen=True)
class LineCase:
    """What is timed.

    Attributes:
        kind: of the model, 8 blocks of width 512 with random weights.
        arms: divided ones, beside one rank and diffusers; with Ulysses among them diffusers' own is an arm too.
        in_flight: M, requests at once; each is timed with all arms.
        steps: solver steps of a request of 1,536 tokens.
        rounds: runs of each arm.
        cache: of all requests, in diffusers too ("mag:T"); for one transformer.

    Raises:
        InvalidConfig: a cache beside two experts.
    """

    kind: WanKind
    arms: Sequence[ParallelConfig]
    in_flight: Sequence[int]
    steps: int
    rounds: int
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.kind != "ti2v":
            raise InvalidConfig(f"cache={shown(self.cache)} is for kind='ti2v' here, not {self.kind!r}: leave one out.")

    @property
    def steps_in_words(self) -> str:
        """With those that are skipped."""
        if self.cache is None:
            return f"{self.steps} steps"
        threshold = float(str(self.requests(1)[0].cache).removeprefix("mag:"))
        skipped = skipped_steps([(RATIO,) * self.steps], threshold, [0] * self.steps)
        return f"{self.steps} steps of which {len(skipped)} are skipped"

    def requests(self, count: int) -> list[VideoRequest]:
        """That many requests of 1,536 tokens, which stop at their latents."""
        side = 512 if self.kind == "ti2v" else 256
        scales = {"guidance_scale": 4.0} | ({} if self.kind == "ti2v" else {"guidance_scale_2": 3.0})
        sizes = {"height": side, "width": side, "num_frames": 21, "num_inference_steps": self.steps}
        prompt = "a red square moving left on a blue background"
        common = {"prompt": prompt, "decode": False, "cache": self.cache} | sizes | scales
        return [VideoRequest(seed=seed, **common) for seed in range(count)]


def time_line(case: LineCase, config: DeviceConfig, tell: Callable[[str], None]) -> dict[int, dict[str, list[Run]]]:
    """Runs by number in flight and arm: diffusers, one rank, the divided ones."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        save_random_checkpoint(folder, RandomConfig(case.kind, layers=8, heads=4, head_dim=128, ffn_dim=2048))
        if case.cache is not None:
            write_ratios(WanSpec.open(folder), {"transformer": {"cond": [RATIO] * case.steps}}, {})
        engines = {
            str(parallel): stack.enter_context(Engine(folder, parallel, **asdict(config)))
            for parallel in dict.fromkeys([ParallelConfig(), *case.arms])
        }
        theirs = {DIFFUSERS: stack.enter_context(reference(folder, config))}
        for ulysses in sorted({parallel.ulysses for parallel in case.arms} - {1}):
            theirs[f"{DIFFUSERS}, ulysses={ulysses}"] = stack.enter_context(reference(folder, config, ulysses=ulysses))
        arms: dict[tuple[int, str], Callable[[], float]] = {}
        for count in case.in_flight:
            requests = case.requests(count)
            for name, pipeline in theirs.items():
                arms[count, name] = partial(_time_reference, pipeline, requests)
            for name, engine in engines.items():
                arms[count, name] = partial(time_requests, engine, requests)
        warm_up = [request.model_copy(update={"num_inference_steps": 1}) for request in case.requests(1)]
        for pipeline in theirs.values():
            _time_reference(pipeline, warm_up)
        for engine in engines.values():
            time_requests(engine, warm_up)
        runs = interleave({f"M={count} {name}": arm for (count, name), arm in arms.items()}, case.rounds, tell)
    return {count: {name: runs[f"M={count} {name}"] for name in (*theirs, *engines)} for count in case.in_flight}


def rows(case: LineCase, results: Mapping[int, Mapping[str, Sequence[Run]]]) -> list[list[str]]:
    """A row of `COLUMNS` for each arm at each M."""
    found = []
    for count, arms in results.items():
        limits = {
            str(parallel): f"{float(speed_up_limit(parallel.pp, count, 2)):.2f}"
            for parallel in [ParallelConfig(), *case.arms]
            if parallel.ranks == parallel.pp
        }
        for name, own in arms.items():
            per_request = Summary.of([run.seconds / count for run in own])
            against = [str(ratios(arms[base], own)) for base in (DIFFUSERS, ONE_RANK)]
            found.append([str(count), name, str(per_request), *against, limits.get(name, ""), others(own)])
    return found


def time_requests(engine: Engine, requests: Sequence[VideoRequest]) -> float:
    """Seconds from the first submit to the last result."""
    started = time.monotonic()
    for handle in [engine.submit(request) for request in requests]:
        handle.result(WAIT_LIMIT_S)
    return time.monotonic() - started


def _time_reference(pipeline: Reference, requests: Sequence[VideoRequest]) -> float:
    """Seconds that diffusers takes for the same requests, one after another."""
    return sum(pipeline.latents(request)[1] for request in requests)
