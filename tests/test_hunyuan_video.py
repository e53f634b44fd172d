"""HunyuanVideo 1.5: bits of diffusers' own pipeline, costs, rules."""

from __future__ import annotations

import json
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from local_line import LocalLine
from oracle import assert_equal, stacked
from pretended_family import assert_in_good_order
from random_families import save_hunyuan_video
from test_pretended_device import Pretend
from transformers import T5Config, T5EncoderModel

from cineline import (
    CheckpointError,
    Engine,
    InvalidConfig,
    InvalidRequest,
    ParallelConfig,
    RequestCancelled,
    VideoRequest,
)
from cineline.core.config import DeviceConfig, Dtype, Place
from cineline.core.family import plannable
from cineline.families.hunyuan_video.known import KNOWN
from cineline.families.hunyuan_video.spec import HunyuanVideoSpec
from cineline.families.hunyuan_video.stages import HunyuanVideoStages
from cineline.families.registry import known_model, open_checkpoint
from cineline.planning.cut import default_cut
from cineline.planning.hardware import LINKS, devices_of
from cineline.planning.planner import Task, plan, planned_job

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
NAME = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hunyuan_video(tmp_path_factory.mktemp("hunyuan") / "model")


def requests() -> list[VideoRequest]:
    """Of different sizes, lengths and prompts, one with words to be written; with guidance and without."""
    own: list[dict[str, Any]] = [
        {"height": 16, "width": 24, "num_frames": 5, "guidance_scale": 4.0, "negative_prompt": "blurry", "seed": 11},
        {"height": 24, "width": 16, "num_frames": 9, "guidance_scale": 1.0, "seed": 7},
    ]
    prompts = ('a sign with "cats" and "dogs"', "a cat")
    return [VideoRequest(prompt=prompts[n], num_inference_steps=2, **fields) for n, fields in enumerate(own)]


@cache
def _pipeline(folder: Path, dtype: str, vae_dtype: str = "float32") -> Any:
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(folder, subfolder="vae", dtype=getattr(torch, vae_dtype))
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder, vae=vae, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _by_pipeline(folder: Path, dtype: str, number: int, vae_dtype: str = "float32") -> tuple[torch.Tensor, np.ndarray]:
    """The pipeline's latents; its own end, by the same words, makes frames of them."""
    pipeline, request = _pipeline(folder, dtype, vae_dtype), requests()[number]
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps")
    pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance_scale)
    noise = torch.Generator("cpu").manual_seed(int(request.seed))
    latents = pipeline(generator=noise, output_type="latent", **{name: getattr(request, name) for name in names}).frames
    with torch.no_grad():
        pixels = pipeline.vae.decode(
            latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor, return_dict=False
        )[0]
    return latents[0].float(), stacked(pipeline.video_processor.postprocess_video(pixels, output_type="pil")[0])


@pytest.mark.parametrize("parallel", [{}, {"pp": 2, "cfg": 2}, {"pp": 3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_requests_in_flight_beside_a_cancel_equal_diffusers(
    dtype: Dtype, parallel: dict[str, Any], folder: Path
) -> None:
    wanted = requests()
    with Engine(folder, ParallelConfig(**parallel), dtype=dtype, device="cpu", in_flight=3) as engine:
        cancelled, *kept = [engine.submit(one) for one in (wanted[0], *wanted)]
        while cancelled.progress[0] < 1:
            time.sleep(0.001)
        cancelled.cancel()
        expected = [_by_pipeline(folder, dtype, number) for number in range(len(wanted))]  # while the ranks work
        for handle, one in zip(kept, expected, strict=True):
            assert_equal(handle.result(60), one)
    with pytest.raises(RequestCancelled):
        cancelled.result(0)


def test_an_uneven_split_and_another_shift_equal_diffusers(tmp_path: Path) -> None:
    other = save_hunyuan_video(tmp_path / "model", layers=4)
    request = requests()[1].model_copy(update={"flow_shift": 3.0, "decode": False, "sigmas": (1.0, 0.5)})
    with Engine(other, ParallelConfig(pp=2, split=(1, 3)), device="cpu") as engine:
        found = engine.submit(request).result(60).latents
    pipeline = _pipeline(other, "float32")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=3.0)
    pipeline.guider = pipeline.guider.new(guidance_scale=1.0)
    noise = torch.Generator("cpu").manual_seed(int(request.seed))
    fields = {name: getattr(request, name) for name in ("prompt", "height", "width", "num_frames")}
    expected = pipeline(generator=noise, output_type="latent", sigmas=[1.0, 0.5], **fields).frames
    assert torch.equal(found, expected[0])


def test_half_precision_equals_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(pp=2), dtype="float16", device="cpu") as engine:
        assert_equal(engine.submit(requests()[0]).result(60), _by_pipeline(folder, "float16", 0))


def test_a_vae_in_bfloat16_equals_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(pp=2), dtype="bfloat16", vae_dtype="bfloat16", device="cpu") as engine:
        for number, handle in enumerate([engine.submit(one) for one in requests()]):
            assert_equal(handle.result(60), _by_pipeline(folder, "bfloat16", number, "bfloat16"))


def test_a_request_goes_on_from_a_snapshot_on_another_line(folder: Path) -> None:
    spec, config = HunyuanVideoSpec.open(folder), DeviceConfig(dtype="bfloat16")
    stages: type[Any] = HunyuanVideoStages
    first = LocalLine(spec, ParallelConfig(pp=2), None, stages_class=stages, snapshot_every=1, config=config)
    first.run(requests()[:1])
    (taken,) = first.snapshots(0)
    again = LocalLine(spec, ParallelConfig(pp=3), None, stages_class=stages, config=config)
    ((latents, frames),) = again.run(requests()[:1], resumed={0: taken}).values()
    expected = _by_pipeline(folder, "bfloat16", 0)
    assert torch.equal(latents, expected[0]) and frames is not None and np.array_equal(frames, expected[1])


def test_ranks_that_share_weights_come_near_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(tp=2), device="cpu") as engine:
        video = engine.submit(requests()[0]).result(60)
        first, second = engine.bytes_read
    assert second < first
    assert torch.allclose(video.latents, _by_pipeline(folder, "float32", 0)[0], atol=1e-4)


@pytest.mark.parametrize("parallel", [ParallelConfig(pp=3), ParallelConfig(tp=2)], ids=str)
def test_a_rank_reads_what_the_planner_says_it_holds(parallel: ParallelConfig, folder: Path) -> None:
    costs = HunyuanVideoSpec.open(folder).costs("float32", "float32")
    with Engine(folder, parallel, device="cpu") as engine:
        read = engine.bytes_read
    filled = default_cut(costs, parallel)
    assert read == [costs.held_bytes(filled, parallel.place(rank)) for rank in range(parallel.ranks)]


def test_weights_of_the_real_model() -> None:
    spec = KNOWN[NAME]
    costs = spec.costs("bfloat16", "float32")
    with torch.device("meta"):
        model, vae = HunyuanVideo15Transformer3DModel(), AutoencoderKLHunyuanVideo15()
        glyphs = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **spec.configs["text_encoder_2"]))
    assert costs.transformer.whole.count == sum(one.numel() for one in model.parameters())
    assert sum(unit.count for unit in costs.decoder) == sum(one.numel() for one in vae.decoder.parameters())
    assert costs.beside.count == sum(one.numel() for one in glyphs.parameters())
    assert round(costs.transformer.whole.count / 1e9, 1) == 8.3
    filled = default_cut(costs, spec.place(ParallelConfig(pp=4)))
    held = [costs.held_bytes(filled, Place(pp=stage)) for stage in range(4)]
    assert max(held) < 1.2 * sum(held) / 4


def test_the_planner_divides_it_by_its_name() -> None:
    known = known_model(NAME)
    assert known is not None
    spec = plannable(known)
    job = planned_job(spec, {"num_frames": 33})
    assert (job.height, job.width, job.steps, job.branches) == (480, 848, 50, 2)
    best = plan(Task(spec, devices_of("2xH100"), LINKS["pcie4"], job, dtype="bfloat16", vae_dtype="bfloat16")).single
    assert best is not None and best.parallel.ranks == 2


def test_a_device_does_what_the_cpu_does(folder: Path, pretending: Pretend) -> None:
    assert_in_good_order(folder, {"pp": 2}, requests(), pretending)


def test_it_is_found_by_its_index_alone(folder: Path) -> None:
    spec = open_checkpoint(folder)
    assert isinstance(spec, HunyuanVideoSpec)
    job = spec.resolve(VideoRequest(prompt="a cat"), 0)
    assert (job.height, job.width, job.num_frames, job.fps) == (480, 848, 121, 24)
    assert (job.steps, job.guidance_scale, job.branches) == (50, 4.0, 2)  # the scale is the checkpoint's guider's


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"height": 18}, "height=18 is not a positive multiple of 4: use 16 or 20"),
        ({"num_frames": 6}, "num_frames=6 is not 4k\\+1: use 5 or 9"),
        ({"num_frames": 0}, "num_frames=0 is not from 1 to"),
        ({"fps": 0}, "fps=0 is not from 1 to 1000"),
        ({"flow_shift": 0.0}, "flow_shift=0.0 is not a positive number"),
        ({"boundary_ratio": 0.5}, "boundary_ratio=0.5 is not for"),
    ],
)
def test_a_field_that_breaks_a_rule_is_refused(fields: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=words):
        HunyuanVideoSpec.open(folder).resolve(VideoRequest(**{"prompt": "a"} | fields), 0)


@pytest.mark.parametrize(
    ("axes", "words"),
    [({"ring": 2}, "attend together here"), ({"tp": 4}, "does not divide the model's 2 attention heads: use one of")],
)
def test_an_axis_that_does_not_fit_is_refused(axes: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        Engine(folder, ParallelConfig(**axes), device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"use_meanflow": True}, "a super-resolution model's"),
        ("guider/guider_config.json", {"guidance_rescale": 0.7}, "a rescaled guidance"),
        ("guider/guider_config.json", {"start": 0.2}, "guidance that begins later"),
        ("guider/guider_config.json", {"stop": 0.8}, "guides only some steps"),
        ("guider/guider_config.json", {"enabled": False}, "guides only some steps, or none"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "a shift that follows the size"),
        ("model_index.json", {"_class_name": "HunyuanVideo15ImageToVideoPipeline"}, "Cineline runs"),
    ],
)
def test_a_checkpoint_that_is_not_run_is_refused(
    file: str, changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(copy)
