"""LoRAs as others write them, made from random factors, and what diffusers makes of them.

Names are made without Cineline's own maps: `foreign.original_name` is checked against diffusers' converter.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from foreign import State, original_name
from safetensors.torch import save_file

ATTENTION = [f"attn{number}.{linear}" for number in (1, 2) for linear in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = ["ffn.net.0.proj", "ffn.net.2"]
EMBEDDERS = [
    *(f"condition_embedder.{name}.linear_{number}" for name in ("time_embedder", "text_embedder") for number in (1, 2)),
    "condition_embedder.time_proj",
    "proj_out",
]


@dataclass(frozen=True)
class Truth:
    """A LoRA by diffusers' modules: factors before `alpha / rank`, and what is beside them.

    Attributes:
        factors: A [rank, in] and B [out, rank]. alpha: of all; None for none.
        biases: what is added to a module's bias. diffs: to a tensor, by diffusers' name.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    alpha: int | None = None
    biases: Mapping[str, torch.Tensor] | None = None
    diffs: Mapping[str, torch.Tensor] | None = None


def modules_of(shapes: Mapping[str, tuple[int, ...]], blocks: Sequence[int], embedders: bool) -> list[str]:
    inside = [f"blocks.{block}.{name}" for block in blocks for name in (*ATTENTION, *FEED_FORWARD)]
    return inside + (EMBEDDERS if embedders else [])


def truth(
    folder: Path,
    seed: int,
    rank: int = 4,
    alpha: int | None = None,
    blocks: Sequence[int] = (0, 1, 2, 3),
    embedders: bool = False,
    biases: bool = False,
    diffs: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Truth:
    """Random, for the transformer of a checkpoint; not every tensor has the same values in float32 and `dtype`."""
    shapes = shapes_of(folder)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    modules = modules_of(shapes, blocks, embedders)
    factors = {
        name: (draw(rank, shapes[f"{name}.weight"][1]), draw(shapes[f"{name}.weight"][0], rank)) for name in modules
    }
    own = {name: draw(shapes[f"{name}.bias"][0]) for name in modules} if biases else {}
    return Truth(factors, alpha, own, {name: draw(*shapes[name], scale=0.05) for name in diffs})


@cache
def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "transformer"))
    return {name: tuple(one.shape) for name, one in model.state_dict().items()}


def original(module: str) -> str:
    """A module as Wan's own repository calls it."""
    return original_name(f"{module}.weight").removesuffix(".weight")


def names_of(truth: Truth, rename: Callable[[str], str], down: str, up: str, bias: str = "diff_b") -> State:
    """All tensors by a way of naming modules and factors."""
    made: State = {}
    for module, (a, b) in truth.factors.items():
        name = rename(module)
        made |= {f"{name}{down}": a, f"{name}{up}": b}
        if truth.alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(truth.alpha)
    made |= {f"{rename(module)}.{bias}": one for module, one in (truth.biases or {}).items()}
    for tensor, one in (truth.diffs or {}).items():
        module, _, leaf = tensor.rpartition(".")
        if leaf == "scale_shift_table":
            made[f"{rename(module) if module else rename('head')}.diff_m"] = one
        else:
            made[f"{rename(module)}.{'diff' if leaf == 'weight' else 'diff_b'}"] = one
    return made


def kohya(prefix: str) -> Callable[[Truth], State]:
    return lambda truth: names_of(truth, lambda name: prefix + original(name), ".lora_down.weight", ".lora_up.weight")


def peft_like(prefix: str, adapter: str = "") -> Callable[[Truth], State]:
    return lambda truth: names_of(
        truth, lambda name: prefix + original(name), f".lora_A{adapter}.weight", f".lora_B{adapter}.weight"
    )


def musubi(prefix: str) -> Callable[[Truth], State]:
    return lambda truth: names_of(
        truth, lambda name: prefix + original(name).replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    )


def diffusers_own(prefix: str) -> Callable[[Truth], State]:
    return lambda truth: names_of(
        truth, lambda name: prefix + name, ".lora_A.weight", ".lora_B.weight", bias="lora_B.bias"
    )


FORMATS: dict[str, Callable[[Truth], State]] = {
    "lightx2v": kohya("diffusion_model."),
    "lightx2v, no prefix": kohya(""),
    "ai-toolkit, diffusion-pipe": peft_like("diffusion_model."),
    "musubi": musubi("lora_unet_"),
    "Wan-Fun": musubi("lora_unet__"),
    "DiffSynth": peft_like("", ".default"),
    "PEFT": diffusers_own("base_model.model."),
    "diffusers": diffusers_own("transformer."),
}

READ = ("lightx2v", "ai-toolkit, diffusion-pipe", "musubi", "diffusers")
"""Those that diffusers reads, of whole LoRAs."""

WITH_ALPHA = ("lightx2v", "lightx2v, no prefix", "musubi", "Wan-Fun")


def write(truth: Truth, how: str, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.contiguous() for name, one in FORMATS[how](truth).items()}, file)
    return file


def rewritten(truth: Truth) -> State:
    """In PEFT's keys, as diffusers reads them: alpha folded in as `get_alpha_scales` does it for every other file."""
    made: State = {}
    for module, (a, b) in truth.factors.items():
        if truth.alpha is not None:
            down, up = truth.alpha / a.shape[0], 1.0
            while down * 2 < up:
                down, up = down * 2, up / 2
            a, b = a * down, b * up
        made |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    return made | {f"transformer.{module}.lora_B.bias": one for module, one in (truth.biases or {}).items()}


@dataclass(frozen=True)
class Loaded:
    """For diffusers: a file or a state dict, for which transformer, at which scale."""

    what: Any
    component: str = "transformer"
    scale: float = 1.0


def pipeline_with(folder: Path, dtype: str, loras: Sequence[Loaded], fuse: bool = True, image: bool = False) -> Any:
    """diffusers' own, with LoRAs that are fused or beside the weights."""
    cls = WanImageToVideoPipeline if image else WanPipeline
    pipe = cls.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    names: dict[str, list[tuple[str, float]]] = {}
    for number, lora in enumerate(loras):
        second = {"load_into_transformer_2": True} if lora.component == "transformer_2" else {}
        given = dict(lora.what) if isinstance(lora.what, dict) else str(lora.what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's word on a second adapter
            pipe.load_lora_weights(given, adapter_name=f"own{number}", **second)
        names.setdefault(lora.component, []).append((f"own{number}", lora.scale))
    for component, own in names.items():
        model = getattr(pipe, component)
        model.set_adapters([name for name, _ in own], [scale for _, scale in own])
        if fuse:
            model.fuse_lora(1.0, adapter_names=[name for name, _ in own])
            model.unload_lora()
    return pipe


def state(model: Any) -> State:
    return {re.sub(r"\.base_layer\b", "", name): one for name, one in model.state_dict().items() if "lora_" not in name}


def with_config(folder: Path, **config: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
