"""Bytes that a rank sends for a forward, by axis: counted on the real engine, beside the formula."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.spec import WanSpec
from cineline.schedule.words import Value

MODEL = RandomConfig("t2v", layers=4, heads=4, head_dim=24, ffn_dim=192, boundary_ratio=0.0)
SIZE = {"height": 128, "width": 128, "num_frames": 5}
TEXT_ROWS = 512
FLOAT = 4

ONCE = (Value.LATENTS.value, Value.CONDITIONING.value)
"""What does not go with a forward."""

CASES = (
    ParallelConfig(pp=2),
    ParallelConfig(ulysses=2),
    ParallelConfig(ulysses=4),
    ParallelConfig(ring=2),
    ParallelConfig(tp=2),
    ParallelConfig(tp=4),
    ParallelConfig(cfg=2),
)


@dataclass(frozen=True)
class Sent:
    """What the busiest rank sends for a forward.

    Attributes:
        parallel: the axes, in words.
        counted, computed: bytes.
        formula: what is computed, in symbols.
    """

    parallel: str
    counted: int
    computed: int
    formula: str


def measure(device: DeviceConfig, tell: Callable[[str], None]) -> list[Sent]:
    """Count every case on a small model of two experts, of which only the first runs."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_random_checkpoint(Path(temporary) / "model", MODEL)
        spec = WanSpec.open(folder)
        for parallel in CASES:
            tell(f"{parallel}")
            few, many = (_sent(spec, parallel, device, steps) for steps in (1, 3))
            forwards = 2 * (2 if parallel.cfg == 1 else 1)
            counted = max((many[rank] - few[rank]) // forwards for rank in many)
            found.append(Sent(str(parallel), counted, *formula(spec, parallel)))
    return found


def _sent(spec: WanSpec, parallel: ParallelConfig, device: DeviceConfig, steps: int) -> Counter[int]:
    """Bytes that each rank sends for a request of so many steps, without what does not go with a forward."""
    engine = Engine(spec, parallel, **asdict(device))
    with engine:
        request = VideoRequest(prompt="a", guidance_scale=3, num_inference_steps=steps, decode=False, **SIZE)
        engine.submit(request).result(WAIT_LIMIT_S)
    sent: Counter[int] = Counter()
    for rank, by_kind in engine.traffic.items():
        sent[rank] = sum(nbytes for kind, nbytes in by_kind.items() if kind not in ONCE)
    return sent


def formula(spec: WanSpec, parallel: ParallelConfig) -> tuple[int, str]:
    """Bytes for a forward, and how they come about.

    Legend: S tokens, D width, L blocks of a stage, b bytes of a number, n ranks of the axis.
    """
    job = spec.resolve(VideoRequest(prompt="a", num_inference_steps=1, **SIZE), 0)
    _, channels, frames, height, width = spec.latent_shape(job)
    tokens = frames * height * width // 4
    dim = spec.transformer["num_attention_heads"] * spec.transformer["attention_head_dim"]
    blocks = spec.layers // parallel.pp
    hidden = tokens * dim * FLOAT
    if parallel.ulysses > 1:
        n = parallel.ulysses
        gathered = tokens // n * channels * 4 * FLOAT * (n - 1)  # the prediction, at the end
        return blocks * 4 * hidden * (n - 1) // n**2 + gathered, "4 L S D b (n-1) / n^2"
    if parallel.ring > 1:
        n = parallel.ring
        gathered = tokens // n * channels * 4 * FLOAT * (n - 1)
        return blocks * 2 * hidden * (n - 1) // n + gathered, "2 L S D b (n-1) / n"
    if parallel.tp > 1:
        n = parallel.tp
        norms = (3 * tokens + TEXT_ROWS) * FLOAT
        return blocks * 2 * (n - 1) * (3 * hidden + norms) // n, "6 L S D b (n-1) / n"
    if parallel.cfg > 1:
        return channels * frames * height * width * FLOAT, "the latents"
    return hidden, "S D b"
