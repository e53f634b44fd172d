"""The VAE's decoder whole, cut by layers, shared out by rows, and in tiles, against diffusers' own decode."""

from __future__ import annotations

import json
import queue
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from oracle import frames_of
from torch import Tensor

from cineline.families.wan.random_checkpoint import random_vae
from cineline.families.wan.shapes import WanKind
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.decoder import DecoderSlice, TiledDecoder, boundary_specs
from cineline.families.wan_vae.halves import VaeFiles
from cineline.families.wan_vae.rows import RowDecoder
from cineline.planning.balance import cut_units, sums
from cineline.transport.axis import Axis, Traffic
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

CPU = torch.device("cpu")
VaeFolder = Callable[..., Path]
KINDS = ["t2v", "ti2v"]
"""With the VAE of Wan 2.1 and that of Wan 2.2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> VaeFolder:
    """A checkpoint's folder with a random VAE in it, and nothing else."""

    @cache
    def make(kind: WanKind, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp("vae")
        torch.manual_seed(0)
        values = (list(value) if isinstance(value, tuple) else value for value in changes.values())
        lists: dict[str, Any] = dict(zip(changes, values, strict=True))
        random_vae(kind, **lists).save_pretrained(path / "vae")
        return path

    return make


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "vae" / "config.json").read_text())
    return config


def random_latents(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(frames + height))


def vae_of(folder: Path) -> VaeFiles:
    return VaeFiles(config_of(folder), lambda: Weights(open_source(folder / "vae")))


def by_diffusers(folder: Path, latents: Tensor, dtype: torch.dtype, tiled: bool = False) -> np.ndarray:
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=dtype)
    if tiled:
        vae.enable_tiling()
    return frames_of(vae, latents)


@torch.no_grad()
def by_slices(
    folder: Path, latents: Tensor, stops: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, list[int]]:
    """Frames through slices that end at those units, and the bytes that each slice read."""
    costs = VaeCosts.of(config_of(folder))
    slices = [
        DecoderSlice(vae_of(folder), range(start, stop), dtype, CPU, takes_latents=number == 0)
        for number, (start, stop) in enumerate(pairwise([0, *stops]))
    ]
    states = [each.start(latents if number == 0 else None) for number, each in enumerate(slices)]
    frames = []
    for chunk in range(latents.shape[2]):
        sent: tuple[Tensor, ...] = ()
        for stop, each, state in zip(stops, slices, states, strict=True):
            made = each.run(state, chunk, sent)
            specs = boundary_specs(costs, latents.shape, chunk, stop, dtype)
            assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(t.shape), t.dtype) for t in made]
            sent = tuple(tensor.contiguous() for tensor in made)  # as an edge does
        frames.append(sent[0].numpy())
    return np.concatenate(frames), [each.bytes_read for each in slices]


@torch.no_grad()
def by_one_rank(decoder: Any, latents: Tensor) -> np.ndarray:
    state = decoder.start(latents)
    return np.concatenate([decoder.run(state, chunk)[0].numpy() for chunk in range(latents.shape[2])])


class LocalAxis(Axis):
    """Ranks that are threads: each pair has a queue in each direction."""

    def __init__(self, size: int, index: int, queues: Mapping[tuple[int, int], queue.SimpleQueue[Tensor]]) -> None:
        super().__init__(None, "pp", Traffic())
        self.size, self.index, self._queues = size, index, queues

    def exchange(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        for rank, tensor in sent.items():
            assert tensor.is_contiguous()
            self._queues[self.index, rank].put(tensor.clone())
        for rank, tensor in received.items():
            tensor.copy_(self._queues[rank, self.index].get(timeout=30))
        self._count(sum(tensor.nbytes for tensor in sent.values()))


def by_rows(folder: Path, latents: Tensor, ranks: int) -> np.ndarray:
    """Frames of the last rank; the others have none."""
    queues: dict[tuple[int, int], queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)
    decoders = [
        RowDecoder(vae_of(folder), torch.float32, CPU, LocalAxis(ranks, index, queues)) for index in range(ranks)
    ]
    with ThreadPoolExecutor(ranks) as pool:
        frames = list(pool.map(by_one_rank, decoders, [latents] * ranks))
    assert all(others.shape[1] == 0 for others in frames[:-1])
    return frames[-1]


def assert_close(frames: np.ndarray, expected: np.ndarray) -> None:
    assert frames.shape == expected.shape
    difference = np.abs(frames.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_has_diffusers_bits(kind: WanKind, dtype: torch.dtype, folder: VaeFolder) -> None:
    path = folder(kind)
    count = len(VaeCosts.of(config_of(path)).decoder)
    latents = random_latents(4, 2, 3)
    expected = by_diffusers(path, latents, dtype)
    for cut in range(count + 1):
        assert np.array_equal(by_slices(path, latents, [cut, count], dtype)[0], expected), f"cut before unit {cut}"


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 2), (3, 5, 3), (6, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_three_and_four_slices_some_of_them_empty(kind: WanKind, size: tuple[int, int, int], folder: VaeFolder) -> None:
    path = folder(kind)
    count = len(VaeCosts.of(config_of(path)).decoder)
    latents = random_latents(*size)
    expected = by_diffusers(path, latents, torch.float32)
    cuts = list(combinations_with_replacement(range(count + 1), 3))
    for stops in [*cuts[:: len(cuts) // 6], (0, 0, count), (count, count, count), (0, 5)]:
        assert np.array_equal(by_slices(path, latents, [*stops, count])[0], expected), stops


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t2v", {"num_res_blocks": 2, "temperal_downsample": (True, False, True)}),
        ("ti2v", {"num_res_blocks": 0, "temperal_downsample": (True, True, True)}),
        ("ti2v", {"num_res_blocks": 2, "dim_mult": (1, 2, 2), "temperal_downsample": (False, True)}),
    ],
)
def test_other_shapes_of_decoder(kind: WanKind, changes: dict[str, Any], folder: VaeFolder) -> None:
    path = folder(kind, **changes)
    count = len(VaeCosts.of(config_of(path)).decoder)
    latents = random_latents(3, 2, 2)
    expected = by_diffusers(path, latents, torch.float32)
    for cut in range(0, count + 1, 2):
        assert np.array_equal(by_slices(path, latents, [cut, count])[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_read_their_own_weights_and_the_layout_counts_them(kind: WanKind, folder: VaeFolder) -> None:
    path = folder(kind)
    units = VaeCosts.of(config_of(path)).decoder
    stops = list(range(1, len(units) + 1))
    read = by_slices(path, random_latents(1, 1, 1), stops)[1]
    post_quant_conv = 16 * 16 + 16
    read[0] -= 4 * post_quant_conv
    assert read == [unit.parameters.nbytes("float32") for unit in units]
    assert (
        DecoderSlice(vae_of(path), None, torch.float32, CPU, takes_latents=True).bytes_read
        == sum(read) + 4 * post_quant_conv
    )


def test_flop_of_the_real_decoders() -> None:
    """Against figures that were found by counting in torch: the even cut of Wan 2.1's, and its size."""
    wan21 = VaeCosts.of({}).decoder
    flop = [unit.flop(60 * 104) for unit in wan21]
    cut = [unit.name for unit in wan21].index("up_blocks.2.resnets.1") + 1
    assert sum(flop[:cut]) / sum(flop) == pytest.approx(0.487, abs=0.003)
    assert cut_units([sums(flop)] * 2)[1][0] == cut


def test_units_are_cut_so_that_the_dearest_part_costs_least() -> None:
    costs = [3, 1, 4, 1, 5, 9, 2, 6]
    cost, counts = cut_units([sums(costs)] * 3)
    assert sum(counts) == len(costs)
    every = [(0, a, b, 8) for a in range(9) for b in range(a, 9)]
    least = min(max(sum(costs[i:j]) for i, j in pairwise(stops)) for stops in every)
    stops = [sum(counts[:stage]) for stage in range(4)]
    assert max(sum(costs[i:j]) for i, j in pairwise(stops)) == least == cost


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_close_to_diffusers(kind: WanKind, ranks: int, folder: VaeFolder) -> None:
    path = folder(kind, base_dim=16)
    for size in [(4, 5, 3), (2, 2, 2), (1, 1, 3)]:
        latents = random_latents(*size)
        assert_close(by_rows(path, latents, ranks), by_diffusers(path, latents, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_diffusers_tiles(kind: WanKind, folder: VaeFolder) -> None:
    path = folder(kind)
    latents = random_latents(2, 2, 40 if kind == "t2v" else 20)
    tiles = by_one_rank(TiledDecoder(vae_of(path), torch.float32, CPU), latents)
    assert np.array_equal(tiles, by_diffusers(path, latents, torch.float32, tiled=True))
    assert not np.array_equal(tiles, by_diffusers(path, latents, torch.float32))
