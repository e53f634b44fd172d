"""Models from files alone, and files that are refused: one sentence with the value, the rule and the remedy."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
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
from test_parity import mixed_requests
from test_tokenizer import as_spiece

from cineline import CheckpointError, Engine, ModelFiles, ParallelConfig
from cineline.cli import main
from cineline.engine.hub import open_model
from cineline.errors import OutputError
from cineline.families.wan.convert import convert
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.recognise import look_into
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.text import SPIECE_READERS, Tokenizer, _is_installed
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


def test_the_size_of_a_head_is_read_beside_the_weights(alone: Callable[[WanKind], ModelFiles], tmp_path: Path) -> None:
    files = alone("ti2v")
    for told, heads in (({"dim": 128, "num_heads": 4}, 4), ({"attention_head_dim": 64}, 2), ({"dim": "?"}, 1)):
        (tmp_path / "config.json").write_text(json.dumps(told))
        spec = open_model(None, files=files)
        assert isinstance(spec, WanSpec)
        assert spec.transformer["num_attention_heads"] == heads


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
    (put("blocks.0.odd.weight", 3), ["a tensor 'blocks.0.odd.weight' that its config does not know"]),
    (put("model.diffusion_model.head.modulation", 1, 2, 128), ["a tensor 'model.diffusion_model.head.modulation'"]),
    (lambda tensors: tensors.pop("blocks.1.ffn.0.bias"), ["lacks tensor 'blocks.1.ffn.net.0.proj.bias'"]),
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


def refused(files: ModelFiles, *words: str, model: Path | None = None) -> None:
    """In one sentence, when it is opened or at the latest by the ranks."""
    with pytest.raises(CheckpointError) as error:
        spec = open_model(model, files=files)
        Engine(spec, device="cpu").close()
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


def test_a_truncated_gguf_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "transformer.gguf"
    state = original_transformer(state_of(checkpoint(shapes("ti2v")), "transformer"))
    as_gguf(file, state, lambda name: name, gguf.GGMLQuantizationType.Q8_0)
    whole = file.read_bytes()
    assert look_into(file).component == "transformer"
    for size in (0, 3, 30, 2000, len(whole) // 2, len(whole) - 4000):
        file.write_bytes(whole[:size])
        refused(ModelFiles(file), f"'{file}' is no GGUF file, or it is truncated", "download it again")


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
    told = torch.frombuffer(bytearray((home / "spiece.model").read_bytes()), dtype=torch.uint8)
    save_file({**load_file(file), "spiece_model": told}, file)


@pytest.mark.skipif(
    not all(map(_is_installed, SPIECE_READERS.values())), reason="sentencepiece, protobuf not installed"
)
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
    monkeypatch.setattr("cineline.families.wan.text._is_installed", lambda module: False)
    files = alone("ti2v")
    assert files.text_encoder_file is not None
    with_spiece(checkpoint(shapes("ti2v")), files.text_encoder_file, tmp_path)
    shutil.rmtree(tmp_path / "google")
    refused(
        files, f"'{files.text_encoder_file}' has a spiece.model", "run pip install sentencepiece protobuf, or put a"
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
    assert run(monkeypatch, "convert", *options(files), "--to", str(folder)) == 2
    assert "is there already" in capsys.readouterr().err


def test_bench_exact_takes_the_files(
    alone: Callable[[WanKind], ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--arm", "pp=2", "--in-flight", "2", "--json", str(tmp_path / "e.json")]
    assert run(monkeypatch, "bench", "exact", *options(alone("ti2v")), *arguments) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert row["latents"] == row["frames"] == row["requests"] == 6


def test_a_folder_is_converted_whole_or_not_at_all(
    alone: Callable[[WanKind], ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = alone("ti2v")
    spec = open_model(None, files=files)
    assert isinstance(spec, WanSpec) and files.text_encoder_file is not None
    before = sorted(path.name for path in tmp_path.iterdir())
    tensors = load_file(files.text_encoder_file)
    save_file({**tensors, "odd": torch.zeros(1)}, files.text_encoder_file)  # the last component
    with pytest.raises(CheckpointError, match="a tensor 'odd'"):
        convert(spec, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    save_file(tensors, files.text_encoder_file)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cineline.weights.sharded.save_file", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\): check the disk"):
        convert(spec, tmp_path / "model")
    with pytest.raises(OutputError, match="does not exist: make it first"):
        convert(spec, tmp_path / "nowhere" / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
