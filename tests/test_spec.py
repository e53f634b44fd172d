"""Checkpoints and requests as data: which kind, which defaults, what is refused."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Checkpoint
from PIL import Image

from cineline import CheckpointError, InvalidRequest, VideoRequest
from cineline.engine.hub import open_model
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import NULLABLE, TRANSFORMER_DEFAULTS, WanSpec

Copy = Callable[[WanKind], Path]


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Copy:
    """A checkpoint that a test may spoil."""

    def make(kind: WanKind) -> Path:
        folder = tmp_path / kind
        shutil.copytree(checkpoint(RandomConfig(kind, seed=3)), folder)
        return folder

    return make


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_the_kind_is_read_from_the_configs(kind: WanKind, checkpoint: Checkpoint) -> None:
    assert WanSpec.open(checkpoint(RandomConfig(kind, seed=3))).kind == kind


@pytest.mark.parametrize(
    ("kind", "size", "steps", "guidance"),
    [
        ("ti2v", (704, 1280, 121, 24), 50, (5.0, None)),
        ("t2v", (720, 1280, 81, 16), 40, (4.0, 3.0)),
        ("i2v", (720, 1280, 81, 16), 40, (3.5, 3.5)),
    ],
)
def test_fields_left_out_take_the_kinds_official_defaults(
    kind: WanKind,
    size: tuple[int, int, int, int],
    steps: int,
    guidance: tuple[float, float | None],
    checkpoint: Checkpoint,
) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig(kind, seed=3)))
    sized = {"height": 720, "width": 1280} if kind == "i2v" else {}
    image = Image.new("RGB", (64, 64)) if kind == "i2v" else None
    job = spec.resolve(VideoRequest(prompt="x", image=image, **sized), 0)
    assert (job.height, job.width, job.num_frames, job.fps) == size
    assert (job.steps, job.guidance_scale, job.guidance_scale_2) == (steps, *guidance)
    assert (job.seed, job.negative_prompt, job.branches) == (0, "", 2)


def test_the_checkpoints_own_defaults_come_before_the_kinds_and_after_the_users(copy: Copy) -> None:
    folder = copy("t2v")
    (folder / "cineline.json").write_text(json.dumps({"num_frames": 9, "fps": 8, "guidance_scale": 2.0}))
    job = WanSpec.open(folder).resolve(VideoRequest(prompt="x", fps=30), 0)
    assert (job.num_frames, job.fps, job.guidance_scale, job.steps) == (9, 30, 2.0, 40)
    for own, words in [
        ({"frames": 9}, "Unknown request field 'frames'"),
        ({"num_frames": "9"}, "num_frames='9'"),
        ({"num_frames": None}, "'num_frames' cannot have the default None"),
        ({"decode": False}, "'decode' cannot have the default False"),
    ]:
        (folder / "cineline.json").write_text(json.dumps(own))
        with pytest.raises(CheckpointError, match=words):
            WanSpec.open(folder)
    (folder / "cineline.json").write_text(json.dumps({"boundary_ratio": 0.5, "num_frames": 5.0}))
    job = WanSpec.open(folder).resolve(VideoRequest(prompt="x"), 0)
    assert (job.boundary_ratio, job.num_frames, type(job.num_frames)) == (0.5, 5, int)


def test_guidance_scale_2_follows_guidance_scale_where_the_kind_has_none(copy: Copy) -> None:
    folder = copy("i2v")
    spec = WanSpec.open(folder)
    own = {name: value for name, value in spec.defaults.items() if name != "guidance_scale_2"}
    object.__setattr__(spec, "defaults", own)
    image = Image.new("RGB", (64, 64))
    assert spec.resolve(VideoRequest(prompt="x", image=image, guidance_scale=2.5), 0).guidance_scale_2 == 2.5


@pytest.mark.parametrize(("width", "height"), [(100, 100), (1600, 900), (300, 900), (4000, 100)])
def test_an_image_without_sizes_gives_its_aspect_ratio_at_the_default_area(
    width: int, height: int, checkpoint: Checkpoint
) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig("i2v", seed=3)))
    job = spec.resolve(VideoRequest(prompt="x", image=Image.new("RGB", (width, height))), 0)
    rows, columns = spec.grid
    assert job.height % rows == 0
    assert job.width % columns == 0
    assert abs(job.height * job.width / (720 * 1280) - 1) < 0.1
    # Half a grid step either way.
    assert abs(job.width - job.height * width / height) <= columns / 2 + rows / 2 * width / height + 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": " \n"}, ["empty"]),
        ({"height": 100}, ["height=100", "multiple of 16 (VAE 8 x patch 2)", "use 96 or 112"]),
        ({"width": -16}, ["width=-16", "use 16 or 32"]),
        ({"height": 16 * 1025}, ["height=16400", "1025 tokens", "1024"]),
        ({"num_frames": 0}, ["num_frames=0", "4k+1", "use 1 or 5"]),
        ({"num_frames": 80}, ["num_frames=80", "use 77 or 81"]),
        ({"num_frames": 4 * 1024 + 1}, ["num_frames=4097"]),
        ({"num_inference_steps": 0}, ["num_inference_steps=0"]),
        ({"fps": 0}, ["fps=0"]),
        ({"seed": 2**64}, ["seed=18446744073709551616", "random"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale=nan", "finite"]),
        ({"guidance_scale_2": float("inf")}, ["guidance_scale_2=inf", "finite"]),
        ({"flow_shift": 0.0}, ["flow_shift=0.0"]),
        ({"flow_shift": float("nan")}, ["flow_shift=nan"]),
        ({"boundary_ratio": 1.5}, ["boundary_ratio=1.5", "outside 0 to 1"]),
        ({"boundary_ratio": float("nan")}, ["boundary_ratio=nan"]),
        ({"image": Image.new("RGB", (8, 8))}, ["takes no image"]),
        ({"fps": 10_000}, ["fps=10000", "above 1000"]),
    ],
)
def test_a_field_that_breaks_a_rule_is_refused_with_value_rule_and_remedy(
    fields: dict[str, Any], words: list[str], checkpoint: Checkpoint
) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig("t2v", seed=3)))
    with pytest.raises(InvalidRequest) as refused:
        spec.resolve(VideoRequest(**{"prompt": "x"} | fields), 0)
    for word in words:
        assert word in str(refused.value)


def built(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The tensors of what diffusers makes of a config."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(dict(config))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_transformers_config_is_read_as_diffusers_reads_it(data: st.DataObject, checkpoint: Checkpoint) -> None:
    """Keys may be there, null or left out, alike in both experts or not, beside others that diffusers ignores."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "t2v"
        shutil.copytree(checkpoint(RandomConfig("t2v", seed=3)), folder)
        written = []
        null, left_out = (
            data.draw(st.dictionaries(st.sampled_from(sorted(names)), st.sampled_from(["both", "first", "second"])))
            for names in (NULLABLE, TRANSFORMER_DEFAULTS.keys() - {"num_layers"})
        )
        for name in ("transformer", "transformer_2"):
            path = folder / name / "config.json"
            config = json.loads(path.read_text())
            own = ("both", "first" if name == "transformer" else "second")
            config |= {key: None for key, where in null.items() if where in own}
            config = {key: value for key, value in config.items() if left_out.get(key) not in own}
            config["a_key_of_a_later_version"] = data.draw(st.none() | st.integers())
            path.write_text(json.dumps(config))
            written.append(built(config))
        try:
            found = WanSpec.open(folder)
        except CheckpointError as error:
            assert "differ in" in str(error) and {*left_out.values(), *null.values()} - {"both"}
        else:
            assert [built(found.transformer)] * 2 == written


@pytest.mark.parametrize("name", TRANSFORMER_DEFAULTS)
def test_null_is_refused_where_diffusers_makes_nothing_of_it(name: str, copy: Copy) -> None:
    folder = copy("t2v")
    for expert in ("transformer", "transformer_2"):
        change(folder / expert / "config.json", **{name: None})
    config = json.loads((folder / "transformer" / "config.json").read_text())
    try:
        model = WanTransformer3DModel.from_config(config | {"num_layers": config["num_layers"] and 1})
        with torch.no_grad():
            model(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1), torch.zeros(1, 8, config["text_dim"]))
    except (TypeError, AttributeError):
        runs = False
    else:
        runs = name != "ffn_dim"
    if runs:
        assert built(WanSpec.open(folder).transformer) == built(config)
        return
    with pytest.raises(CheckpointError, match=f"transformer/config.json': '{name}' is null, .* leave the key out"):
        WanSpec.open(folder)


def test_a_transformers_config_without_keys_is_diffusers_default_model(copy: Copy) -> None:
    folder = copy("t2v")
    for name in ("transformer", "transformer_2"):
        (folder / name / "config.json").write_text("{}")
    assert built(WanSpec.open(folder).transformer) == built({})


def test_the_transformers_defaults_are_diffusers() -> None:
    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert theirs | {"patch_size": list(theirs["patch_size"])} == TRANSFORMER_DEFAULTS


def test_the_original_repositorys_layout_is_refused_with_the_remedy(copy: Copy) -> None:
    folder = copy("t2v")
    (folder / "model_index.json").unlink()
    (folder / "diffusion_pytorch_model-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="whose name ends with -Diffusers"):
        open_model(folder)


def test_a_folder_that_is_no_wan_checkpoint_is_refused(copy: Copy, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(CheckpointError) as refused:
            open_model(folder)
        return str(refused.value)

    assert "model_index.json' does not exist" in refusal(tmp_path)
    folder = copy("t2v")
    index = folder / "model_index.json"
    good = index.read_text()
    change(index, _class_name="FluxPipeline")
    assert "FluxPipeline" in refusal(folder)
    index.write_text("{")
    assert "cannot be read" in refusal(folder)
    index.write_text("[]")
    assert "no JSON object" in refusal(folder)
    index.write_text(good)
    for nothing in (None, [None, None], "UniPCMultistepScheduler"):
        change(index, scheduler=nothing)
        assert "scheduler None is not supported" in refusal(folder)
    change(index, scheduler=["diffusers", "LCMScheduler"])
    assert "'LCMScheduler' is not supported" in refusal(folder)
    index.write_text(good)
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert "prediction_type is 'epsilon'" in refusal(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "prediction_type is None" in refusal(folder)
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    change(index, transformer=None)
    assert "names no 'transformer'" in refusal(folder)
    change(index, transformer=[None, None])
    assert "names no 'transformer'" in refusal(folder)
    index.write_text(good)
    change(index, transformer_2=[None, None])
    assert "boundary_ratio" in refusal(folder)
    index.write_text(good)
    config = folder / "transformer_2" / "config.json"
    change(config, num_layers=7)
    assert "differ in 'num_layers', 4 and 7" in refusal(folder)
    change(config, num_layers=4)
    for name in ("transformer", "transformer_2"):
        change(folder / name / "config.json", in_channels=17)
    assert "17 input channels" in refusal(folder)
    for name in ("transformer", "transformer_2"):
        change(folder / name / "config.json", in_channels=16, image_dim=1280)
    assert "names no 'image_encoder'" in refusal(folder)
    (folder / "vae" / "config.json").unlink()
    assert "vae/config.json' does not exist" in refusal(folder)


def test_a_model_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model("no/such/folder/anywhere")
    with pytest.raises(CheckpointError, match="or mini-ti2v or mini-t2v"):
        open_model("mini-i2v")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_model(tmp_path / "file")
    code = "from cineline.engine.hub import open_model; open_model('nobody/nothing')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "CheckpointError: model='nobody/nothing' is no folder here and cannot be downloaded" in done.stderr
