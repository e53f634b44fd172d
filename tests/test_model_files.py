"""Models from files alone, and files that are refused: one sentence with the value, the rule and the remedy."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from foreign import (
    BLOCKS,
    State,
    as_gguf,
    json_tensor,
    original_transformer,
    random_blocks,
    state_of,
    write,
    write_gguf,
)
from oracle import Checkpoint, Oracle, assert_equal
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_parity import mixed_requests
from test_tokenizer import as_spiece

from cineline import CheckpointError, Engine, ModelFiles, ParallelConfig
from cineline.cli import main
from cineline.engine.hub import open_model
from cineline.errors import OutputError
from cineline.families.wan.convert import convert, module_of
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.recognise import look_into
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.tensors import TENSORS, TIED
from cineline.families.wan.text import Tokenizer
from cineline.weights.files import Shard, Weights
from cineline.weights.sources import open_source

KINDS: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")


def shapes(kind: WanKind) -> RandomConfig:
    """As small as can be, with heads of 128 and as many latents as the real models."""
    channels = 48 if kind == "ti2v" else 16
    return RandomConfig(kind, layers=3, heads=1, head_dim=128, ffn_dim=96, text_width=32, latent_channels=channels)


@pytest.fixture
def alone(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[WanKind], ModelFiles]:
    """All files of a model in the original naming, with the tokenizer beside the text encoder's."""

    def make(kind: WanKind) -> ModelFiles:
        folder = checkpoint(shapes(kind))
        names = ["transformer", *([] if kind == "ti2v" else ["transformer_2"]), "vae", "text_encoder"]
        paths = {name: write(folder, name, "original", tmp_path)[0] for name in names}
        shutil.copytree(folder / "tokenizer", tmp_path / "google" / "umt5-xxl", dirs_exist_ok=True)
        text = paths.pop("text_encoder")
        return ModelFiles(paths["transformer"], paths.get("transformer_2"), paths["vae"], text)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_files_alone_are_the_model_that_their_channels_say(
    kind: WanKind, alone: Callable[[WanKind], ModelFiles], oracle: Oracle, tmp_path: Path
) -> None:
    spec = open_model(None, files=alone(kind))
    assert isinstance(spec, WanSpec)
    known = next(spec for spec in KNOWN.values() if spec.kind == kind)
    assert spec.kind == kind
    assert (spec.scheduler, spec.defaults, spec.boundary_ratio) == (
        known.scheduler,
        known.defaults,
        known.boundary_ratio,
    )
    assert spec.vae["latents_mean"] == known.vae["latents_mean"]
    convert(spec, tmp_path / "model")
    request = mixed_requests(kind)[1]
    with Engine(files=alone(kind), parallel=ParallelConfig(pp=2), device="cpu") as engine:
        assert_equal(engine.submit(request).result(120), oracle.run(tmp_path / "model", "float32", request))


def test_the_shipped_configs_are_those_of_diffusers_classes() -> None:
    for spec in KNOWN.values():
        with torch.device("meta"):
            config = AutoencoderKLWan(**spec.vae).config
        assert len(config.latents_mean) == len(config.latents_std) == config.z_dim
        if spec.kind != "ti2v":
            with torch.device("meta"):
                plain = AutoencoderKLWan().config
            assert all(config[name] == value for name, value in plain.items() if not name.startswith("_"))


ORIGINAL = {"dim": 128, "num_heads": 4, "num_layers": 3, "ffn_dim": 96, "in_dim": 48}
DIFFUSERS = {"attention_head_dim": 64, "num_attention_heads": 2, "num_layers": 3, "ffn_dim": 96, "in_channels": 48}
BESIDE: list[tuple[dict[str, Any], int]] = [
    (ORIGINAL, 4),
    (DIFFUSERS, 2),
    ({"dim": "?"}, 1),
    ({**ORIGINAL, "num_heads": 0}, 1),
    ({**DIFFUSERS, "attention_head_dim": -64, "num_attention_heads": -2}, 1),
    # another model's
    *(({**ORIGINAL, name: value}, 1) for name, value in (("dim", 256), ("num_layers", 4), ("ffn_dim", 64))),
    *(({**DIFFUSERS, name: 4}, 1) for name in ("num_attention_heads", "num_layers", "ffn_dim", "in_channels")),
    ({"dim": 128, "num_heads": 4}, 1),
    ({"model_type": "umt5", "num_heads": 4, "d_model": 128, "num_layers": 3}, 1),
]


def test_the_size_of_a_head_is_read_beside_the_weights(alone: Callable[[WanKind], ModelFiles], tmp_path: Path) -> None:
    """Where the config is theirs: else it is 128."""
    files = alone("ti2v")
    for told, heads in BESIDE:
        (tmp_path / "config.json").write_text(json.dumps(told))
        spec = open_model(None, files=files)
        assert isinstance(spec, WanSpec)
        assert spec.transformer["num_attention_heads"] == heads, told


Change = Callable[[State], Any]


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def quantised(told: dict[str, Any]) -> Change:
    return lambda tensors: tensors.update({"blocks.0.self_attn.q.comfy_quant": json_tensor(told)})


def all_of(*changes: Change) -> Change:
    return lambda tensors: [change(tensors) for change in changes]


def only(tensors: State, name: str) -> None:
    tensors.clear()
    tensors[name] = torch.zeros(2)


STRANGE: list[tuple[Change, list[str]]] = [
    (put("vace_blocks.0.after_proj.bias", 4), ["a VACE model", "vace_blocks.0.after_proj.bias", "use a Wan 2.2"]),
    (put("vace_patch_embedding.weight", 4), ["a VACE model"]),
    (put("face_adapter.fuser_blocks.0.k_norm.weight", 4), ["an Animate model"]),
    (put("motion_encoder.dec.direction.weight", 4), ["an Animate model"]),
    (put("casual_audio_encoder.encoder.weight", 4), ["S2V"]),
    (put("control_adapter.conv.weight", 4), ["control adapter"]),
    (put("diffusion_model.blocks.0.self_attn.q.lora_A.weight", 4), ["a LoRA"]),
    (quantised({"format": "nvfp4"}), ["stored as 'nvfp4'", "blocks.0.self_attn.q", "float8_e4m3fn and float8_e5m2"]),
    (quantised({"format": "int8_tensorwise"}), ["stored as 'int8_tensorwise'", "use a file in one of them"]),
    (quantised({"format": "float8_e4m3fn", "convrot": True}), ["stored as 'convrot'"]),
    (
        all_of(
            put("blocks.0.self_attn.q.weight", 128, 64, dtype=torch.uint8),
            put("blocks.0.self_attn.q.weight_scale", 128, 8, dtype=torch.float8_e4m3fn),
            put("blocks.0.self_attn.q.weight_scale_2"),
            quantised({"format": "nvfp4"}),
        ),
        ["stored as 'nvfp4'"],
    ),
    (put("blocks.0.self_attn.q.weight_scale", 128, 1, dtype=torch.uint8), ["weight_scale' is stored as 'U8'"]),
    (quantised({"format": "float8_e4m3fn"}), ["says that 'blocks.0.self_attn.q' is scaled", "no scale of its weight"]),
    (
        all_of(put("blocks.0.self_attn.q.weight_scale"), put("blocks.0.self_attn.q.scale_weight")),
        ["'blocks.0.self_attn.q.weight_scale'", "'blocks.0.self_attn.q.scale_weight'", "for one weight"],
    ),
    (put("blocks.0.self_attn.q.comfy_quant", 3, dtype=torch.uint8), ["comfy_quant' is no JSON"]),
    (put("blocks.0.self_attn.q.weight", 128, 128, dtype=torch.int8), ["blocks.0.self_attn.q.weight", "stored as 'I8'"]),
    (put("blocks.0.self_attn.q.weight", 128, 64, dtype=torch.uint8), ["stored as 'U8'"]),
    (
        put("blocks.0.self_attn.z.scale_weight", 1),
        ["blocks.0.self_attn.z.scale_weight", "no 'blocks.0.self_attn.z.weight'"],
    ),
    (put("blocks.0.self_attn.z.comfy_quant", 1), ["no 'blocks.0.self_attn.z.weight'"]),
    (put("blocks.0.self_attn.q.scale_weight", 3), ["has shape [3] for a weight of [128, 128]"]),
    (put("blocks.0.self_attn.q.scale_weight", 4, 4), ["has shape [4, 4]"]),
    (put("blocks.0.self_attn.q.weight_scale_2", 1), ["blocks.0.self_attn.q.weight_scale_2", "does not know"]),
    (put("blocks.0.odd.weight", 3), ["tensor 'blocks.0.odd.weight' that its config does not know"]),
    (put("model.diffusion_model.head.modulation", 1, 2, 128), ["tensor 'model.diffusion_model.head.modulation'"]),
    (lambda tensors: tensors.pop("blocks.1.ffn.0.bias"), ["lacks tensor 'blocks.1.ffn.net.0.proj.bias'"]),
    (
        lambda tensors: [tensors.pop(f"blocks.{number}.ffn.2.bias") for number in range(3)],
        ["lacks 3 tensors ('blocks.0.ffn.net.2.bias', 'blocks.1.ffn.net.2.bias', 'blocks.2.ffn.net.2.bias'): download"],
    ),
    (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.1.self_attn.")],
        ["lacks 10 tensors ('blocks.1.attn1.norm_k.weight', ", " and 7 more): download it again"],
    ),
    (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.1.")],
        ["tensors ('blocks.1.", " more): download it again"],
    ),
    (
        all_of(*(put(f"blocks.0.odd{number}", 3) for number in range(4))),
        ["has 4 tensors ('blocks.0.odd0', 'blocks.0.odd1', 'blocks.0.odd2' and 1 more) that its config does not know"],
    ),
    (
        put("blocks.2.ffn.0.weight", 95, 128),
        ["tensor 'blocks.2.ffn.0.weight' has shape [95, 128], but the others say [96, 128]: download it again"],
    ),
    (
        all_of(put("blocks.1.ffn.0.bias", 97), put("blocks.2.ffn.0.bias", 97)),
        ["2 tensors ('blocks.1.ffn.0.bias', 'blocks.2.ffn.0.bias') have shapes such as [97], but the others say [96]"],
    ),
    (lambda tensors: tensors.pop("patch_embedding.weight"), ["lacks tensor 'patch_embedding.weight'"]),
    (
        put("patch_embedding.weight", 128, 52, 1, 2, 2),
        ["has 52 channels in and 48 out", "48 and 48 (ti2v)", "use one of"],
    ),
    (put("head.modulation", 1, 2, 100), ["has width 100, which heads of 128 do not divide"]),
    (lambda tensors: tensors.clear(), ["holds no component of Wan 2.2", "it has 0 tensors"]),
    (lambda tensors: only(tensors, "x.weight"), ["the first one 'x.weight'"]),
]


@pytest.mark.parametrize(("change", "words"), STRANGE, ids=[words[0][:40] for _, words in STRANGE])
def test_a_transformers_file_that_is_not_read_is_refused(
    change: Change, words: list[str], alone: Callable[[WanKind], ModelFiles]
) -> None:
    files = alone("ti2v")
    assert files.transformer is not None
    tensors = load_file(files.transformer)
    change(tensors)
    save_file(tensors, files.transformer)
    refused(files, *words)


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        (
            "vae",
            lambda tensors: tensors.pop("decoder.middle.0.residual.2.bias"),
            "lacks tensor 'decoder.mid_block.resnets",
        ),
        ("vae", put("decoder.head.3.bias", 3), "has tensor 'decoder.head.3.bias'"),
        ("vae", put("encoder.middle.1.proj.bias", 7), "tensor 'encoder.middle.1.proj.bias' has shape [7]"),
        (
            "text_encoder",
            lambda tensors: tensors.pop("blocks.1.attn.q.weight"),
            "lacks tensor 'encoder.block.1.layer.0",
        ),
        ("text_encoder", put("blocks.0.cross_attn.q.weight", 3), "has tensor 'blocks.0.cross_attn.q.weight'"),
        ("text_encoder", put("blocks.1.norm2.weight", 3), "tensor 'blocks.1.norm2.weight' has shape [3]"),
    ],
)
def test_other_components_lack_nothing_either(
    component: str, change: Change, words: str, alone: Callable[[WanKind], ModelFiles]
) -> None:
    for kind in KINDS:
        files = alone(kind)
        file = files.given[component]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        refused(files, f"'{file}'", words)


def test_the_shapes_are_those_of_diffusers_and_transformers_classes(checkpoint: Checkpoint) -> None:
    specs = [
        replace(spec, transformer={**spec.transformer, "num_layers": 2}, text={**spec.text, "num_layers": 2})
        for spec in KNOWN.values()
    ]
    specs = [*specs, *(WanSpec.open(checkpoint(RandomConfig(kind, seed=3))) for kind in KINDS)]
    few = {"cross_attn_norm": False, "num_layers": 2}
    specs += [replace(spec, transformer={**spec.transformer, **few}) for spec in specs[:1]]
    specs += [replace(spec, text={**spec.text, "feed_forward_proj": "relu"}) for spec in specs[:1]]
    longer = {"num_res_blocks": 3, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}
    specs += [replace(spec, vae={**spec.vae, **longer}) for spec in specs[:2]]
    for spec in specs:
        for name in ("transformer", "vae", "text_encoder"):
            component = spec.component(name)
            theirs = {key: tuple(one.shape) for key, one in module_of(component).state_dict().items()}
            theirs.pop(TIED, None)
            assert TENSORS[name](component.config) == theirs


def refused(files: ModelFiles, *words: str, model: Path | WanSpec | None = None) -> None:
    """In one sentence, when it is opened: before any rank starts."""
    with pytest.raises(CheckpointError) as error:
        open_model(model, files=files)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


def test_files_that_do_not_belong_together_are_refused(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = alone("i2v")
    (tmp_path / "i2v").mkdir()
    for file in tmp_path.glob("*.safetensors"):
        shutil.move(file, tmp_path / "i2v" / file.name)
    i2v = {name: tmp_path / "i2v" / path.name for name, path in made.given.items()}
    t2v = alone("t2v").given
    folder = checkpoint(shapes("t2v"))

    def files(**paths: Path) -> ModelFiles:
        whole = {**t2v, **paths}
        return ModelFiles(whole["transformer"], whole["transformer_2"], whole["vae"], whole["text_encoder"])

    low = i2v["transformer_2"]
    refused(files(transformer_2=low), f"--transformer-2 '{low}' has 36 channels in and 16 out", "files of one model")
    refused(files(transformer_2=t2v["transformer"]), "are both", "high-noise expert as the first")
    refused(files(vae=low), f"--vae '{low}' holds a Wan transformer: give it as --transformer.")
    refused(files(transformer=t2v["vae"]), "--transformer", "holds a Wan VAE: give it as --vae.")
    refused(files(text_encoder=t2v["vae"]), "--text-encoder-file", "holds a Wan VAE")
    refused(ModelFiles(i2v["transformer"]), "--transformer", "36 channels in", model=folder)
    ti2v = checkpoint(shapes("ti2v"))
    refused(ModelFiles(transformer_2=low), "--transformer-2", "has one: leave it out", model=ti2v)
    refused(ModelFiles(vae=t2v["vae"]), "is Wan 2.1's VAE with 16 channels", "Wan 2.2's VAE with 48", model=ti2v)
    text = write(checkpoint(RandomConfig("t2v", text_width=64)), "text_encoder", "original", tmp_path / "i2v")[0]
    refused(files(text_encoder=text), "takes text of width 32", "makes 64", model=folder)


def test_what_is_missing_is_asked_for(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    files = alone("t2v")
    high, low, vae, text = files.transformer, files.transformer_2, files.vae, files.text_encoder_file
    refused(ModelFiles(high), "is one of the two experts of 'Wan2.2-T2V-A14B-Diffusers'", "low-noise one as")
    refused(ModelFiles(high, low), "have no vae: give it with --vae, or the folder or hub id")
    refused(ModelFiles(high, low, vae), "have no text encoder: give it with --text-encoder-file")
    refused(ModelFiles(vae=vae), f"--vae '{vae}' is given alone", "--transformer first")
    shutil.rmtree(tmp_path / "google")
    refused(files, f"--text-encoder-file '{text}' has no tokenizer", "'google/umt5-xxl' beside it")
    open_model(checkpoint(shapes("t2v")), files=files)  # which has one
    with pytest.raises(CheckpointError, match="variant='fp16' is for a model's folder"):
        open_model(None, "fp16", files)
    assert high is not None
    refused(ModelFiles(Path("nowhere.safetensors"), low, vae, text), "'nowhere.safetensors' does not exist")
    high.rename(high.with_suffix(".zip"))
    refused(ModelFiles(high.with_suffix(".zip"), low, vae, text), "ends in '.zip'", "give such a file")


@pytest.mark.parametrize(
    ("high", "low", "warned"),
    [
        ("wan2.2_t2v_high_noise_14B.safetensors", "wan2.2_t2v_low_noise_14B.safetensors", 0),
        ("wan2.2_t2v_low_noise_14B.safetensors", "wan2.2_t2v_high_noise_14B.safetensors", 2),
        ("Wan2_2-T2V-A14B-LOW_fp8.safetensors", "Wan2_2-T2V-A14B_HIGH_fp8.safetensors", 2),
        ("LowNoise/Wan.safetensors", "b.safetensors", 1),
        ("LowNoise/Wan_HighNoise.safetensors", "HighNoise/Wan_LowNoise.safetensors", 0),
        ("slow-flow.safetensors", "highway.safetensors", 0),
    ],
)
def test_a_name_that_says_the_other_expert_warns(
    high: str, low: str, warned: int, alone: Callable[[WanKind], ModelFiles], tmp_path: Path, caplog: Any
) -> None:
    files = alone("t2v")
    paths = []
    for name, path in ((high, files.transformer), (low, files.transformer_2)):
        assert path is not None
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        path.rename(paths[-1])
    with caplog.at_level(logging.WARNING):
        open_model(None, files=ModelFiles(paths[0], paths[1], files.vae, files.text_encoder_file))
    assert len(caplog.records) == warned
    assert all("nothing in it tells them apart" in record.getMessage() for record in caplog.records)


def test_further_files_leave_the_first_ones(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Beside a folder and without one; also the tokenizer stays, and what the model is called."""
    files, folder = alone("t2v"), checkpoint(shapes("t2v"))
    given = files.given
    assert files.transformer is not None and files.text_encoder_file is not None
    first = open_model(folder, files=ModelFiles(files.transformer, files.transformer_2))
    both = open_model(first, files=ModelFiles(vae=files.vae))
    assert isinstance(both, WanSpec)
    assert both.files == {name: path for name, path in given.items() if name != "text_encoder"}
    assert both == open_model(folder, files=ModelFiles(files.transformer, files.transformer_2, files.vae))
    refused(ModelFiles(transformer_2=files.transformer), "--transformer and --transformer-2 are both", model=both)

    whole = open_model(None, files=files)
    assert isinstance(whole, WanSpec) and whole.tokenizer == tmp_path / "google" / "umt5-xxl"
    (tmp_path / "other").mkdir()
    vae, high, text = (
        Path(shutil.copy(given[name], tmp_path / "other")) for name in ("vae", "transformer", "text_encoder")
    )
    assert open_model(whole, files=ModelFiles(vae=vae)) == replace(whole, files={**given, "vae": vae})
    assert open_model(whole, files=ModelFiles(text_encoder_file=text)) == replace(
        whole, files={**given, "text_encoder": text}
    )
    assert open_model(whole, files=ModelFiles(high)) == replace(
        whole, folder=high, files={**given, "transformer": high}
    )
    (tmp_path / "other" / "tokenizer").mkdir()
    made = open_model(whole, files=ModelFiles(text_encoder_file=text))
    assert isinstance(made, WanSpec) and made.tokenizer == tmp_path / "other" / "tokenizer"


# Files that are broken.


def test_a_pickle_that_is_none_or_runs_code_is_refused(alone: Callable[[WanKind], ModelFiles], tmp_path: Path) -> None:
    vae, ran = tmp_path / "vae.pth", tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(ran),)

    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(1000)}, whole)
    for content, words in (
        (b"not a pickle", "is no file of tensors that torch reads without running code"),
        (b"", "is no file of tensors"),
        (whole.read_bytes()[:-700], "is no file of tensors"),
        ({"state_dict": {"a": torch.zeros(1)}}, "holds dict and not tensors by name: use a file of weights alone"),
        ([torch.zeros(1)], "holds list"),
        ({"a": Runs()}, "is no file of tensors that torch reads without running code"),
    ):
        if isinstance(content, bytes):
            vae.write_bytes(content)
        else:
            torch.save(content, vae)
        refused(ModelFiles(vae=vae), f"'{vae}' {words}")
    assert not ran.exists()


def with_header(file: Path, header: object, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        *(5, None, "text", [], {}, {**ENTRY, "data_offsets": 5}, {**ENTRY, "data_offsets": [0]}),
        *({**ENTRY, "data_offsets": [8, 0]}, {**ENTRY, "data_offsets": [-8, 0]}, {**ENTRY, "data_offsets": ["0", "8"]}),
        *({**ENTRY, "data_offsets": [0.0, 8.0]}, {**ENTRY, "shape": 2}, {**ENTRY, "shape": ["2"]}),
        *({**ENTRY, "shape": [-2]}, {**ENTRY, "dtype": 5}, {"data_offsets": [0, 8]}),
    ],
)
def test_a_header_that_names_no_place_is_refused(entry: object, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with_header(file, {"a": ENTRY, "b": entry})
    refused(ModelFiles(file), f"'{file}' is no safetensors file: its header says", "of tensor 'b'", "download it again")


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for header in ([], 5, [["a", 5]], {"a": ENTRY, "__metadata__": 5}, {"a": ENTRY, "__metadata__": ["a"]}):
        with_header(file, header)
        refused(ModelFiles(file), f"'{file}' is no safetensors file, or its header is truncated: download it again")
    with_header(file, {}, 100_000_001)
    with file.open("r+b") as stream:
        stream.truncate(200_000_000)  # a hole, which takes no room
    refused(ModelFiles(file), f"'{file}' is no safetensors file: its header would have 100000001 bytes", "100000000")


def test_a_shape_that_a_gguf_says_beside_a_tensor_must_be_of_its_size(tmp_path: Path) -> None:
    file, told = tmp_path / "a.gguf", np.zeros((2, 256), np.float32)
    for shape in ((4, 129), (-4, -128)):
        write_gguf(file, {"a": (told, gguf.GGMLQuantizationType.F32, shape)})
        refused(
            ModelFiles(file), f"'{file}' is no GGUF file", f"'a' has shape [2, 256], and is said to be {list(shape)}"
        )


def test_a_pickle_in_the_old_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "vae.pth"
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    refused(
        ModelFiles(vae=file), f"'{file}' is in torch's old format", "save it anew: torch.save(torch.load(file, weigh"
    )


@pytest.mark.parametrize("text", ["text_encoders.umt5xxl.transformer.", "cond_stage_model.", ""])
def test_a_file_of_several_components_is_refused(
    text: str, alone: Callable[[WanKind], ModelFiles], tmp_path: Path
) -> None:
    prefixes = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": text}
    file, files = tmp_path / "all.safetensors", alone("ti2v").given
    tensors = {
        name: {f"{prefix}{key}": one for key, one in load_file(files[name]).items()}
        for name, prefix in prefixes.items()
    }
    remedy = "in one file, and a file is one component here: use files of one each"
    save_file({key: one for state in tensors.values() for key, one in state.items()}, file)
    for given in (ModelFiles(file), ModelFiles(vae=file), ModelFiles(file, vae=file, text_encoder_file=file)):
        refused(given, f"'{file}' holds a UMT5 text encoder and a Wan transformer and a Wan VAE {remedy}")
    save_file(tensors["transformer"] | tensors["vae"], file)
    refused(ModelFiles(file), f"'{file}' holds a Wan transformer and a Wan VAE {remedy}")


def test_a_truncated_gguf_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "transformer.gguf"
    state = original_transformer(state_of(checkpoint(shapes("ti2v")), "transformer"))
    as_gguf(file, state, lambda name: name, gguf.GGMLQuantizationType.Q8_0)
    whole = file.read_bytes()
    assert look_into(file).component == "transformer"
    for size in (0, 3, 30, 2000, len(whole) // 2, len(whole) - 4000):
        file.write_bytes(whole[:size])
        refused(ModelFiles(file), f"'{file}' is no GGUF file, or it is truncated", "download it again")


TOKENIZER_ARRAYS: dict[str, list[Any]] = {
    "tokenizer.ggml.tokens": [f"piece {number}" for number in range(20_000)],
    "tokenizer.ggml.scores": [-0.5 * number for number in range(20_000)],
    "tokenizer.ggml.token_type": list(range(20_000)),
    "tokenizer.ggml.flags": [True] * 65,
    "tokenizer.ggml.few": ["a", "b"],
}


def test_a_tokenizer_in_a_gguf_costs_nothing(tmp_path: Path) -> None:
    """The package makes objects of each element, 100 MB of these and half a minute's of UMT5's."""
    file = tmp_path / "a.gguf"
    told = np.arange(512, dtype=np.float32).reshape(2, 256)
    write_gguf(file, {"a": (told, gguf.GGMLQuantizationType.F32, (4, 128))}, TOKENIZER_ARRAYS)
    open_source(file)  # imports what it takes
    tracemalloc.start()
    source = open_source(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20
    assert source.stored["a"].shape == (4, 128)
    assert source.read("a")[0].flatten().tolist() == told.flatten().tolist()
    whole = file.read_bytes()
    for size in (1_000, 200_000, 400_000, 500_000):  # within the texts, the scores, the types
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is no GGUF file, or it is truncated"):
            open_source(file)


def test_a_gguf_of_other_machines_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    told = (np.zeros((2, 256), np.float32), gguf.GGMLQuantizationType.F32, None)
    write_gguf(file, {"a": told}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"is no GGUF file.*its bytes are in the order of other machines"):
        open_source(file)


def test_without_gguf_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "transformer.gguf"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'gguf is needed for this .* pip install "cineline\[gguf\]"'):
        open_model(None, files=ModelFiles(file))


# GGUF from raw blocks.


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_raw_blocks_are_what_gguf_makes_of_them(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    plain, folded = random_blocks(kind, 6, 512), random_blocks(kind, 3, 256, seed=1)
    small = np.arange(12, dtype=np.float32).reshape(6, 2)
    write_gguf(
        file,
        {
            "plain": (plain, kind, None),
            "folded": (folded, kind, (4, 2, 96)),
            "small": (small, gguf.GGMLQuantizationType.F32, None),
        },
    )
    weights, cpu = Weights(open_source(file)), torch.device("cpu")
    expected = torch.from_numpy(gguf.dequantize(plain, kind).copy())
    assert expected.isfinite().all() and len(set(expected.flatten().tolist())) > 20
    read = weights.read("plain", (6, 512), torch.float32, cpu)
    assert torch.equal(read, expected)
    assert weights.bytes_read == plain.nbytes
    assert torch.equal(weights.read("plain", (6, 512), torch.bfloat16, cpu), expected.bfloat16())
    assert torch.equal(weights.read("plain", (6, 256), torch.float32, cpu, Shard(1, 1, 2)), expected[:, 256:])
    folded_values = torch.from_numpy(gguf.dequantize(folded, kind).copy()).reshape(4, 2, 96)
    assert torch.equal(weights.read("folded", (4, 2, 96), torch.float32, cpu), folded_values)
    assert torch.equal(weights.read("small", (1, 6, 2), torch.float32, cpu), torch.from_numpy(small)[None])


def test_a_scaled_weight_is_multiplied_whole_and_then_cut(tmp_path: Path) -> None:
    file, cpu = tmp_path / "a.safetensors", torch.device("cpu")
    weight, scale = torch.randn(6, 8).to(torch.float8_e4m3fn), torch.rand(6, 2, 1)
    save_file({"a.weight": weight, "a.scale_weight": scale}, file)
    for dtype in (torch.float32, torch.bfloat16):
        whole = (weight.to(dtype).reshape(6, 2, 4) * scale.to(dtype)).reshape(6, 8)
        for shard in (Shard(0, 1, 2), Shard(1, 1, 2)):
            shape = (3, 8) if shard.dim == 0 else (6, 4)
            read = Weights(open_source(file)).read("a.weight", shape, dtype, cpu, shard)
            assert torch.equal(read, whole[shard.cut(shape)])


# The tokenizer that a text encoder brings.


def with_spiece(folder: Path, file: Path, tmp_path: Path) -> None:
    """ComfyUI's: the SentencePiece model as a tensor."""
    home = tmp_path / "spiece"
    shutil.copytree(folder / "tokenizer", home)
    as_spiece(home)
    put_spiece((home / "spiece.model").read_bytes(), file)


def put_spiece(model: bytes, file: Path) -> None:
    told = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file({**load_file(file), "spiece_model": told}, file)


def trained_spiece() -> bytes:
    """A model as UMT5's: what it does not know is spelt in bytes, and unknown is number 3."""
    words = "a cat runs over red roofs and sings of snow\nthe dog sees 3 birds; green, blue!\n" * 20
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words.splitlines()),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


RARE = (
    "",
    "a cat",
    " the  dog\tsees 3 birds ",
    "a \U0001f408\u200d\u2b1b cat \U0001f1e9\U0001f1ea!",
    "\u6f22\u5b57 \u0e01 \U00012000",
    "e\u0301 \ufb01 \u2163 \u2460",
    "\u2581x",
    "\x00\x7f",
)


def test_the_tokens_are_sentencepieces_whatever_the_characters(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """transformers' own T5Tokenizer makes others of bytes, and another unknown; a converted folder has them, too."""
    model, files = trained_spiece(), alone("ti2v")
    theirs = SentencePieceProcessor(model_proto=model)
    assert theirs.unk_id() == 3 and theirs.is_byte(theirs.encode("\U0001f408")[-1])
    assert files.text_encoder_file is not None
    tensors = load_file(files.text_encoder_file)
    width = tensors["token_embedding.weight"].shape[1]
    save_file(tensors | {"token_embedding.weight": torch.randn(theirs.vocab_size(), width)}, files.text_encoder_file)
    put_spiece(model, files.text_encoder_file)
    shutil.rmtree(tmp_path / "google")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec)
    convert(spec, tmp_path / "model")
    tokenizer = WanPipeline.from_pretrained(tmp_path / "model", transformer=None, vae=None, text_encoder=None).tokenizer
    homes = (spec.tokenizer_home, tmp_path / "model" / "tokenizer")
    for prompt in RARE:
        expected = [*theirs.encode(prompt_clean(prompt)), 1]
        for home in homes:
            numbers, mask = Tokenizer(home, spec.text)(prompt)
            assert numbers[0, : mask.sum()].tolist() == expected
        assert tokenizer(prompt_clean(prompt)).input_ids == expected


@pytest.mark.parametrize(
    "change",
    [lambda model: b"x", lambda model: model[:-500], lambda model: model.replace(b"</s>", b"<s/>")],
    ids=["no model", "cut off", "without an end"],
)
def test_a_spiece_model_that_is_none_is_refused(
    change: Callable[[bytes], bytes], alone: Callable[[WanKind], ModelFiles], tmp_path: Path
) -> None:
    files = alone("ti2v")
    assert files.text_encoder_file is not None
    put_spiece(change(trained_spiece()), files.text_encoder_file)
    shutil.rmtree(tmp_path / "google")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(spec.tokenizer_home, spec.text)
    words = f"'{files.text_encoder_file}': its tensor 'spiece_model' is no SentencePiece model of UMT5's"
    assert str(error.value).startswith(words) and str(error.value).endswith("beside it.")


def test_a_text_encoder_brings_its_tokenizer(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path, oracle: Oracle
) -> None:
    folder, files = checkpoint(shapes("t2v")), alone("t2v")
    assert files.text_encoder_file is not None
    with_spiece(folder, files.text_encoder_file, tmp_path)
    shutil.rmtree(tmp_path / "google")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec)
    assert spec.tokenizer_home == files.text_encoder_file
    ours, theirs = Tokenizer(spec.tokenizer_home, spec.text), Tokenizer(folder / "tokenizer", spec.text)
    for prompt in ("", "a cat", "Red, green; 3 of each!"):
        assert all(map(torch.equal, ours(prompt), theirs(prompt)))
    convert(spec, tmp_path / "model")
    request = mixed_requests("t2v")[1]
    with Engine(spec, ParallelConfig(pp=2), device="cpu") as engine:
        assert_equal(engine.submit(request).result(120), oracle.run(tmp_path / "model", "float32", request))


def test_without_what_reads_it_the_libraries_are_named(
    alone: Callable[[WanKind], ModelFiles], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cineline.families.wan.spiece._is_installed", lambda module: False)
    files = alone("ti2v")
    assert files.text_encoder_file is not None
    with_spiece(checkpoint(shapes("ti2v")), files.text_encoder_file, tmp_path)
    shutil.rmtree(tmp_path / "google")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec)
    with pytest.raises(CheckpointError) as error:
        Tokenizer(spec.tokenizer_home, spec.text)
    assert str(error.value) == (
        f"'{files.text_encoder_file}' has a spiece.model and no tokenizer.json, which takes libraries that are not "
        'installed: run pip install "cineline[spiece]" (it brings sentencepiece and protobuf), or put a folder '
        "'tokenizer' with a tokenizer.json beside it."
    )


# Commands.


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cineline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def options(files: ModelFiles) -> list[str]:
    names = {"text_encoder": "--text-encoder-file"}
    return [
        word
        for name, path in files.given.items()
        for word in (names.get(name, f"--{name.replace('_', '-')}"), str(path))
    ]


def test_every_command_takes_the_files(
    alone: Callable[[WanKind], ModelFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = alone("t2v")
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2"]
    latents, folder = tmp_path / "a.safetensors", tmp_path / "model"
    assert run(monkeypatch, "generate", "a cat", *options(files), *size, "--save-latents", str(latents)) == 0
    told = capsys.readouterr().err
    assert "Loading transformer.safetensors" in told and "mini" not in told
    assert run(monkeypatch, "convert", *options(files), "--to", str(folder)) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(folder)]
    assert "transformer_2 from" in printed.err
    again = tmp_path / "b.safetensors"
    assert run(monkeypatch, "generate", "a cat", "--model", str(folder), *size, "--save-latents", str(again)) == 0
    assert load_file(latents)["latents"].equal(load_file(again)["latents"])
    capsys.readouterr()
    assert run(monkeypatch, "plan", *options(files), "--devices", "2xL40S", *size) == 0
    assert "--text-encoder-file" in " ".join(capsys.readouterr().out.split("Run it: ")[1].split())
    assert run(monkeypatch, "plan", "--devices", "2xL40S") == 2
    assert "There is no model" in capsys.readouterr().err
    assert run(monkeypatch, "convert", "--to", str(tmp_path / "other")) == 2
    assert "There is nothing to convert: give files with --transformer and the like, or --model." in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "other").exists()
    assert run(monkeypatch, "convert", *options(files), "--to", str(folder)) == 2
    assert "is there already" in capsys.readouterr().err


def test_bench_exact_takes_the_files(
    alone: Callable[[WanKind], ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--arm", "pp=2", "--in-flight", "2", "--json", str(tmp_path / "e.json")]
    assert run(monkeypatch, "bench", "exact", *options(alone("ti2v")), *arguments) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert row["latents"] == row["frames"] == row["requests"] == 6


def test_what_stands_where_a_folder_is_made_is_left_alone(
    alone: Callable[[WanKind], ModelFiles], tmp_path: Path
) -> None:
    """A process of the same number may have left it, or another host's be writing to it."""
    spec = open_model(None, files=alone("ti2v"))
    assert isinstance(spec, WanSpec)
    theirs = tmp_path / f".model.{os.getpid()}"
    theirs.mkdir()
    (theirs / "theirs").touch()
    convert(spec, tmp_path / "model")
    assert (theirs / "theirs").exists()
    assert (tmp_path / "model").stat().st_mode == theirs.stat().st_mode
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [theirs]


def test_a_folder_is_converted_whole_or_not_at_all(
    alone: Callable[[WanKind], ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = alone("ti2v")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec) and files.text_encoder_file is not None
    before = sorted(path.name for path in tmp_path.iterdir())
    tensors = load_file(files.text_encoder_file)
    save_file({**tensors, "odd": torch.zeros(1)}, files.text_encoder_file)  # the last component
    told: list[str] = []
    with pytest.raises(CheckpointError, match="tensor 'odd'"):
        convert(spec, tmp_path / "model", tell=told.append)
    assert not told  # before anything was written
    save_file({**tensors, "norm.weight": torch.zeros(1, 3)}, files.text_encoder_file)
    with pytest.raises(CheckpointError, match=r"'norm.weight' has shape"):
        convert(spec, tmp_path / "model", tell=told.append)
    assert not told
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    save_file(tensors, files.text_encoder_file)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cineline.weights.sharded._write", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\): check the disk"):
        convert(spec, tmp_path / "model")
    with pytest.raises(OutputError, match="does not exist: make it first"):
        convert(spec, tmp_path / "nowhere" / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
