"""Bits: what the line makes equals what diffusers makes, whatever the cut and the company."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from oracle import Checkpoint, Oracle, assert_equal, by_pipeline, stacked
from PIL import Image

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.core.config import Dtype
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind

KINDS: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mixed_requests(kind: WanKind) -> list[VideoRequest]:
    """Different sizes, lengths, steps, prompts, seeds; guidance on and off; images where they may be."""
    common = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 4.0}
    if kind != "ti2v":
        common["guidance_scale_2"] = 2.5
    image = {"image": picture(70, 90, seed=1)} if kind != "t2v" else {}
    required = image if kind == "i2v" else {}
    own = [
        image | {"prompt": "a cat runs", "negative_prompt": "blurry", "num_frames": 9, "seed": 11},
        required | {"prompt": "a dog", "height": 32, "width": 96, "guidance_scale": 1.0, "seed": 7},
        required | {"prompt": "rain & snow", "num_inference_steps": 6, "height": 96, "seed": 2**40},
        image | {"prompt": "one picture", "num_frames": 1, "num_inference_steps": 1, "seed": 0},
    ]
    return [VideoRequest(**common | fields) for fields in own]


@pytest.mark.parametrize("vae_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracles_frames_are_the_pipelines(
    kind: WanKind, vae_dtype: Dtype, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    """It decodes the pipeline's latents by itself, so that the pipeline runs once and not twice."""
    folder, request = checkpoint(RandomConfig(kind, seed=3)), mixed_requests(kind)[0]
    pictures = by_pipeline(folder, "float32", request, vae_dtype, "pil")[0]
    assert np.array_equal(oracle.run(folder, "float32", request, vae_dtype)[1], stacked(pictures))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_four_mixed_requests_in_flight_equal_diffusers(
    kind: WanKind, dtype: Dtype, stages: int, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind=kind, seed=3))
    requests = mixed_requests(kind)
    with Engine(folder, ParallelConfig(pp=stages), dtype=dtype, device="cpu", in_flight=4) as engine:
        handles = [engine.submit(request) for request in requests]
        expected = [oracle.run(folder, dtype, request) for request in requests]  # while the ranks are at work
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


@pytest.mark.parametrize(
    ("kind", "dtype", "in_flight"), [("ti2v", "float32", 1), ("t2v", "bfloat16", 2), ("i2v", "float32", 3)]
)
def test_the_number_in_flight_changes_no_bit(
    kind: WanKind, dtype: Dtype, in_flight: int, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind=kind, seed=3))
    requests = mixed_requests(kind)
    with Engine(folder, ParallelConfig(pp=2), dtype=dtype, device="cpu", in_flight=in_flight) as engine:
        handles = [engine.submit(request) for request in requests]
        expected = [oracle.run(folder, dtype, request) for request in requests]  # while the ranks are at work
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


@pytest.mark.parametrize(("kind", "split"), [("ti2v", [5, 2, 1]), ("i2v", [1, 6, 1]), ("t2v", [1, 7])])
def test_an_uneven_split_of_another_checkpoint_equals_diffusers(
    kind: WanKind, split: list[int], checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind, layers=8, heads=3, head_dim=16, ffn_dim=80, seed=17, max_shard_size="100KB"))
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1  # sharded, with an index
    requests = mixed_requests(kind)[:2]
    with Engine(folder, ParallelConfig(pp=len(split), split=split), device="cpu") as engine:
        videos = [handle.result(120) for handle in [engine.submit(request) for request in requests]]
    for request, video in zip(requests, videos, strict=True):
        assert_equal(video, oracle.run(folder, "float32", request))


def test_as_many_stages_as_blocks_equal_diffusers(checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(RandomConfig(layers=5, seed=9))
    request = mixed_requests("ti2v")[0]
    with Engine(folder, ParallelConfig(pp=5), device="cpu") as engine:
        assert_equal(engine.submit(request).result(120), oracle.run(folder, "float32", request))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_odd_numbers_of_tokens_equal_diffusers(dtype: Dtype, checkpoint: Checkpoint, oracle: Oracle) -> None:
    """1, 2, 3, 5, 9, 20, 27, 45 and 54 tokens: the last elements of a tensor go through scalar code."""
    folder = checkpoint(RandomConfig(seed=21))
    shapes = [(32, 32, 1), (32, 64, 1), (32, 32, 9), (160, 32, 1), (96, 96, 1), (160, 32, 13), (96, 96, 9)]
    shapes += [(160, 96, 9), (96, 192, 9)]
    sizes = [{"height": height, "width": width, "num_frames": frames} for height, width, frames in shapes]
    wanted = [
        VideoRequest(prompt="few", image=image, num_inference_steps=2, seed=4, **size)
        for size in sizes
        for image in (None, picture(40, 40, seed=5))
    ]
    with Engine(folder, ParallelConfig(pp=2), device="cpu", dtype=dtype) as engine:
        handles = [engine.submit(request) for request in wanted]
        expected = [oracle.run(folder, dtype, request) for request in wanted]  # while the ranks are at work
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ti2v", "i2v"])
def test_a_vae_in_bfloat16_equals_diffusers(
    kind: WanKind, dtype: Dtype, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind=kind, seed=3))
    request = mixed_requests(kind)[0]
    with Engine(folder, device="cpu", dtype=dtype, vae_dtype="bfloat16") as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(folder, dtype, request, vae_dtype="bfloat16"))


def test_one_engine_after_another_request_gives_the_same_bits(checkpoint: Checkpoint) -> None:
    request = VideoRequest(prompt="again", height=64, width=64, num_frames=5, num_inference_steps=2, seed=8)
    with Engine(checkpoint(RandomConfig(seed=21)), device="cpu", dtype="bfloat16") as engine:
        first, second = engine.submit(request).result(60), engine.submit(request).result(60)
    assert first.latents.equal(second.latents)


def test_another_solver_equals_diffusers_and_takes_its_own_shift(
    checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path
) -> None:
    def with_euler(shift: float) -> Path:
        folder = tmp_path / str(shift)
        shutil.copytree(checkpoint(RandomConfig("t2v", seed=3)), folder)
        FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    plain = mixed_requests("t2v")[0]
    folder = with_euler(3.0)
    with Engine(folder, ParallelConfig(pp=2), device="cpu") as engine:
        handles = [engine.submit(one) for one in (plain, plain.model_copy(update={"flow_shift": 7.0}))]
        videos = [handle.result(60) for handle in handles]
    assert_equal(videos[0], oracle.run(folder, "float32", plain))
    assert_equal(videos[1], oracle.run(with_euler(7.0), "float32", plain))


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, DEISMultistepScheduler])
def test_every_other_solver_that_is_let_in_equals_diffusers(
    solver: type[Any], checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path
) -> None:
    folder = tmp_path / solver.__name__
    shutil.copytree(checkpoint(RandomConfig("t2v", seed=3)), folder)
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    solver(**config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", solver.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    request = mixed_requests("t2v")[2]
    with Engine(folder, ParallelConfig(pp=2), device="cpu") as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(folder, "float32", request))


def test_flow_shift_and_boundary_ratio_of_a_request_replace_the_checkpoints(
    checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig("t2v", seed=3))
    other = checkpoint(RandomConfig("t2v", seed=3, flow_shift=2.0, boundary_ratio=0.5))
    plain = VideoRequest(
        prompt="x", height=32, width=32, num_frames=5, num_inference_steps=6, guidance_scale=3.0, guidance_scale_2=2.0
    )
    replaced = plain.model_copy(update={"flow_shift": 2.0, "boundary_ratio": 0.5})
    with Engine(folder, device="cpu") as engine:
        video = engine.submit(replaced).result(60)
    assert_equal(video, oracle.run(other, "float32", plain))
    assert not video.latents.equal(oracle.run(folder, "float32", plain)[0])


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize(("first", "second"), [(4.0, None), (1.0, 5.0), (0.5, None), (3.0, 1.0), (3.0, 0.5)])
def test_both_experts_scales_are_diffusers(
    kind: WanKind, first: float, second: float | None, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    """A second scale left out is the first; the first alone turns guidance on, for both."""
    folder = checkpoint(RandomConfig(kind, seed=3))
    image = picture(32, 32, seed=1) if kind == "i2v" else None
    sizes = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 6}
    request = VideoRequest(prompt="a", image=image, guidance_scale=first, guidance_scale_2=second, **sizes)
    with Engine(folder, device="cpu") as engine:
        assert_equal(engine.submit(request).result(120), oracle.run(folder, "float32", request))
