"""The VAE's decoder at true size, a few latent frames: diffusers' whole, and its slices one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.video_processor import VideoProcessor

from benchmarks.gpu.clock import forget, peak_gb, timed
from benchmarks.gpu.random_wan import RandomSpec, RandomWeights, random_spec
from benchmarks.gpu.transformer import SIZES, SMALL_SIZES
from cineline.core.config import ParallelConfig
from cineline.families.frames import quantise
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan_vae.decoder import DecoderSlice
from cineline.families.wan_vae.halves import DECODER, VaeFiles, load_half, statistics
from cineline.planning.cut import default_cut

FRAMES = 3
"""Latent ones: memory does not grow with more."""


def measure(model: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: seconds, peak memory, whether the frames are diffusers', float32."""
    small = device.type == "cpu"
    height, width, _ = (SMALL_SIZES if small else SIZES)[model]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        spec = random_spec(model, Path(folder), small)
        shape = 1, int(spec.vae["z_dim"]), FRAMES, height // spec.vae_scale, width // spec.vae_scale
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        frames, row = _diffusers(spec, latents, device)
        yield row
        for stages in (1, 4):
            yield from _slices(spec, latents, frames, device, stages)


def _vae(spec: RandomSpec) -> VaeFiles:
    return VaeFiles(spec.vae, partial(RandomWeights, spec.component("vae")))


def _diffusers(spec: RandomSpec, latents: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    forget(device)
    model, _ = load_half(_vae(spec), DECODER, torch.float32, device)
    mean, inverse_std = statistics(model.config, latents.dtype, latents.device)
    frames: list[torch.Tensor] = []

    def decode() -> None:
        frames[:] = [model.decode(latents / inverse_std + mean, return_dict=False)[0]]

    row = {"arm": "diffusers", "seconds": timed(decode, device, 2), "peak_gb": peak_gb(device)}
    return quantise(VideoProcessor(vae_scale_factor=spec.vae_scale), frames[0]).cpu(), row


def _slices(
    spec: RandomSpec, latents: torch.Tensor, expected: torch.Tensor, device: torch.device, stages: int
) -> Iterator[dict[str, Any]]:
    parallel = default_cut(ModelCosts.of(spec, "float32", "float32"), spec.place(ParallelConfig(pp=stages)))
    assert parallel.vae_split is not None
    chunks: list[tuple[torch.Tensor, ...]] = [()] * FRAMES
    for stage in range(stages):
        forget(device)
        start = sum(parallel.vae_split[:stage])
        units = range(start, start + parallel.vae_split[stage])
        part = DecoderSlice(_vae(spec), units, torch.float32, device, stage == 0)
        made: list[tuple[torch.Tensor, ...]] = []

        def decode(part: DecoderSlice = part, given: Any = chunks, made: Any = made, first: bool = stage == 0) -> None:
            state = part.start(latents if first else None)
            made[:] = [part.run(state, chunk, given[chunk]) for chunk in range(FRAMES)]

        row: dict[str, Any] = {"arm": f"slice {stage + 1} of {stages}", "units": list(units)}
        row |= {"seconds": timed(decode, device, 2), "peak_gb": peak_gb(device)}
        row["weights_gb"] = round(part.bytes_read / 1e9, 3)
        chunks = list(made)
        if stage == stages - 1:
            frames = torch.cat([frame for (frame,) in chunks]).cpu()
            row["equal"] = torch.equal(frames, expected)
            row["deviation"] = int((frames.int() - expected.int()).abs().max())
        yield row
        del part, decode
