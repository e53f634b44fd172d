"""Wan models of any size with random weights that are made on the device: there is no checkpoint to download."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan import experts, text, vae
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.known import KNOWN
from cineline.families.wan.shapes import Component
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.weights.files import Shard, Weights
from cineline.weights.lora import Adapter

MODELS = {"ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}

SMALL = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "text_dim": 32}
SMALL_TEXT = {"num_layers": 4, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 300}
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}
"""For a rehearsal on the CPU: the same layers, narrow."""


@dataclass(frozen=True)
class RandomSpec(WanSpec):
    """A `WanSpec` of which there is no file."""

    stages_class: ClassVar[str] = "benchmarks.gpu.random_wan:RandomStages"


class RandomWeights(Weights):
    """`Weights` of a component without any: the same name gives the same values everywhere."""

    def __init__(self, component: Component, loras: Sequence[Adapter] = ()) -> None:
        self._salt = component.name
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return True

    def check_names(self, expected: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """There is nothing to compare with."""

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard | None = None,
    ) -> Tensor:
        """The values of that name, made on the device."""
        assert shard is None, "one device has whole tensors"
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self._salt}/{name}".encode()))
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        self.bytes_read += values.nbytes
        if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
            return values.mul_(0.1).add_(1)
        inputs = max(1, values[0].numel()) if values.ndim > 1 else 400
        return values.mul_(inputs**-0.5)


class RandomTokenizer:
    """Any tokens, by the prompt."""

    def __init__(self, home: Path, text: Mapping[str, Any]) -> None:
        self._words = int(text["vocab_size"])

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randint(self._words, (1, TEXT_TOKENS), generator=generator), torch.ones(
            1, TEXT_TOKENS, dtype=torch.int64
        )


class RandomStages(WanStages):
    """`WanStages`, for a process that runs nothing else: no file is read."""

    def load(self, part: StagePart) -> int:
        for module in (experts, vae, text):
            vars(module)["weights_of"] = RandomWeights
        vars(text)["Tokenizer"] = RandomTokenizer
        return super().load(part)


def random_spec(model: str, folder: Path, small: bool) -> RandomSpec:
    """One expert of a known model; `folder` names it."""
    spec = KNOWN[MODELS[model]]
    spec = replace(
        spec,
        experts=("transformer",),
        boundary_ratio=None,
        defaults={name: value for name, value in spec.defaults.items() if name != "guidance_scale_2"},
    )
    if small:
        wide = {"decoder_base_dim": 8} if "decoder_base_dim" in spec.vae else {}
        spec = replace(
            spec,
            transformer={**spec.transformer, **SMALL},
            text={**spec.text, **SMALL_TEXT},
            vae={**spec.vae, **SMALL_VAE, **wide},
        )
    return RandomSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)} | {"folder": folder})
