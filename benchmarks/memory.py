"""How the weights divide: bytes that each rank reads, and what it holds, against an even share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.footprint import bare_bytes, engine_and_ranks, resident_bytes
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec

THIRDS: dict[WanKind, RandomConfig] = {
    "ti2v": RandomConfig(
        "ti2v", layers=8, heads=4, head_dim=128, ffn_dim=2048, text_layers=14, text_width=512, vae_width=35
    ),
    "t2v": RandomConfig(
        "t2v", layers=4, heads=4, head_dim=128, ffn_dim=2048, text_layers=14, text_width=512, vae_width=60
    ),
}
"""Text encoder and VAE as heavy as all transformers together, some 145 MB each."""

COLUMNS = ("P", "MB read by rank", "MB resident by rank", "fullest, of an even share")


@dataclass(frozen=True)
class Division:
    """The ranks of one number of stages.

    Attributes:
        stages: P. read: bytes of weights by rank. resident: by rank, beyond a rank with next to no model.
        share: what the fullest rank reads, in even shares of the whole.
    """

    stages: int
    read: Sequence[int]
    resident: Sequence[int]
    share: float


def measure(kind: WanKind, stages: Sequence[int], tell: Callable[[str], None]) -> Iterator[Division]:
    """Start each line, without a request, in float32 on the CPU."""
    config = DeviceConfig("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_random_checkpoint(Path(temporary) / "model", THIRDS[kind])
        costs, whole = WanSpec.open(folder).costs("float32", "float32"), 0
        again = costs.experts * costs.transformer.patch_embedding.nbytes("float32")
        for count in [1, *(count for count in stages if count > 1)]:
            tell(f"pp={count}")
            bare = bare_bytes(Path(temporary), kind, count, config, "now")
            with engine_and_ranks(folder, ParallelConfig(pp=count), config) as (engine, pids):
                read = engine.bytes_read
                resident = [resident_bytes(pid, "now") - own for pid, own in zip(pids, bare, strict=True)]
            whole = whole or sum(read)
            twice = again if count > 1 else 0  # the tail embeds where a step is skipped
            assert sum(read) == whole + twice, "the ranks together read every tensor once, but the patch embedding"
            yield Division(count, read, resident, max(read) * count / whole)


def rows(found: Sequence[Division]) -> list[list[str]]:
    """A row of `COLUMNS` each."""
    return [
        [
            str(row.stages),
            *(", ".join(f"{size / 1e6:.0f}" for size in sizes) for sizes in (row.read, row.resident)),
            f"{row.share:.2f}",
        ]
        for row in found
    ]
