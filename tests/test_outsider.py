"""The family of `outsider_family` against diffusers' own pipeline."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from local_line import LocalLine
from outsider_family import LtxSpec, LtxStages
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from cineline import ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig, Dtype

GIVEN: list[dict[str, Any]] = [
    {"prompt": "a cat", "negative_prompt": "dull", "guidance_scale": 3, "height": 64, "num_frames": 9},
    {"prompt": "no guidance", "guidance_scale": 1, "height": 32, "num_frames": 5},
]
REQUESTS = [VideoRequest(width=32, num_inference_steps=3, seed=7, fps=12, **given) for given in GIVEN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("ltx")
    text = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 384}
    shapes: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 16}
    both: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": (1, 1, 1)}
    both |= {"spatio_temporal_scaling": (True, True)}
    both |= {f"decoder_{name}": value for name, value in both.items()} | {"decoder_inject_noise": (False,) * 3}
    vae = AutoencoderKLLTXVideo(latent_channels=8, patch_size=2, down_block_types=("LTXVideoDownBlock3D",) * 2, **both)
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.3, 8))
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.05, shift_terminal=0.1),
        vae=vae,
        text_encoder=T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **text)),
        tokenizer=ByT5Tokenizer(),
        transformer=LTXVideoTransformer3DModel(cross_attention_dim=64, caption_channels=32, num_layers=4, **shapes),
    ).save_pretrained(folder)
    return folder


@cache
def by_diffusers(folder: Path, number: int, dtype: str) -> tuple[torch.Tensor, Any]:
    """Final latents and frames of a request."""
    vae = AutoencoderKLLTXVideo.from_pretrained(folder / "vae")
    pipeline = LTXPipeline.from_pretrained(folder, vae=vae, dtype=getattr(torch, dtype))
    given = {"width": 32, "num_inference_steps": 3, "frame_rate": 12, "generator": torch.Generator().manual_seed(7)}
    last: dict[str, torch.Tensor] = {}
    seen = {"output_type": "np", "callback_on_step_end": lambda *of: last.update(of[-1]) or {}}
    frames = pipeline(**GIVEN[number], **given, **seen).frames[0]
    latents = LTXPipeline._unpack_latents(last["latents"], len(frames) // 4 + 1, GIVEN[number]["height"] // 8, 4)[0]
    return latents, (frames * 255).round().astype(np.uint8)


def assert_exact(folder: Path, dtype: str, number: int, latents: torch.Tensor, frames: Any) -> None:
    wanted = by_diffusers(folder, number, dtype)
    assert torch.equal(latents, wanted[0]) and np.array_equal(frames, wanted[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [{}, {"pp": 3, "split": (2, 1, 1), "vae_split": (0, 0, 1)}, {"pp": 2, "cfg": 2}])
def test_requests_in_flight_beside_a_cancel(folder: Path, dtype: Dtype, axes: dict[str, Any]) -> None:
    config = DeviceConfig(dtype=dtype)
    line = LocalLine(LtxSpec.open(folder), ParallelConfig(**axes), 3, stages_class=LtxStages, config=config)
    gone = REQUESTS[1].model_copy(update={"num_inference_steps": 500})
    made = line.run([*REQUESTS, gone], cancel_after={2: 6})
    for number in range(len(REQUESTS)):
        assert_exact(folder, dtype, number, *made[number])


def test_goes_on_from_a_snapshot(folder: Path) -> None:
    line = LocalLine(LtxSpec.open(folder), ParallelConfig(pp=2), None, stages_class=LtxStages, snapshot_every=1)
    line.run(REQUESTS[:1])
    first, *_ = line.snapshots(0)
    other = LocalLine(LtxSpec.open(folder), ParallelConfig(pp=3), None, stages_class=LtxStages)
    assert_exact(folder, "float32", 0, *other.run(REQUESTS[:1], resumed={0: first})[0])
