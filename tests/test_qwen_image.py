"""Qwen-Image, two streams of tokens: bits of diffusers' own pipeline, costs, rules."""

from __future__ import annotations

import json
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from local_line import LocalLine
from oracle import assert_equal
from PIL import Image
from pretended_family import assert_in_good_order
from random_families import save_qwen_image
from safetensors.torch import save_file
from test_pretended_device import Pretend
from transformers import Qwen2_5_VLForConditionalGeneration

from cineline import (
    CheckpointError,
    Engine,
    InvalidConfig,
    InvalidRequest,
    ParallelConfig,
    RequestCancelled,
    VideoRequest,
)
from cineline.bench.exact import models
from cineline.cli import main
from cineline.core.config import DeviceConfig, Dtype, ModelFiles, Place, TextEncoder
from cineline.core.family import plannable
from cineline.core.lora import Lora
from cineline.families.qwen_image.known import KNOWN
from cineline.families.qwen_image.spec import QwenImageSpec
from cineline.families.qwen_image.stages import QwenImageStages
from cineline.families.registry import known_model, open_checkpoint, with_loras
from cineline.planning.cut import default_cut
from cineline.planning.hardware import LINKS, devices_of
from cineline.planning.planner import Task, plan, planned_job

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_image(tmp_path_factory.mktemp("qwen") / "model")


def requests() -> list[VideoRequest]:
    """Of different sizes, prompts and steps; with true guidance and without."""
    own: list[dict[str, Any]] = [
        {"height": 64, "width": 48, "guidance_scale": 4.0, "negative_prompt": "blurry", "seed": 11},
        {"height": 32, "width": 96, "guidance_scale": 1.0, "num_inference_steps": 2, "seed": 7},
    ]
    return [VideoRequest(**{"prompt": "a cat" * (2 + n), "num_inference_steps": 3} | one) for n, one in enumerate(own)]


@cache
def _pipeline(folder: Path, dtype: str, vae_dtype: str = "float32") -> Any:
    vae = AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae", dtype=getattr(torch, vae_dtype))
    pipeline = QwenImagePipeline.from_pretrained(folder, vae=vae, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def _by_pipeline(folder: Path, dtype: str, number: int, vae_dtype: str = "float32") -> tuple[torch.Tensor, np.ndarray]:
    pipeline, request = _pipeline(folder, dtype, vae_dtype), requests()[number]
    arguments = {name: getattr(request, name) for name in ("prompt", "height", "width", "num_inference_steps")}
    arguments |= {"true_cfg_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}
    made = []
    for kind in ("latent", "pil"):
        noise = torch.Generator("cpu").manual_seed(int(request.seed))
        made.append(pipeline(generator=noise, output_type=kind, **arguments).images)
    unpacked = pipeline._unpack_latents(made[0], request.height, request.width, pipeline.vae_scale_factor)
    return unpacked[0].float(), np.stack([np.asarray(picture) for picture in made[1]])


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"pp": 3, "split": (1, 2, 1)}, {"cfg": 2, "pp": 2}], ids=str)
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


def test_levels_that_are_given_equal_diffusers(folder: Path) -> None:
    request = requests()[1].model_copy(update={"sigmas": (1.0, 0.6, 0.3), "num_inference_steps": None, "decode": False})
    with Engine(folder, ParallelConfig(pp=2), device="cpu") as engine:
        found = engine.submit(request).result(60).latents
    pipeline, noise = _pipeline(folder, "float32"), torch.Generator("cpu").manual_seed(int(request.seed))
    arguments = {"prompt": request.prompt, "height": request.height, "width": request.width, "true_cfg_scale": 1.0}
    packed = pipeline(generator=noise, output_type="latent", sigmas=[1.0, 0.6, 0.3], **arguments).images
    assert torch.equal(found, pipeline._unpack_latents(packed, request.height, request.width, 8)[0])


def test_the_command_writes_a_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = requests()[1]
    told = {name: str(getattr(request, name)) for name in ("height", "width", "guidance_scale", "seed")}
    options = [word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", value)]
    output = tmp_path / "cat.png"
    words = ["generate", request.prompt, "--model", str(folder), "--num-inference-steps", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["cineline", *words, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert np.array_equal(np.asarray(Image.open(output)), _by_pipeline(folder, "float32", 1)[1][0])


def test_half_precision_equals_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(pp=2), dtype="float16", device="cpu") as engine:
        assert_equal(engine.submit(requests()[0]).result(60), _by_pipeline(folder, "float16", 0))


def test_a_vae_in_bfloat16_equals_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(pp=2), dtype="bfloat16", vae_dtype="bfloat16", device="cpu") as engine:
        for number, handle in enumerate([engine.submit(one) for one in requests()]):
            assert_equal(handle.result(60), _by_pipeline(folder, "bfloat16", number, "bfloat16"))


def test_a_request_goes_on_from_a_snapshot_on_another_line(folder: Path) -> None:
    spec, config = QwenImageSpec.open(folder), DeviceConfig(dtype="bfloat16")
    first = LocalLine(spec, ParallelConfig(pp=2), None, stages_class=QwenImageStages, snapshot_every=1, config=config)
    first.run(requests()[:1])
    taken = first.snapshots(0)
    assert [each.step for each in taken] == [1, 2]
    again = LocalLine(spec, ParallelConfig(pp=3), None, stages_class=QwenImageStages, config=config)
    for latents, frames in again.run([requests()[0]] * 2, resumed=dict(enumerate(taken))).values():
        expected = _by_pipeline(folder, "bfloat16", 0)
        assert torch.equal(latents, expected[0]) and frames is not None and np.array_equal(frames, expected[1])


@pytest.mark.parametrize("home", ["reload", "cpu"])
def test_a_text_encoder_that_is_read_anew_or_kept_by_the_host(home: TextEncoder, folder: Path) -> None:
    with Engine(folder, ParallelConfig(pp=2), device="cpu", text_encoder=home) as engine:
        assert_equal(engine.submit(requests()[1]).result(60), _by_pipeline(folder, "float32", 1))


def test_ranks_that_share_weights_come_near_diffusers(folder: Path) -> None:
    with Engine(folder, ParallelConfig(tp=2), device="cpu") as engine:
        video = engine.submit(requests()[0]).result(60)
        first, second = engine.bytes_read
    assert second < first
    assert torch.allclose(video.latents, _by_pipeline(folder, "float32", 0)[0], atol=1e-4)


@pytest.mark.parametrize("parallel", [ParallelConfig(pp=3), ParallelConfig(tp=2), ParallelConfig(cfg=2)], ids=str)
def test_a_rank_reads_what_the_planner_says_it_holds(parallel: ParallelConfig, folder: Path) -> None:
    costs = QwenImageSpec.open(folder).costs("float32", "float32")
    with Engine(folder, parallel, device="cpu") as engine:
        read = engine.bytes_read
    filled = default_cut(costs, parallel)
    assert read == [costs.held_bytes(filled, parallel.place(rank)) for rank in range(parallel.ranks)]


def test_weights_of_the_real_model() -> None:
    spec = KNOWN["Qwen/Qwen-Image"]
    costs = spec.costs("bfloat16", "float32")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
        vae = AutoencoderKLQwenImage()
    assert costs.transformer.whole.count == sum(one.numel() for one in model.parameters())
    decoder = sum(one.numel() for half in (vae.decoder, vae.post_quant_conv) for one in half.parameters())
    assert sum(unit.count for unit in costs.decoder) + costs.before_decoder.count == decoder
    assert round(costs.transformer.whole.count / 1e9, 1) == 20.4
    assert round(costs.text.whole.count / 1e9, 2) == 7.07
    filled = default_cut(costs, spec.place(ParallelConfig(pp=4)))
    held = [costs.held_bytes(filled, Place(pp=stage)) for stage in range(4)]
    assert max(held) < 1.15 * sum(held) / 4


def test_the_planner_divides_it_by_its_name() -> None:
    known = known_model("Qwen/Qwen-Image")
    assert known is not None
    spec = plannable(known)
    job = planned_job(spec, {})
    assert (job.height, job.steps, job.branches) == (1328, 50, 2)
    best = plan(Task(spec, devices_of("4xL40S"), LINKS["pcie4"], job, dtype="bfloat16", vae_dtype="float32")).single
    assert best is not None and best.parallel.ranks == 4


def test_a_device_does_what_the_cpu_does(folder: Path, pretending: Pretend) -> None:
    assert_in_good_order(folder, {"pp": 2}, requests(), pretending)


def test_it_is_found_by_its_index_alone(folder: Path) -> None:
    spec = open_checkpoint(folder)
    assert isinstance(spec, QwenImageSpec)
    job = spec.resolve(VideoRequest(prompt="a cat"), 0)
    assert (job.height, job.width, job.steps, job.guidance_scale, job.negative_prompt) == (1328, 1328, 50, 4.0, " ")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": " "}, "prompt=' ' is empty"),
        ({"height": 40}, "height=40 is not a positive multiple of 16: use 32 or 48"),
        ({"width": 16 * 4097}, "width=65552 is above the model's 65536"),
        ({"num_frames": 5}, "num_frames=5 is not for .*, which makes pictures"),
        ({"guidance_scale_2": 2.0}, "guidance_scale_2=2.0 is not for"),
        ({"flow_shift": 2.0}, "flow_shift=2.0 is not for"),
        ({"guidance_scale": float("nan")}, "is not a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not from 1 to 10000"),
        ({"sigmas": (0.5, 0.6)}, "do not fall from 1"),
        ({"sigmas": (1.5, 0.6)}, "do not fall from 1"),
        ({"sigmas": (1.0, 0.6), "num_inference_steps": 3}, "are 2 steps and num_inference_steps=3"),
        ({"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_a_field_that_breaks_a_rule_is_refused(fields: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=words):
        QwenImageSpec.open(folder).resolve(VideoRequest(**{"prompt": "a"} | fields), 0)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"ulysses": 2}, "attend together here"),
        ({"tp": 3}, "does not divide the model's 4 attention heads: use one of 1, 2, 4"),
        ({"pp": 5}, "more than the model's 4 blocks"),
        ({"pp": 2, "vae_decode": "rows"}, "vae_decode='rows' is not for this model"),
    ],
)
def test_an_axis_that_does_not_fit_is_refused(axes: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        Engine(folder, ParallelConfig(**axes), device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "a distilled model's guidance"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae is a 'AutoencoderKL', and it must be"),
        ("cineline.json", {"image": "a.png"}, "'image' cannot have the default"),
    ],
)
def test_a_checkpoint_that_is_not_run_is_refused(
    file: str, changes: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    content = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps(content | changes))
    with pytest.raises(CheckpointError, match=words):
        QwenImageSpec.open(copy)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its prompts would be read as none."""
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="without a tokenizer no prompt is read"):
        QwenImageSpec.open(copy)


def test_what_is_for_wan_alone_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="is no Wan model, with whose pipelines of diffusers this compares"):
        models(str(folder), ModelFiles(), "float32", tmp_path)
    with pytest.raises(InvalidConfig, match="QwenImageSpec takes no loras"):
        with_loras(QwenImageSpec.open(folder), [Lora.of("a.safetensors")], "merge")


def test_an_encoder_as_older_libraries_wrote_it_is_read(folder: Path, tmp_path: Path) -> None:
    """Without `language_model` in its names."""
    copy = shutil.copytree(folder, tmp_path / "model")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    old = {name.replace("model.language_model.", "model."): one.clone() for name, one in model.state_dict().items()}
    save_file(old, copy / "text_encoder" / "model.safetensors")
    with Engine(copy, ParallelConfig(pp=2), device="cpu") as engine:
        assert_equal(engine.submit(requests()[1]).result(60), _by_pipeline(folder, "float32", 1))
