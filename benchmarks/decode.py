"""Decoding alone, one core and one thread a rank: all on one rank, by layers and by rows."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from cineline.bench.beside import hear, processes
from cineline.bench.measure import Run, Summary, interleave, others, ratios
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.families.wan.random_checkpoint import random_vae
from cineline.families.wan.shapes import WanKind
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.decoder import Decoder, DecoderSlice, boundary_specs
from cineline.families.wan_vae.halves import VaeFiles
from cineline.families.wan_vae.rows import RowDecoder
from cineline.planning.balance import cut_units, sums
from cineline.schedule.words import RECEIVES_AHEAD, Edge, Value, Way
from cineline.transport.axis import Axis, Traffic
from cineline.transport.channel import Edges, Pending
from cineline.transport.mesh import join, open_store
from cineline.transport.queue import queue_of
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

WAYS = ("tail", "layers", "rows")
"""The first one on one rank, the others on as many as are asked for."""

COLUMNS = ("way", "s", "x one rank", "peak MB a rank", "share", "equal", "largest difference", "others' CPU")

WHO = "A decoding process"


@dataclass(frozen=True)
class DecodeCase:
    """What is timed.

    Attributes:
        kind: whose VAE: Wan 2.1's (t2v) or Wan 2.2's (ti2v).
        ranks: that share the decoder.
        chunks: latent frames.
        size: pixels a side.
        width: channels of the decoder's widest pictures (really 96 and 256): few show the memory, many the time.
        rounds: runs of each way.
    """

    kind: WanKind
    ranks: int
    chunks: int
    size: int
    width: int
    rounds: int

    @property
    def latent_shape(self) -> tuple[int, ...]:
        side = self.size // (16 if self.kind == "ti2v" else 8)
        return 1, 16, self.chunks, side, side

    @property
    def vae(self) -> dict[str, int]:
        """Changes to a random VAE's config: as many layers as the real one's decoder."""
        widths = {"base_dim": 8, "decoder_base_dim": self.width} if self.kind == "ti2v" else {"base_dim": self.width}
        return {"num_res_blocks": 2} | widths


@dataclass(frozen=True)
class Decoded:
    """One way, measured.

    Attributes:
        runs: of the whole decode.
        peak_bytes: resident set of the rank that needs most.
        equal: share of the frames' values that are those of one rank.
        difference: largest one, in grey levels.
    """

    runs: Sequence[Run]
    peak_bytes: int
    equal: float
    difference: int


@dataclass(frozen=True)
class _Task:
    """What a process is told first."""

    folder: Path
    way: str
    rank: int
    ranks: int
    latent_shape: tuple[int, ...]
    config: DeviceConfig
    port: int | None


def time_decode(case: DecodeCase, config: DeviceConfig, tell: Callable[[str], None]) -> dict[str, Decoded]:
    """Decode the same random latents in every way."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        random_vae(case.kind, **case.vae).save_pretrained(folder / "vae")
        worlds = {way: stack.enter_context(_world(folder, way, case, config)) for way in WAYS}
        first = {way: _decode(connections, with_frames=True) for way, connections in worlds.items()}
        arms = {way: lambda ranks=connections: _decode(ranks)[0] for way, connections in worlds.items()}
        runs = interleave(arms, case.rounds, tell)
    exact = first[WAYS[0]][1]
    found = {}
    for way, (_, frames, peak_bytes) in first.items():
        difference = np.abs(frames.astype(int) - exact)
        found[way] = Decoded(runs[way], peak_bytes, float((difference == 0).mean()), int(difference.max()))
    return found


def rows(found: Mapping[str, Decoded]) -> list[list[str]]:
    """A row of `COLUMNS` for each way."""
    whole = found[WAYS[0]]
    return [
        [
            *(way, str(Summary.of([run.seconds for run in own.runs])), str(ratios(whole.runs, own.runs))),
            *(f"{own.peak_bytes / 1e6:,.0f}", f"{own.peak_bytes / whole.peak_bytes:.2f}"),
            *(f"{own.equal:.4%}", str(own.difference), others(own.runs)),
        ]
        for way, own in found.items()
    ]


def _decode(connections: Sequence[Connection], with_frames: bool = False) -> tuple[float, np.ndarray, int]:
    """Seconds of the slowest rank, the last one's frames, and the peak of the largest."""
    for connection in connections:
        connection.send(with_frames and connection is connections[-1])
    seconds, frames, peaks = zip(*(hear(connection, WHO) for connection in connections), strict=True)
    return max(seconds), frames[-1], max(peaks)


@contextmanager
def _world(folder: Path, way: str, case: DecodeCase, config: DeviceConfig) -> Iterator[list[Connection]]:
    """The ranks that decode in one way, loaded, each at the other end of a pipe."""
    ranks = 1 if way == WAYS[0] else case.ranks
    cores = len(os.sched_getaffinity(0)) if config.pin_cores else ranks
    with processes(__name__, config.rank_environment(cores), ranks) as connections:
        port = None
        for rank, connection in enumerate(connections):
            connection.send(_Task(folder, way, rank, ranks, case.latent_shape, config, port))
            if rank == 0:
                port = hear(connection, WHO)
        for connection in connections:
            hear(connection, WHO)
        yield connections


@torch.no_grad()
def _serve(connection: Connection) -> None:
    task: _Task = connection.recv()
    if task.config.pin_cores:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[task.rank % len(cores)]})
    if task.config.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    store = open_store(task.port, task.ranks)
    if task.port is None:
        connection.send(store.port)
    device, traffic = queue_of(torch.device(task.config.device)), Traffic()
    edges, mesh = join(store, task.rank, ParallelConfig(pp=task.ranks), device, traffic)
    decode = _make(task, device.device, edges, Axis(mesh, "pp", traffic))
    connection.send(None)
    latents = torch.randn(task.latent_shape, generator=torch.Generator().manual_seed(0))
    while True:
        try:
            with_frames = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        frames = decode(latents)
        seconds = time.monotonic() - started
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send((seconds, np.concatenate(frames) if with_frames else None, peak_bytes))


def _make(task: _Task, device: torch.device, edges: Edges, axis: Axis) -> Callable[[torch.Tensor], list[np.ndarray]]:
    """This rank's part of a decode: from the latents to its frames, chunk by chunk."""
    dtype = getattr(torch, task.config.vae_dtype)
    if task.way == "layers":
        return _Layers(task, dtype, device, edges)
    vae = vae_of(task.folder)
    if task.way == "rows":
        return _Whole(RowDecoder(vae, dtype, device, axis))
    return _Whole(DecoderSlice(vae, None, dtype, device, takes_latents=True))


def vae_of(folder: Path) -> VaeFiles:
    """The VAE in a folder that has no other component."""
    return VaeFiles(AutoencoderKLWan.load_config(folder / "vae"), lambda: Weights(open_source(folder / "vae")))


class _Whole:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __call__(self, latents: torch.Tensor) -> list[np.ndarray]:
        state = self._decoder.start(latents)
        return [self._decoder.run(state, chunk)[0].numpy() for chunk in range(latents.shape[2])]


class _Layers:
    """A slice of an even cut by FLOP, between its edges."""

    def __init__(self, task: _Task, dtype: torch.dtype, device: torch.device, edges: Edges) -> None:
        vae = vae_of(task.folder)
        costs = VaeCosts.of(vae.config)
        cells = task.latent_shape[3] * task.latent_shape[4]
        flop = [unit.flop(cells) for unit in costs.decoder]
        _, counts = cut_units([sums(flop)] * task.ranks)
        first = sum(counts[: task.rank])
        units = range(first, first + counts[task.rank])
        self._slice = DecoderSlice(vae, units, dtype, device, takes_latents=task.rank == 0)
        self._coming = [
            boundary_specs(costs, task.latent_shape, chunk, units.start, dtype) for chunk in range(task.latent_shape[2])
        ]
        self._is_first = task.rank == 0
        self._receiver = edges.incoming.get(Edge(Way.AHEAD, task.rank - 1, task.rank))
        self._sender = edges.outgoing.get(Edge(Way.AHEAD, task.rank, task.rank + 1))

    def __call__(self, latents: torch.Tensor) -> list[np.ndarray]:
        state = self._slice.start(latents if self._is_first else None)
        receiver, sender = self._receiver, self._sender
        coming, posted = deque(self._coming), deque[Pending]()
        frames = []
        for chunk in range(latents.shape[2]):
            while receiver and coming and len(posted) < RECEIVES_AHEAD:
                posted.append(receiver.post(coming.popleft(), keep=True))
            made = self._slice.run(state, chunk, posted.popleft().wait() if receiver else ())
            if sender:
                sender.send(made, Value.CHUNK)
            else:
                frames.append(made[0].numpy())
        return frames


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[sys.argv.index("--fd") + 1])))
