"""Wan 2.1: one expert, and of image-to-video models an image encoder, whose rows stand before a prompt's."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from foreign import original_transformer, state_of
from local_line import LocalLine
from lora_files import Loaded, pipeline_with, shapes_of
from oracle import FIELDS, Checkpoint, Oracle, assert_equal
from PIL import Image
from pretended_family import assert_in_good_order
from safetensors.torch import load_file, save_file
from test_pretended_device import Pretend
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cineline import CheckpointError, Engine, InvalidRequest, ModelFiles, ParallelConfig, RequestCancelled, VideoRequest
from cineline.core.config import DeviceConfig, Dtype, Place
from cineline.families.wan.clip import ClipEncoder
from cineline.families.wan.convert import convert
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.families.wan.tensors import transformer_tensors
from cineline.planning.cut import default_cut
from cineline.planning.hardware import LINKS, devices_of
from cineline.planning.planner import Task, plan, planned_job

KINDS: tuple[WanKind, ...] = ("t2v", "i2v")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def config(kind: WanKind, **changes: Any) -> RandomConfig:
    return RandomConfig(kind, generation="2.1", **{"seed": 3, **changes})


def requests(kind: WanKind) -> list[VideoRequest]:
    """Of different sizes, lengths and steps; with guidance and without."""
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    common: dict[str, Any] = {"num_inference_steps": 3, "image": Image.fromarray(pixels) if kind == "i2v" else None}
    own: list[dict[str, Any]] = [
        {"height": 64, "width": 48, "num_frames": 9, "guidance_scale": 4.0, "negative_prompt": "blurry", "seed": 11},
        {"height": 32, "width": 96, "num_frames": 5, "guidance_scale": 1.0, "seed": 7},
    ]
    return [VideoRequest(prompt=f"cat {number}", **common | fields) for number, fields in enumerate(own)]


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"pp": 3, "split": (2, 1, 1)}, {"cfg": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_requests_in_flight_beside_a_cancel_equal_diffusers(
    kind: WanKind, dtype: Dtype, parallel: dict[str, Any], checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder, wanted = checkpoint(config(kind)), requests(kind)
    with Engine(folder, ParallelConfig(**parallel), dtype=dtype, device="cpu", in_flight=3) as engine:
        cancelled, *kept = [engine.submit(one) for one in (wanted[0], *wanted)]
        while cancelled.progress[0] < 1:
            time.sleep(0.001)
        cancelled.cancel()
        expected = [oracle.run(folder, dtype, one) for one in wanted]  # while the ranks are at work
        for handle, one in zip(kept, expected, strict=True):
            assert_equal(handle.result(60), one)
    with pytest.raises(RequestCancelled):
        cancelled.result(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_and_a_last_frame_equal_diffusers(dtype: Dtype, checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(config("i2v", pictures=2))
    pixels = np.random.default_rng(2).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    wanted = [one.model_copy(update={"last_image": Image.fromarray(pixels)}) for one in requests("i2v")]
    with Engine(folder, ParallelConfig(pp=3), dtype=dtype, device="cpu", in_flight=2) as engine:
        for handle, one in zip([engine.submit(one) for one in wanted], wanted, strict=True):
            assert_equal(handle.result(60), oracle.run(folder, dtype, one))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_in_bfloat16_equals_diffusers(kind: WanKind, checkpoint: Checkpoint, oracle: Oracle) -> None:
    """With it the image encoder, which diffusers documents so."""
    folder, wanted = checkpoint(config(kind)), requests(kind)
    with Engine(folder, ParallelConfig(pp=2), dtype="bfloat16", vae_dtype="bfloat16", device="cpu") as engine:
        for handle, one in zip([engine.submit(one) for one in wanted], wanted, strict=True):
            assert_equal(handle.result(60), oracle.run(folder, "bfloat16", one, "bfloat16"))


def test_a_request_goes_on_from_a_snapshot_on_another_line(checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder, request = checkpoint(config("i2v")), requests("i2v")[0]
    spec, stages, options = WanSpec.open(folder), WanStages, DeviceConfig(dtype="bfloat16")
    first = LocalLine(spec, ParallelConfig(pp=2), None, stages_class=stages, snapshot_every=1, config=options)
    first.run([request])
    again = LocalLine(spec, ParallelConfig(pp=3), None, stages_class=stages, config=options)
    ((latents, frames),) = again.run([request], resumed={0: first.snapshots(0)[0]}).values()
    expected = oracle.run(folder, "bfloat16", request)
    assert torch.equal(latents, expected[0]) and frames is not None and np.array_equal(frames, expected[1])


def test_as_many_images_as_the_encoder_sees_are_needed(checkpoint: Checkpoint) -> None:
    request = requests("i2v")[0]
    both = request.model_copy(update={"last_image": request.image})
    with pytest.raises(InvalidRequest, match="needs a last_image: give one"):
        WanSpec.open(checkpoint(config("i2v", pictures=2))).resolve(request, 0)
    with pytest.raises(InvalidRequest, match="takes no last_image: leave it out"):
        WanSpec.open(checkpoint(config("i2v"))).resolve(both, 0)


@pytest.mark.parametrize(("axis", "kind"), [("ulysses", "i2v"), ("tp", "i2v"), ("ring", "t2v")])
def test_ranks_that_share_a_stage_come_near_diffusers(
    axis: str, kind: WanKind, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder, request = checkpoint(config(kind)), requests(kind)[0]
    sharing: dict[str, Any] = {axis: 2}
    with Engine(folder, ParallelConfig(**sharing), device="cpu") as engine:
        video = engine.submit(request).result(60)
    latents, _ = oracle.run(folder, "float32", request)
    assert torch.allclose(video.latents, latents, atol=1e-4)


def test_a_stage_holds_what_the_planner_says_and_reads_no_more(checkpoint: Checkpoint) -> None:
    folder = checkpoint(config("i2v"))
    spec = WanSpec.open(folder)
    with Engine(folder, ParallelConfig(pp=3), device="cpu") as engine:
        read = engine.bytes_read
    costs = ModelCosts.of(spec, "float32", "float32")
    filled = default_cut(costs, ParallelConfig(pp=3))
    assert read == [costs.held_bytes(filled, Place(pp=stage)) for stage in range(3)]


def test_a_lora_reaches_what_is_made_of_images(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, request = checkpoint(config("i2v")), requests("i2v")[0].model_copy(update={"decode": False})
    shapes, draw = shapes_of(folder), torch.Generator().manual_seed(5)
    names = {
        "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
        "blocks.2.cross_attn.v_img": "blocks.2.attn2.add_v_proj",
        "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    }
    made = {}
    for stored, module in names.items():
        out, inner = shapes[f"{module}.weight"]
        made[f"diffusion_model.{stored}.lora_A.weight"] = torch.randn(4, inner, generator=draw) * 0.2
        made[f"diffusion_model.{stored}.lora_B.weight"] = torch.randn(out, 4, generator=draw) * 0.2
    save_file(made, file := tmp_path / "lora.safetensors")
    with Engine(folder, ParallelConfig(pp=2), loras=[str(file)], device="cpu") as engine:
        found = engine.submit(request).result(60).latents
    arguments = {name: getattr(request, name) for name in FIELDS if getattr(request, name) is not None}
    pipeline = pipeline_with(folder, "float32", [Loaded(file)], image=True)
    noise = torch.Generator("cpu").manual_seed(int(request.seed))
    assert torch.equal(found, pipeline(generator=noise, output_type="latent", **arguments).frames[0])


@pytest.mark.parametrize("kind", KINDS)
def test_files_beside_a_folder_give_its_bits(
    kind: WanKind, checkpoint: Checkpoint, oracle: Oracle, tmp_path: Path
) -> None:
    folder, request = checkpoint(config(kind)), requests(kind)[1]
    others = checkpoint(config(kind, seed=4))
    save_file(original_transformer(state_of(folder, "transformer")), file := tmp_path / "wan2.1.safetensors")
    own = ModelFiles(transformer=file, vae=folder / "vae", text_encoder_file=folder / "text_encoder")
    expected = oracle.run(folder, "float32", request)
    with Engine(others if kind == "t2v" else folder, ParallelConfig(pp=2), files=own, device="cpu") as engine:
        assert_equal(engine.submit(request).result(60), expected)


@pytest.mark.parametrize("pictures", [1, 2])
def test_names_and_shapes_of_its_tensors_are_diffusers(pictures: int, checkpoint: Checkpoint) -> None:
    folder = checkpoint(config("i2v", pictures=pictures))
    told = WanTransformer3DModel.load_config(folder / "transformer")
    assert transformer_tensors(told) == shapes_of(folder)


def test_files_of_another_kind_of_model_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = checkpoint(config("i2v")) / "transformer"
    with pytest.raises(CheckpointError, match="encoder is in no file of these: give the folder"):
        Engine(files=ModelFiles(transformer=file), device="cpu")
    with pytest.raises(CheckpointError, match=r"is of a model with an image encoder \(Wan 2.1\), unlike"):
        Engine(checkpoint(RandomConfig("i2v", seed=3)), files=ModelFiles(transformer=file), device="cpu")


def test_a_converted_model_is_the_same(checkpoint: Checkpoint, tmp_path: Path, oracle: Oracle) -> None:
    folder, request = checkpoint(config("i2v")), requests("i2v")[1]
    convert(WanSpec.open(folder), tmp_path / "model")
    with Engine(tmp_path / "model", device="cpu") as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(folder, "float32", request))


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_does_what_the_cpu_does(kind: WanKind, checkpoint: Checkpoint, pretending: Pretend) -> None:
    assert_in_good_order(checkpoint(config(kind)), {"pp": 2}, requests(kind), pretending)


def test_a_known_model_is_planned_by_its_name() -> None:
    spec = KNOWN["Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"]
    job = planned_job(spec, {})
    task = Task(spec, devices_of("2xL40S"), LINKS["pcie4"], job, dtype="bfloat16", vae_dtype="float32")
    best = plan(task).single
    assert best is not None and best.parallel.ranks == 2
    assert (job.height, job.width, job.steps) == (720, 1280, 40)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"image_encoder": [None, None]}, "names no 'image_encoder'"),
        ("image_encoder/config.json", {"hidden_size": 30}, "of width 30, and the transformer takes 10 of width 20"),
        (
            "transformer/config.json",
            {"pos_embed_seq_len": 30},
            "makes 10 rows of width 20, and the transformer takes 30",
        ),
    ],
)
def test_an_image_encoder_that_does_not_fit_is_refused(
    file: str, changes: dict[str, Any], words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(config("i2v")), tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        WanSpec.open(folder)


def test_an_image_encoder_that_has_a_projection_is_read_without_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`CLIPVisionModelWithProjection`, which official folders name."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(config("i2v")), folder)
    own = CLIPVisionConfig.from_pretrained(folder / "image_encoder", projection_dim=4)
    with torch.random.fork_rng():
        model = CLIPVisionModelWithProjection(own).eval()
    shutil.rmtree(folder / "image_encoder")
    model.save_pretrained(folder / "image_encoder")
    spec, image = WanSpec.open(folder), Image.new("RGB", (50, 40), "red")
    assert any("visual_projection" in name for name in load_file(folder / "image_encoder" / "model.safetensors"))
    found = ClipEncoder(spec, torch.float32, torch.device("cpu")).encode([image])
    pixels = CLIPImageProcessor.from_pretrained(folder / "image_processor")(images=[image], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(found, expected)


def test_between_two_pictures_there_are_fifty_steps(checkpoint: Checkpoint) -> None:
    assert WanSpec.open(checkpoint(config("i2v", pictures=2))).defaults["num_inference_steps"] == 50
    assert WanSpec.open(checkpoint(config("i2v"))).defaults["num_inference_steps"] == 40
