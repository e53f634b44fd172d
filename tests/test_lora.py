"""LoRAs: merged, every tensor of each format equals diffusers' `fuse_lora`; by request, its run without that."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from json import dumps, loads
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import State, folder_that_says
from foreign import write as write_component
from lora_files import (
    FORMATS,
    READ,
    WITH_ALPHA,
    Loaded,
    diffusers_own,
    kohya,
    pipeline_with,
    rewritten,
    shapes_of,
    state,
    truth,
    with_config,
    write,
)
from oracle import FIELDS, Checkpoint
from safetensors.torch import load_file, save_file
from solver_oracle import bound, boundary_of, solver_of
from test_cli import run
from test_files import loaded
from test_parity import picture
from test_weights import owner

from cineline import CheckpointError, Engine, InvalidConfig, InvalidRequest, ModelFiles, ParallelConfig, VideoRequest
from cineline.cli.resume import Order
from cineline.core.config import DeviceConfig, Dtype, Place
from cineline.core.control import FROM_ENGINE
from cineline.core.lora import Lora
from cineline.core.request import drawn
from cineline.engine.hub import open_model
from cineline.engine.lora import add_loras
from cineline.families.identity import identity_of
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.lora_keys import adapters
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.families.wan.tensors import transformer_tensors
from cineline.families.wan.weights import weights_of
from cineline.weights.files import Shard

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
FILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL: dict[str, Any] = {"heads": 2, "head_dim": 32, "ffn_dim": 96, "text_width": 32, "seed": 5}

NORMS = ("blocks.1.norm2.weight", "blocks.1.norm2.bias", "blocks.0.attn1.norm_q.weight", "blocks.3.attn2.norm_k.weight")
TABLES = ("scale_shift_table", "blocks.2.scale_shift_table")
WHOLE = ("patch_embedding.weight", "blocks.0.ffn.net.2.weight", "blocks.0.ffn.net.2.bias")


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint) -> Path:
    """Two experts."""
    return checkpoint(RandomConfig("t2v", **SMALL))


def with_loras(folder: Path, *loras: str, mode: Any = "merge", files: ModelFiles | None = None) -> WanSpec:
    spec = add_loras(open_model(folder, files=files), loras, mode)
    assert isinstance(spec, WanSpec)
    return spec


def merged(spec: WanSpec, expert: str, like: State) -> State:
    """All tensors of an expert, as a rank reads them."""
    weights = weights_of(spec.component(expert), list(adapters(spec, expert).values()))
    return {name: weights.read(name, tuple(one.shape), one.dtype, torch.device("cpu")) for name, one in like.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert one.dtype == expected[name].dtype
        assert torch.equal(one, expected[name]), name


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_the_tensors_that_a_lora_may_change_are_the_models(kind: WanKind, checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig(kind, **SMALL))
    assert transformer_tensors(WanSpec.open(folder).transformer) == shapes_of(folder)


CASES = [
    (how, dtype, 1 + (row + column) % 3, FILE_DTYPES[(row + column) % 3])
    for (row, how), (column, dtype) in product(enumerate(FORMATS), enumerate(DTYPES))
]


@pytest.mark.parametrize(("how", "dtype", "stages", "stored"), CASES)
def test_each_stage_merges_its_own_tensors_with_the_bits_of_diffusers(
    how: str, dtype: Dtype, stages: int, stored: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    """One for the first expert at 0.7, then one for both at -0.4, of other ranks and not of all blocks."""
    alpha = 3 if how in WITH_ALPHA else None
    first = truth(folder, 1, rank=4, alpha=alpha, dtype=stored)
    both = truth(folder, 2, rank=6, alpha=alpha, blocks=(1, 2), dtype=stored)
    files = [write(first, how, tmp_path / "one" / "first.safetensors"), write(both, how, tmp_path / "both.safetensors")]
    spec = with_loras(folder, f"high:{files[0]}@0.7", f"{files[1]}@-0.4")
    own = files[0] if how in READ else rewritten(first)
    other = files[1] if how in READ and how != "musubi" else rewritten(both)  # it reads none that has not all blocks
    pipe = pipeline_with(
        folder, dtype, [Loaded(own, scale=0.7), Loaded(other, scale=-0.4), Loaded(other, "transformer_2", -0.4)]
    )
    plain = WanSpec.open(folder)
    cuts = spec.cut(spec.place(ParallelConfig(pp=stages)), DeviceConfig(dtype=dtype))
    seen: set[str] = set()
    for stage in range(stages):
        found, nbytes = loaded(spec, stage, stages, dtype)
        without, plain_bytes = loaded(plain, stage, stages, dtype)
        for number, expert in enumerate(spec.experts):
            expected, prefix = state(getattr(pipe, expert)), f"expert {number}."
            own_names = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
            assert_same({n: found[prefix + n] for n in own_names}, {n: expected[n] for n in own_names})
            seen |= {f"{expert}.{n}" for n in own_names if not torch.equal(found[prefix + n], without[prefix + n])}
        assert nbytes - plain_bytes == sum(
            a.nbytes + b.nbytes + (8 if alpha else 0)
            for lora in (first, both, both)
            for module, (a, b) in lora.factors.items()
            if owner("transformer", f"{module}.weight", cuts, []) == stage
        )
    assert seen == {f"transformer.{module}.weight" for module in first.factors} | {
        f"transformer_2.{module}.weight" for module in both.factors
    }


@pytest.mark.parametrize("placement", ["shared", "split"])
def test_the_planner_counts_what_is_kept_beside_the_weights(placement: Any, folder: Path, tmp_path: Path) -> None:
    """As many bytes on each stage as are read there, where the file has the dtype that is computed in."""
    first = write(truth(folder, 1, rank=4, alpha=None, dtype=torch.float32), "PEFT", tmp_path / "first.safetensors")
    some = truth(folder, 2, rank=6, alpha=None, blocks=(1, 2), dtype=torch.float32)
    both = write(some, "PEFT", tmp_path / "both.safetensors")
    plain, spec = WanSpec.open(folder), with_loras(folder, f"high:{first}", str(both), mode="runtime")
    parallel = plain.place(ParallelConfig(pp=3, expert_placement=placement))
    filled = parallel.filled(plain.cut(parallel, DeviceConfig()))
    own = [ModelCosts.of(one, "float32", "float32") for one in (spec, plain)]
    config = DeviceConfig()
    read = [
        [
            WanStages(one).load(StagePart(Place(pp=stage), filled, cut, torch.device("cpu"), config))
            for stage, cut in enumerate(plain.cut(filled, config))
        ]
        for one in (spec, plain)
    ]
    for stage in range(3):
        counted, without = (costs.held(filled, Place(pp=stage)).total for costs in own)
        assert counted - without == read[0][stage] - read[1][stage] > 0
    assert own[0].whole.total - own[1].whole.total == sum(read[0]) - sum(read[1])
    merged_in = with_loras(folder, f"high:{first}")
    assert ModelCosts.of(merged_in, "float32", "float32").whole == own[1].whole


def test_plan_takes_what_generate_takes(folder: Path, tmp_path: Path) -> None:
    file, json = write(truth(folder, 1, rank=4), "PEFT", tmp_path / "a b.safetensors"), tmp_path / "plan.json"
    plain = ("plan", "--devices", "2xL40S", "--model", str(folder), "--json", str(json))
    loras = ("--lora", f"one=high:{file}@0.5", "--lora-mode", "runtime")
    weights = []
    for options in ((), loras):
        done = run(*plain, *options)
        assert done.returncode == 0, done.stderr
        weights.append(sum(stage["weights_gb"] for stage in loads(json.read_text())["best"]["stages"]))
    assert weights[0] < weights[1]
    assert f"--lora 'one=high:{file}@0.5' --lora-mode runtime" in loads(json.read_text())["best"]["command"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["blocks", "embedders", "head"])
def test_what_is_beside_the_factors_is_as_in_diffusers(mode: str, dtype: Dtype, folder: Path, tmp_path: Path) -> None:
    """Biases, the embedders, and as in Wan2.2-Distill-Loras a difference of the head's weight: as files, by diffusers.

    In bfloat16 that fails on files with some modules' biases and not others' (PEFT leaves those factors uncast).
    """
    made = truth(folder, 3, biases=True, embedders=mode == "embedders")
    named = kohya("diffusion_model.")(made)
    head = {"proj_out.weight": "diff", "proj_out.bias": "diff_b"} if mode == "head" else {}
    for name, ending in head.items():
        named[f"diffusion_model.head.head.{ending}"] = torch.randn(shapes_of(folder)[name]) * 0.1
    file = tmp_path / "lora.safetensors"
    save_file(named, file)
    expected = state(pipeline_with(folder, dtype, [Loaded(file, scale=0.6)]).transformer)
    spec = with_loras(folder, f"high:{file}@0.6")
    assert_same(merged(spec, "transformer", expected), expected)
    plain = merged(WanSpec.open(folder), "transformer", expected)
    changed = {name for name, one in expected.items() if not torch.equal(one, plain[name])}
    assert changed == {f"{module}.{leaf}" for module in made.factors for leaf in ("weight", "bias")} | head.keys()


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_has_every_module(how: str, folder: Path, tmp_path: Path) -> None:
    made = truth(folder, 3, biases=True, embedders=True, diffs=(*NORMS, *TABLES, "patch_embedding.weight"))
    assert made.diffs is not None
    spec = with_loras(folder, str(write(made, how, tmp_path / "lora.safetensors")))
    deltas = adapters(spec, "transformer")["lora"].deltas
    factors = {f"{module}.weight" for module in made.factors}
    assert deltas.keys() == factors | {f"{module}.bias" for module in made.factors} | made.diffs.keys()
    assert {name for name, delta in deltas.items() if delta.down and delta.up} == factors
    assert {name for name, delta in deltas.items() if delta.diff} == deltas.keys() - factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_are_added_at_the_scale(dtype: Dtype, folder: Path, tmp_path: Path) -> None:
    """Of norms, tables and whole weights, which diffusers leaves out."""
    made = truth(folder, 4, blocks=(), diffs=(*NORMS, *TABLES, *WHOLE))
    assert made.diffs is not None
    file = write(made, "lightx2v", tmp_path / "lora.safetensors")
    like = state(pipeline_with(folder, dtype, []).transformer)
    found = merged(with_loras(folder, f"high:{file}@0.6"), "transformer", like)
    expected = {
        name: one + made.diffs[name].to(one.dtype) * 0.6 if name in made.diffs else one for name, one in like.items()
    }
    assert_same(found, expected)
    assert all(not torch.equal(found[name], like[name]) for name in made.diffs)


@pytest.mark.parametrize(("how", "dtype"), [("comfy", "bfloat16"), ("gguf Q8_0", "float32"), ("cast", "bfloat16")])
def test_weights_in_fewer_bits_are_dequantised_and_then_merged(
    how: str, dtype: Dtype, folder: Path, tmp_path: Path
) -> None:
    file = write(truth(folder, 6, alpha=3), "lightx2v", tmp_path / "lora.safetensors")
    names = ("transformer", "transformer_2")
    written = {name: write_component(folder, name, how, tmp_path) for name in names}
    says = {name: packed for name, (_, packed) in written.items()}
    same = folder_that_says(folder, tmp_path / "same", says, getattr(torch, dtype))
    expected = pipeline_with(same, dtype, [Loaded(file, name, 0.7) for name in names])
    spec = with_loras(folder, f"{file}@0.7", files=ModelFiles(*(written[name][0] for name in names)))
    for name in names:
        wanted = state(getattr(expected, name))
        assert_same(merged(spec, name, wanted), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_that_share_a_block_cut_what_is_merged(dtype: Dtype, folder: Path, tmp_path: Path) -> None:
    file = write(truth(folder, 6, alpha=3), "lightx2v", tmp_path / "lora.safetensors")
    like = state(pipeline_with(folder, dtype, []).transformer)
    spec = with_loras(folder, f"{file}@0.7")
    whole = merged(spec, "transformer", like)
    weights = weights_of(spec.component("transformer"), list(adapters(spec, "transformer").values()))
    for name, dim in (("attn1.to_q.weight", 0), ("attn2.to_out.0.weight", 1), ("ffn.net.0.proj.weight", 0)):
        tensor = whole[f"blocks.1.{name}"]
        for index, part in enumerate(tensor.chunk(2, dim)):
            shard = Shard(dim, index, 2)
            arguments = tuple(part.shape), tensor.dtype, torch.device("cpu"), shard
            assert torch.equal(weights.read(f"blocks.1.{name}", *arguments), part)


def test_both_experts_from_one_file(folder: Path, tmp_path: Path) -> None:
    """As ai-toolkit writes it: numbers of experts within the names."""
    parts = [truth(folder, seed, blocks=(0, 3)) for seed in (1, 2)]
    named: State = {}
    for number, part in enumerate(parts, 1):
        named |= kohya(f"diffusion_model.transformer_{number}.")(part)
    save_file(named, tmp_path / "lora.safetensors")
    for texts, used in (
        ([f"{tmp_path / 'lora.safetensors'}"], (0, 1)),
        ([f"low:{tmp_path / 'lora.safetensors'}"], (1,)),
    ):
        spec = with_loras(folder, *texts)
        loras = [Loaded(rewritten(parts[number]), spec.experts[number]) for number in used]
        pipe = pipeline_with(folder, "float32", loras)
        for expert in spec.experts:
            expected = state(getattr(pipe, expert))
            assert_same(merged(spec, expert, expected), expected)


@pytest.mark.parametrize("config", [{"lora_alpha": 6, "r": 4}, {"lora_alpha": 6, "r": 4, "use_rslora": True}])
def test_pefts_config_says_the_factor(config: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    made = truth(folder, 5)
    file = write(made, "PEFT", tmp_path / "own" / "adapter_model.safetensors")
    with_config(file.parent, **config, alpha_pattern={"blocks.1.attn1.to_q": 3})
    factor = {
        name: (3 if name == "blocks.1.attn1.to_q" else 6) / (2 if "use_rslora" in config else 4)
        for name in made.factors
    }
    like = state(pipeline_with(folder, "float32", []).transformer)
    expected = dict(like)
    for module, (a, b) in made.factors.items():
        expected[f"{module}.weight"] = like[f"{module}.weight"] + (b @ a) * (factor[module] * 0.5)
    assert_same(merged(with_loras(folder, f"high:{file.parent}@0.5"), "transformer", like), expected)


def test_diffusers_own_header_says_the_factor(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig

    pipe = WanPipeline.from_pretrained(folder)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    )
    pipe.transformer.save_lora_adapter(tmp_path / "one", adapter_name="default")
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0"]}
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    expected = state(pipeline_with(folder, "bfloat16", [Loaded(file, scale=0.5)]).transformer)
    assert_same(merged(with_loras(folder, f"high:{file}@0.5"), "transformer", expected), expected)


def diffusers_file(file: Path, made: Any, **config: Any) -> Path:
    """With a config in its header, as diffusers writes it."""
    names = {f"transformer.{name}": value for name, value in (config | {"target_modules": [*made.factors]}).items()}
    state = {
        name.replace("lora_B.bias", ".lora_B.bias").replace("..", "."): one
        for name, one in FORMATS["diffusers"](made).items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.contiguous() for name, one in state.items()}, file, {"lora_adapter_metadata": dumps(names)})
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_pefts_factor_is_of_biases_too(dtype: Dtype, folder: Path, tmp_path: Path) -> None:
    file = diffusers_file(tmp_path / "a.safetensors", truth(folder, 1, biases=True), r=4, lora_alpha=8, lora_bias=True)
    expected = state(pipeline_with(folder, dtype, [Loaded(file, scale=0.5)]).transformer)
    assert_same(merged(with_loras(folder, f"high:{file}@0.5"), "transformer", expected), expected)


def test_pefts_factor_is_of_biases_beside_the_weights_too(folder: Path, tmp_path: Path) -> None:
    file = diffusers_file(tmp_path / "a.safetensors", truth(folder, 1, biases=True), r=4, lora_alpha=8, lora_bias=True)
    request = asked("t2v", 4)
    with Engine(folder, ParallelConfig(pp=2), loras=[f"high:{file}"], lora_mode="runtime", device="cpu") as engine:
        found = engine.submit(request).result(120).latents
    assert torch.equal(found, latents_of(pipeline_with(folder, "float32", [Loaded(file)], fuse=False), request))


def test_of_patterns_the_first_that_fits_says_alpha(folder: Path, tmp_path: Path) -> None:
    patterns = {"blocks.0.attn1.to_q": 2, "to_q": 16}
    file = diffusers_file(tmp_path / "a.safetensors", truth(folder, 1), r=4, lora_alpha=8, alpha_pattern=patterns)
    expected = state(pipeline_with(folder, "float32", [Loaded(file)]).transformer)
    assert_same(merged(with_loras(folder, f"high:{file}"), "transformer", expected), expected)


@pytest.mark.parametrize("how", ["lightx2v", "diffusers"])
def test_a_config_beside_another_file_is_not_its_own(how: str, folder: Path, tmp_path: Path) -> None:
    alpha = 2 if how in WITH_ALPHA else None
    file = write(truth(folder, 1, alpha=alpha), how, tmp_path / "pytorch_lora_weights.safetensors")
    with_config(tmp_path, r=4, lora_alpha=8)
    expected = state(pipeline_with(folder, "float32", [Loaded(file)]).transformer)
    assert_same(merged(with_loras(folder, f"high:{file}"), "transformer", expected), expected)


def test_in_diffusers_names_the_first_expert_has_no_number(folder: Path, tmp_path: Path) -> None:
    first, second = truth(folder, 1, blocks=(0, 1)), truth(folder, 2, blocks=(1, 2))
    parts = diffusers_own("transformer.")(first) | diffusers_own("transformer_2.")(second)
    save_file({name: one.contiguous() for name, one in parts.items()}, tmp_path / "both.safetensors")
    spec = with_loras(folder, str(tmp_path / "both.safetensors"))
    pipe = pipeline_with(folder, "float32", [Loaded(rewritten(first)), Loaded(rewritten(second), "transformer_2")])
    for expert in spec.experts:
        expected = state(getattr(pipe, expert))
        assert_same(merged(spec, expert, expected), expected)


QUERY = "base_model.model.blocks.0.self_attn.q"
FACTORS = {f"{QUERY}.lora_down.weight": torch.ones(4, 64), f"{QUERY}.lora_up.weight": torch.ones(64, 4)}
EMPTY = {f"{QUERY}.lora_down.weight": torch.ones(0, 64), f"{QUERY}.lora_up.weight": torch.ones(64, 0)}


@pytest.mark.parametrize(
    ("changed", "config", "words"),
    [
        ({f"{QUERY}.alpha": torch.ones(2)}, {}, "has shapes"),
        (EMPTY, {}, "has no rows"),
        ({}, {"lora_alpha": "x"}, "is no alpha for"),
        ({}, {"lora_alpha": [8]}, "is no alpha for"),
        ({}, {"lora_alpha": 8, "alpha_pattern": [1]}, "is no alpha for"),
        ({}, {"lora_alpha": 8, "alpha_pattern": {"(": 1}}, "is no alpha for"),
    ],
)
def test_broken_numbers_are_refused_before_ranks_start(
    changed: State, config: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    save_file(FACTORS | changed, tmp_path / "a.safetensors")
    with_config(tmp_path, **config)
    with pytest.raises(CheckpointError, match=words):
        with_loras(folder, f"high:{tmp_path / 'a.safetensors'}")


def test_an_alpha_that_is_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    save_file(FACTORS | {f"{QUERY}.alpha": torch.tensor(torch.nan)}, tmp_path / "a.safetensors")
    spec = with_loras(folder, f"high:{tmp_path / 'a.safetensors'}")
    with pytest.raises(CheckpointError, match=r"q\.alpha' is nan"):
        merged(spec, "transformer", state(pipeline_with(folder, "float32", []).transformer))


def test_factors_in_eight_bits_take_an_alpha(folder: Path, tmp_path: Path) -> None:
    made = truth(folder, 1, alpha=2)
    short = {
        name: one if name.endswith("alpha") else one.to(torch.float8_e4m3fn)
        for name, one in FORMATS["lightx2v"](made).items()
    }
    save_file(short, tmp_path / "short.safetensors")
    save_file({name: one.float() for name, one in short.items()}, tmp_path / "long.safetensors")
    like = state(pipeline_with(folder, "float32", []).transformer)
    found, expected = (
        merged(with_loras(folder, f"high:{tmp_path / name}.safetensors"), "transformer", like)
        for name in ("short", "long")
    )
    assert_same(found, expected)


def test_a_lora_is_called_by_its_folder_wherever_one_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(truth(folder, 1), "PEFT", tmp_path / "own" / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path / "own")
    (lora,) = with_loras(folder, ".").loras
    assert lora.name == "own"
    assert Lora.of(lora.text) == replace(lora, path=lora.path.absolute())
    assert add_loras(open_model(folder), [tmp_path / "own"], "merge").loras[0].name == "own"  # type: ignore[attr-defined]
    with pytest.raises(InvalidConfig, match="is no text"):
        add_loras(open_model(folder), [3], "merge")  # type: ignore[list-item]
    with pytest.raises(InvalidConfig, match="write NAME=FILE"):
        Lora.of("/")


def test_a_path_in_a_folder_that_is_here_is_no_hub_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my" / "loras").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"'my/loras/typo.safetensors' does not exist in 'my'"):
        with_loras(folder, "my/loras/typo.safetensors")


def latents_of(pipe: Any, request: VideoRequest) -> torch.Tensor:
    """diffusers' [C, F', H', W']."""
    arguments = {name: getattr(request, name) for name in FIELDS if getattr(request, name) is not None}
    generator = torch.Generator("cpu").manual_seed(drawn(request.seed))
    latents: torch.Tensor = pipe(generator=generator, output_type="latent", **arguments).frames[0].float()
    return latents


def asked(kind: WanKind, seed: int, **fields: Any) -> VideoRequest:
    second = {} if kind == "ti2v" else {"guidance_scale_2": 2.5}
    image = {"image": picture(70, 90, seed=1)} if kind == "i2v" else {}
    common = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 4.0}
    return VideoRequest(prompt="a cat runs", seed=seed, decode=False, **common | second | image | fields)


RUNS: list[tuple[WanKind, Dtype, dict[str, Any]]] = [
    ("ti2v", "float32", {"pp": 3}),
    ("t2v", "bfloat16", {"pp": 3, "expert_placement": "split"}),
    ("i2v", "float32", {"pp": 2}),
    ("t2v", "float32", {"tp": 2}),
]


@pytest.mark.parametrize(("kind", "dtype", "axes"), RUNS)
def test_latents_equal_diffusers(
    kind: WanKind, dtype: Dtype, axes: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With one LoRA for each expert and one for both, merged; the ranks that share blocks are close, as without."""
    folder, request = checkpoint(RandomConfig(kind, **SMALL)), asked(kind, 11)
    experts = WanSpec.open(folder).experts
    loras, told = [], []
    for seed, (expert, level) in enumerate(zip(experts, ("high", "low"), strict=False)):
        file = write(truth(folder, seed, alpha=3), "lightx2v", tmp_path / f"{level}.safetensors")
        loras.append(f"{level}:{file}@0.7")
        told.append(Loaded(file, expert, 0.7))
    file = write(truth(folder, 8, blocks=(0, 2), embedders=True), "diffusers", tmp_path / "both.safetensors")
    told += [Loaded(file, expert) for expert in experts]
    with Engine(folder, ParallelConfig(**axes), loras=[*loras, str(file)], dtype=dtype, device="cpu") as engine:
        handle = engine.submit(request)
        expected = latents_of(pipeline_with(folder, dtype, told, image=kind == "i2v"), request)
        found = handle.result(120).latents
    if "tp" in axes:
        assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["merge", "runtime"])
def test_four_steps_from_two_files_and_a_preset(mode: Any, folder: Path, tmp_path: Path) -> None:
    """Wan2.2-Lightning's way: a folder with a file for each expert, Euler at 1000, 937.5, 833.33 and 625."""
    truths = [truth(folder, seed, alpha=3, dtype=torch.bfloat16) for seed in (1, 2)]
    for made, level in zip(truths, ("high", "low"), strict=True):
        write(made, "lightx2v, no prefix", tmp_path / f"{level}_noise_model.safetensors")
    left_out = dict.fromkeys(("num_inference_steps", "guidance_scale", "guidance_scale_2"))
    options: dict[str, Any] = {"loras": [str(tmp_path)], "lora_mode": mode, "dtype": "bfloat16", "device": "cpu"}
    with Engine(folder, ParallelConfig(pp=2), **options) as engine:
        found = engine.submit(asked("t2v", 3, preset="lightning", **left_out)).result(120).latents
    experts = ("transformer", "transformer_2")
    told = [Loaded(rewritten(made), expert) for made, expert in zip(truths, experts, strict=True)]
    pipe = pipeline_with(folder, "bfloat16", told, fuse=mode == "merge")
    fields = {"solver": "euler", "sigmas": (1, 0.75, 0.5, 0.25), "flow_shift": 5, "guidance_scale": 1}
    by_hand = asked("t2v", 3, **left_out | fields | {"num_inference_steps": 4})
    solver = bound(solver_of(pipe.scheduler, by_hand), by_hand)
    solver.set_timesteps(4)
    assert [round(float(time), 2) for time in solver.timesteps] == [1000, 937.5, 833.33, 625]
    pipe.register_modules(scheduler=solver)
    pipe.register_to_config(boundary_ratio=boundary_of(solver, 2))
    assert torch.equal(found, latents_of(pipe, by_hand))


@pytest.mark.parametrize(
    ("dtype", "axes"),
    [("float32", {"pp": 3}), ("bfloat16", {"pp": 2, "expert_placement": "split"}), ("float32", {"tp": 2})],
)
def test_requests_with_different_loras_are_in_flight_together(
    dtype: Dtype, axes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Each equals diffusers with those loaded, and not fused; one with none is as if there were none."""
    files = {
        "style": write(truth(folder, 1, alpha=3), "lightx2v", tmp_path / "style.safetensors"),
        "fast": write(truth(folder, 2, embedders=True, biases=True), "diffusers", tmp_path / "fast.safetensors"),
        "low": write(truth(folder, 3, rank=6, blocks=(1,)), "diffusers", tmp_path / "other.safetensors"),
    }
    loras = [f"{files['style']}@0.7", f"{files['fast']}", f"low=low:{files['low']}"]
    experts = ("transformer", "transformer_2")
    low = Loaded(files["low"], "transformer_2", 0.25)
    cases: list[tuple[Sequence[str] | None, list[Loaded]]] = [
        (["fast", "style@2"], [Loaded(files[n], e, s) for n, s in (("fast", 1.0), ("style", 1.4)) for e in experts]),
        (["low@0.25"], [low]),
        ([], []),
        (None, [Loaded(files[n], e, s) for n, s in (("style", 0.7), ("fast", 1.0)) for e in experts]),
    ]
    cases[3][1].append(Loaded(files["low"], "transformer_2"))
    config = ParallelConfig(**axes)
    with Engine(folder, config, loras=loras, lora_mode="runtime", dtype=dtype, device="cpu", in_flight=4) as engine:
        requests = [asked("t2v", 5, loras=names) for names, _ in cases]
        handles = [engine.submit(request) for request in requests]
        expected = [
            latents_of(pipeline_with(folder, dtype, told, fuse=False), request)
            for (_, told), request in zip(cases, requests, strict=True)
        ]
        found = [handle.result(120).latents for handle in handles]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4) if "tp" in axes else torch.equal(one, other)
    assert not any(torch.allclose(one, found[2], atol=1e-3) for number, one in enumerate(found) if number != 2)


def test_a_difference_of_a_linear_layer_goes_beside_it(folder: Path, tmp_path: Path) -> None:
    """As the head's in Wan2.2-Distill-Loras, of which diffusers makes a factor and an identity."""
    named = kohya("diffusion_model.")(truth(folder, 3, biases=True))
    for name, ending in (("proj_out.weight", "diff"), ("proj_out.bias", "diff_b")):
        named[f"diffusion_model.head.head.{ending}"] = torch.randn(shapes_of(folder)[name]) * 0.1
    save_file(named, file := tmp_path / "lora.safetensors")
    request = asked("t2v", 2)
    with Engine(folder, loras=[f"high:{file}@0.6"], lora_mode="runtime", dtype="bfloat16", device="cpu") as engine:
        found = engine.submit(request).result(120).latents
    assert torch.equal(found, latents_of(pipeline_with(folder, "bfloat16", [Loaded(file, scale=0.6)], False), request))


def test_a_request_with_an_image_embeds_time_with_its_loras(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of TI2V, where each token has a time of its own."""
    folder = checkpoint(RandomConfig("ti2v", **SMALL))
    file = write(truth(folder, 3, biases=True, embedders=True), "diffusers", tmp_path / "lora.safetensors")
    request = asked("ti2v", 2, image=picture(70, 90, seed=1))
    with Engine(folder, loras=[f"{file}@0.6"], lora_mode="runtime", device="cpu") as engine:
        found = engine.submit(request).result(120).latents
    expected = pipeline_with(folder, "float32", [Loaded(file, scale=0.6)], False, image=True)
    assert torch.equal(found, latents_of(expected, request))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora(Path("a.safetensors"), 1.0, None, "a")),
        ("high:x/a.safetensors@0.8", Lora(Path("x/a.safetensors"), 0.8, "high", "a")),
        ("style=low:owner/name/in.it@-1e-1", Lora(Path("owner/name/in.it"), -0.1, "low", "style")),
        ("owner/Wan2.2-Lightning", Lora(Path("owner/Wan2.2-Lightning"), 1.0, None, "Wan2.2-Lightning")),
        ("s=./a=b.safetensors@1", Lora(Path("a=b.safetensors"), 1.0, None, "s")),
        ("s=a@b.safetensors@2", Lora(Path("a@b.safetensors"), 2.0, None, "s")),
        ("/in it/a (1).safetensors", Lora(Path("/in it/a (1).safetensors"), 1.0, None, "a (1)")),
    ],
)
def test_how_a_lora_is_written(text: str, lora: Lora) -> None:
    assert Lora.of(text) == lora
    assert Lora.of(lora.text) == replace(lora, path=lora.path.absolute())


def alone(**changes: torch.Tensor) -> State:
    """A LoRA of one module, with other tensors beside it."""
    own = {"lora_down": torch.ones(4, 64), "lora_up": torch.ones(64, 4)}
    return {f"blocks.0.self_attn.q.{name}.weight": one for name, one in own.items()} | changes


BESIDE: list[tuple[str, tuple[int, ...], str]] = [
    ("blocks.4.self_attn.q.lora_down.weight", (4, 64), "'blocks.4.self_attn.q.lora_down.weight' belongs to nothing"),
    ("blocks.0.self_attn.x.alpha", (), "'blocks.0.self_attn.x.alpha' belongs to nothing"),
    ("blocks.0.self_attn.q.weight", (64, 64), "'blocks.0.self_attn.q.weight' belongs to nothing"),
    ("lora_te_text_model.lora_down.weight", (4, 4), "'lora_te_text_model.lora_down.weight' belongs to nothing"),
    ("blocks.0.self_attn.k.lora_up.weight", (64, 4), "lacks its other factor"),
    ("blocks.0.self_attn.k.alpha", (), "lacks its other factor"),
    ("transformer.blocks.0.attn1.to_q.lora_A.weight", (4, 64), "are for the same tensor"),
    ("blocks.0.ffn.0.diff_b", (64,), "has shapes [[64]] for 'blocks.0.ffn.net.0.proj.bias' of [96]"),
    ("blocks.0.self_attn.q.dora_scale", (64, 1), "is a DoRA"),
    ("blocks.0.self_attn.q.lora_magnitude_vector", (64,), "is a DoRA"),
    ("lycoris_blocks_0_ffn_0.lokr_w1", (4, 4), "is a LoKr"),
]
"""A tensor beside a LoRA of one module, and what is said of it."""

BY_REQUEST: list[tuple[str, tuple[int, ...]]] = [
    ("blocks.0.norm3.diff", (64,)),
    ("blocks.0.diff_m", (1, 6, 64)),
    ("patch_embedding.diff", (64, 16, 1, 2, 2)),
    ("blocks.0.ffn.0.diff_b", (96,)),
    ("blocks.0.self_attn.q.diff", (64, 64)),
]
"""Tensors that are merged, and that no request can have by itself."""

REFUSED = [
    *((alone(**{name: torch.ones(shape)}), "merge", rule) for name, shape, rule in BESIDE),
    *((alone(**{name: torch.ones(shape)}), "runtime", "use lora_mode='merge'") for name, shape in BY_REQUEST),
    ({"blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 64)}, "merge", "has no tensor of a LoRA"),
]


@pytest.mark.parametrize(("named", "mode", "rule"), REFUSED)
def test_what_belongs_to_nothing_is_named(named: State, mode: Any, rule: str, folder: Path, tmp_path: Path) -> None:
    save_file(named, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as refused:
        with_loras(folder, str(tmp_path / "lora.safetensors"), mode=mode)
    assert rule in str(refused.value)
    assert "lora.safetensors" in str(refused.value)


def test_a_lora_of_another_model_is_refused(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    wide = checkpoint(RandomConfig("t2v", **SMALL | {"heads": 4}))
    file = write(truth(wide, 1), "lightx2v", tmp_path / "lora.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has shapes \[\[4, 128\], \[128, 4\]\] for .* of \[64, 64\]: use a LoRA"
    ):
        Engine(folder, loras=[str(file)], device="cpu")


def test_tensors_for_an_image_encoder_are_left_out_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wan 2.1's, as its LoRAs for images have them; diffusers leaves them out here, too."""
    made = truth(folder, 1)
    named = kohya("diffusion_model.")(made)
    for part in ("k_img", "v_img"):
        named |= {
            f"diffusion_model.blocks.0.cross_attn.{part}.lora_down.weight": torch.ones(4, 64),
            f"diffusion_model.blocks.0.cross_attn.{part}.lora_up.weight": torch.ones(64, 4),
        }
    save_file(named, file := tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING):
        spec = with_loras(folder, f"high:{file}")
    assert "4 tensors for the image encoder of Wan 2.1 are left out" in caplog.text
    expected = state(pipeline_with(folder, "float32", [Loaded(file)]).transformer)
    assert_same(merged(spec, "transformer", expected), expected)


def test_files_of_a_folder(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    pair, one_expert = tmp_path / "Lightning", checkpoint(RandomConfig("ti2v", **SMALL))
    for level in ("high", "low"):
        write(truth(folder, 1), "lightx2v", pair / f"{level}_noise_model.safetensors")
    both = with_loras(folder, f"{pair}@0.5").loras
    assert [(lora.path.name, lora.level, lora.name, lora.scale) for lora in both] == [
        ("high_noise_model.safetensors", "high", "Lightning", 0.5),
        ("low_noise_model.safetensors", "low", "Lightning", 0.5),
    ]
    (low,) = with_loras(folder, f"low:{pair}").loras
    assert (low.path.name, low.level) == ("low_noise_model.safetensors", "low")
    with pytest.raises(CheckpointError, match="holds 2 files"):
        with_loras(one_expert, str(pair))
    write(truth(folder, 1), "lightx2v", pair / "third.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 3 files, such as .*: give one of them"):
        with_loras(folder, str(pair))
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        with_loras(folder, str(tmp_path / "none"))


def test_what_is_given_twice_or_to_no_expert(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(truth(folder, 1), "lightx2v", tmp_path / "a_low_noise.safetensors")
    with pytest.raises(InvalidConfig, match="are both called 'a_low_noise': name one, as NAME=FILE"):
        with_loras(folder, str(file), f"low:{file}")
    assert len(with_loras(folder, f"high:{file}", f"low:{file}", f"again={file}").loras) == 3
    assert "used for the high-noise expert, and its name says low" in caplog.text
    one = checkpoint(RandomConfig("ti2v", **SMALL))
    with pytest.raises(InvalidConfig, match="has one: leave out low:"):
        with_loras(one, f"low:{file}")
    save_file(kohya("diffusion_model.transformer_2.")(truth(one, 1)), tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="is for two experts"):
        with_loras(one, str(tmp_path / "two.safetensors"))
    with pytest.raises(CheckpointError, match="does not exist: give a file"):
        with_loras(folder, str(tmp_path / "nowhere.safetensors"))
    for text, rule in (("", "names no file"), ("a@x", "is no finite number"), ("a@nan", "is no finite number")):
        with pytest.raises(InvalidConfig, match=rule):
            with_loras(folder, text)
    with pytest.raises(InvalidConfig, match="lora_mode='fuse' is not known: use merge or runtime"):
        with_loras(folder, mode="fuse")


def test_what_a_request_may_name(folder: Path, tmp_path: Path) -> None:
    files = [write(truth(folder, 1), "lightx2v", tmp_path / f"{name}.safetensors") for name in ("b", "a")]
    for name, shape in BY_REQUEST:
        save_file(alone(**{name: torch.ones(shape)}), tmp_path / "merged.safetensors")
        with_loras(folder, str(tmp_path / "merged.safetensors"))
    spec = with_loras(folder, *(f"{file}@0.5" for file in files), mode="runtime")
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(spec)) == spec
    for asked_for, names, scales in ((None, ("b", "a"), (1, 1)), (["a@2", "b"], ("a", "b"), (2, 1)), ([], (), ())):
        job = spec.resolve(asked("t2v", 1, loras=asked_for), 0)
        assert (job.loras, job.lora_scales) == (names, scales)
    assert spec.resolve(asked("t2v", 1, loras=["a@0.25"]), 0).own_settings["loras"] == "a"
    for given, rule in (
        (["c"], "'c' is not there: name one of the engine's, ['a', 'b'], or"),
        (["a", "a@2"], "'a' is named twice"),
        (["a@"], "has no finite number"),
        (["a@inf"], "has no finite number"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            spec.resolve(asked("t2v", 1, loras=given), 0)
        assert rule in str(refused.value)
    merged_in = with_loras(folder, str(files[0]))
    assert "loras" not in merged_in.resolve(asked("t2v", 1), 0).own_settings
    with pytest.raises(InvalidRequest, match="keeps its LoRAs apart: give that lora_mode='runtime'"):
        merged_in.resolve(asked("t2v", 1, loras=["b"]), 0)


@pytest.mark.parametrize("given", ["owner/name", "owner/name/in/side", "owner/name/in/side/lora.safetensors"])
def test_a_lora_on_the_hub(given: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository with more in it than is wanted, this comes alone."""
    there, here, come = tmp_path / "there", tmp_path / "here", []
    inside = Path(given.removeprefix("owner/name").removesuffix("/lora.safetensors").removeprefix("/"))
    wanted = write(truth(folder, 1), "lightx2v", there / inside / "lora.safetensors")
    write(truth(folder, 2), "lightx2v", there / inside / "deeper" / "other.safetensors")

    def snapshot_download(
        hub_id: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None, dry_run: bool = False
    ) -> Any:
        assert hub_id == "owner/name"
        names = [path.relative_to(there).as_posix() for path in there.rglob("*.*")]
        names = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        names = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignore_patterns or ())]
        if dry_run:
            return [SimpleNamespace(filename=name) for name in names]
        for name in names:
            come.append(there / name)
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, here / name)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (lora,) = with_loras(folder, f"{given}@0.5").loras
    assert come == [wanted]
    assert lora.path == here / inside / "lora.safetensors"
    for number in range(2):
        write(truth(folder, 2), "lightx2v", there / inside / f"{number}.safetensors")
    if not given.endswith("safetensors"):
        with pytest.raises(CheckpointError, match="holds 3 files"):
            with_loras(folder, given)
        assert come == [wanted]
    with pytest.raises(CheckpointError, match="is not in 'owner/name' on the hub: check the path"):
        with_loras(folder, "owner/name/not/there.safetensors")


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    """A file of requests with LoRAs of their own; each line's equals what the engine gives."""
    one, two = (write(truth(folder, n), "lightx2v", tmp_path / f"{n}" / "lora.safetensors") for n in (1, 2))
    lines = ['{"prompt": "a", "loras": ["b@2"]}', '{"prompt": "a", "loras": ["a", "b"]}']
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    texts = [f"a=high:{one}", f"b={two}@0.5"]
    loras = ["--lora", texts[0], "--lora", texts[1], "--lora-mode", "runtime"]
    size = ["--height", "32", "--width", "32", "--num-frames", "1", "--num-inference-steps", "2"]
    files = ["--requests", str(tmp_path / "requests.jsonl"), "--save-latents", str(tmp_path / "out")]
    done = run("generate", *files, "--model", str(folder), *loras, *size, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"with LoRA {texts[0]} with LoRA {texts[1]} on 1 rank" in done.stderr
    assert "loras b, lora scales 2," in done.stderr
    assert "loras a,b, lora scales 1,1," in done.stderr
    fields: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 2, "decode": False}
    with Engine(folder, loras=texts, lora_mode="runtime", device="cpu") as engine:
        for number, names in enumerate((["b@2"], ["a", "b"]), 1):
            video = engine.submit(VideoRequest(prompt="a", loras=names, **fields)).result(60)
            assert torch.equal(load_file(tmp_path / "out" / f"{number:04}.safetensors")["latents"], video.latents)


def test_what_the_command_line_refuses(folder: Path) -> None:
    for options, rule in (
        (["--lora", "a.safetensors", "--lora-mode", "fuse"], "lora_mode='fuse' is not known: use merge or runtime."),
        (["--lora", "nowhere.safetensors"], "LoRA 'nowhere.safetensors' does not exist: give a file, a folder, or"),
    ):
        done = run("generate", "a", "--model", str(folder), *options)
        assert done.returncode > 0
        assert rule in done.stderr


def test_a_snapshot_folder_knows_the_loras(folder: Path, tmp_path: Path) -> None:
    """They are of the model's identity, whatever their files are called; who resumes need not name them."""
    one = write(truth(folder, 1), "lightx2v", tmp_path / "one" / "a.safetensors")
    two = write(truth(folder, 2), "lightx2v", tmp_path / "two" / "a.safetensors")
    again = tmp_path / "again" / "other.safetensors"
    again.parent.mkdir()
    shutil.copy(one, again)
    given = with_loras(folder, f"high:{one}@0.7")
    assert identity_of(with_loras(folder, f"a=high:{again}@0.7")) == identity_of(given)
    others = [("merge", f"high:{one}@0.6"), ("merge", f"low:{one}@0.7"), ("merge", f"high:{two}@0.7")]
    others += [("runtime", f"high:{one}@0.7"), ("merge", f"b=high:{one}@0.7")]
    identities = {identity_of(with_loras(folder, text, mode=mode)) for mode, text in others}
    assert len(identities | {identity_of(given), identity_of(WanSpec.open(folder))}) == 2 + len(others)
    loras = [f"high:{one}@0.7", f"b={two}"]
    with Engine(folder, loras=loras, lora_mode="runtime", snapshot_dir=tmp_path / "kept", device="cpu"):
        pass
    order = Order(None, None, {}, {}, {}, None, [], "merge").resumed(tmp_path / "kept")
    assert (order.loras, order.lora_mode) == ([f"a=high:{one}@0.7", f"b={two}@1.0"], "runtime")
    assert DeviceConfig(**order.devices) == DeviceConfig()
    asked_for = replace(order, loras=loras[:1], lora_mode="merge").resumed(tmp_path / "kept")
    assert (asked_for.loras, asked_for.lora_mode) == (loras[:1], "merge")
