"""Small models with random weights, whole requests: the line on this device against diffusers' pipelines on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from cineline.core.config import DeviceConfig, Dtype, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind
from cineline.media.result import Video

LIMIT_S = 400.0
KINDS: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
SPLIT = ParallelConfig(pp=2, expert_placement="split")
PASSED_ON = (
    *("negative_prompt", "image", "height", "width", "num_frames"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2"),
)

Result = tuple[torch.Tensor, np.ndarray]


def measure(dtype: Dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: of how many requests latents and frames are diffusers', bit for bit."""
    small = device.type == "cpu"
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(8) as pool:
        cases = []
        for kind in KINDS[:2] if small else KINDS:
            folder = save_random_checkpoint(Path(temporary) / kind, RandomConfig(kind))
            arms = [ParallelConfig(pp=2), *([] if small else [ParallelConfig(pp=3, cfg=2)])]
            arms += [SPLIT] if kind == "t2v" and not small else []
            expected = [_diffusers(folder, request, dtype, device) for request in _requests(kind)]
            cases += [(kind, folder, parallel, expected) for parallel in arms]
        config = DeviceConfig(device.type, dtype)
        runs = [pool.submit(_line, folder, _requests(kind), parallel, config) for kind, folder, parallel, _ in cases]
        for (kind, _, parallel, expected), run in zip(cases, runs, strict=True):
            yield {"arm": f"{kind}, {parallel}"} | _judge(run.result(), expected)


def _line(
    folder: Path, requests: Sequence[VideoRequest], parallel: ParallelConfig, config: DeviceConfig
) -> list[Video]:
    with Engine(folder, parallel, in_flight=3, **asdict(config)) as engine:
        return [handle.result(LIMIT_S) for handle in [engine.submit(request) for request in requests]]


def _judge(videos: Sequence[Video], expected: Sequence[Result]) -> dict[str, Any]:
    pairs = list(zip(videos, expected, strict=True))
    latents = sum(torch.equal(video.latents, theirs) for video, (theirs, _) in pairs)
    frames = sum(video.frames is not None and np.array_equal(video.frames, theirs) for video, (_, theirs) in pairs)
    deviation = max(float((video.latents - theirs).abs().max()) for video, (theirs, _) in pairs)
    equal = latents == frames == len(pairs)
    return {"requests": len(pairs), "latents": latents, "frames": frames, "deviation": deviation, "equal": equal}


def _diffusers(folder: Path, request: VideoRequest, dtype: Dtype, device: torch.device) -> Result:
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    cls = WanPipeline if request.image is None else WanImageToVideoPipeline
    pipeline = cls.from_pretrained(folder, vae=vae, torch_dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {name: getattr(request, name) for name in PASSED_ON if getattr(request, name) is not None}

    def run(output: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return pipeline(prompt=request.prompt, generator=generator, output_type=output, **arguments).frames

    return run("latent")[0].float().cpu(), np.stack([np.asarray(picture) for picture in run("pil")[0]])


def _requests(kind: WanKind) -> list[VideoRequest]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    images = {"ti2v": (None, image), "t2v": (None,), "i2v": (image,)}[kind]
    unit = 32 if kind == "ti2v" else 16
    two_experts = {} if kind == "ti2v" else {"guidance_scale_2": 3.0}
    return [
        VideoRequest(
            prompt=f"video number {number}",
            negative_prompt="blurry" if number == 0 else "",
            image=given,
            height=height * unit,
            width=width * unit,
            num_frames=4 * (frames - 1) + 1,
            num_inference_steps=4 + number,
            guidance_scale=1.0 if number == 1 else 4.0,
            seed=number,
            **two_experts,
        )
        for given in images
        for number, (height, width, frames) in enumerate([(2, 2, 2), (3, 3, 3), (1, 5, 1)])
    ]
