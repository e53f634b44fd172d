"""What rank processes hold: resident memory now and at most, beyond what a process with the libraries has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import psutil

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.launch import NURSERY, WORKER
from cineline.errors import CinelineError
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind

FIELDS = {"now": "VmRSS", "most": "VmHWM"}
"""Of /proc/PID/status, in KiB."""

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
"""With this in its environment glibc gives back every freed block of 1 MB and more, at the price of time. By itself it
keeps many below 32 MB for later, so that resident memory is more than ever was in use."""


@contextmanager
def memory_returned() -> Iterator[None]:
    """Ranks that start here hold no more than what is in use."""
    with patch.dict(os.environ, RETURNED):
        yield


@contextmanager
def engine_and_ranks(
    model: Path, parallel: ParallelConfig, config: DeviceConfig, in_flight: int | None = None
) -> Iterator[tuple[Engine, list[int]]]:
    """An engine and its ranks' process numbers, first to last."""
    before = set(psutil.pids())
    with Engine(model, parallel, in_flight=in_flight, **asdict(config)) as engine:
        started = [child for child in psutil.Process().children() if child.pid not in before]
        ranks = [child for child in started if WORKER in child.cmdline()]
        for child in started:
            if NURSERY in child.cmdline():  # it has forked them
                ranks += child.children()
        yield engine, [child.pid for child in sorted(ranks, key=lambda child: child.create_time())]


def resident_bytes(pid: int, when: str) -> int:
    """Resident memory of a process, "now" or at "most" so far.

    Raises:
        CinelineError: this system does not say.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError as error:
        raise CinelineError(f"The memory of process {pid} cannot be read ({error}): this needs Linux.") from None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(FIELDS[when]))


def bare_bytes(folder: Path, kind: WanKind, stages: int, config: DeviceConfig, when: str) -> list[int]:
    """The same of ranks with next to no model, after a request of one token."""
    tiny = folder / f"tiny-{kind}"
    if not tiny.exists():
        save_random_checkpoint(tiny, RandomConfig(kind))
    side = 32 if kind == "ti2v" else 16
    scales = {} if kind == "ti2v" else {"guidance_scale_2": 3.0}
    request = VideoRequest(prompt="a", height=side, width=side, num_frames=1, num_inference_steps=1, **scales)
    with engine_and_ranks(tiny, ParallelConfig(pp=stages), config) as (engine, pids):
        engine.submit(request).result(WAIT_LIMIT_S)
        return [resident_bytes(pid, when) for pid in pids]
