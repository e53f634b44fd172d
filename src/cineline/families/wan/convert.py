"""A model, wherever its weights are, to a folder in diffusers format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from cineline.core.config import Dtype
from cineline.core.output import check_folder, unwritable
from cineline.errors import OutputError, shown
from cineline.families.wan.shapes import Component
from cineline.families.wan.spec import DEFAULTS_FILE, WanSpec
from cineline.families.wan.text import config_of, unpacked
from cineline.families.wan.weights import weights_of
from cineline.weights.files import Weights
from cineline.weights.sharded import write_sharded

SHARD_BYTES = 2 * 10**9
"""Of a file, and so of the tensors that are in memory at once."""

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PLAIN |= {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN.values()}
"""How tensors are stored that stay as they are."""

CLASSES = {"vae": "AutoencoderKLWan", "transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"}

IMAGES = {"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}
"""Wan 2.1's, which are copied as they are."""


def convert(
    spec: WanSpec,
    to: Path,
    dtype: Dtype = "bfloat16",
    tell: Callable[[str], None] = lambda line: None,
    limit: int = SHARD_BYTES,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        to: the folder, which must not be there.
        dtype: of weights that are scaled or in blocks of few bits; others stay as they are. As in `from_pretrained`,
            what diffusers keeps in float32 is made in that.
        tell: is told of each component.
        limit: bytes of a file.

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen. OutputError: the folder cannot be written.
    """
    check_folder(to.parent)
    if to.exists():
        raise OutputError(f"{shown(to)} is there already: give a folder that is not.")
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        _write_configs(spec, temporary)
        for name in (*spec.experts, "vae", "text_encoder"):
            tell(f"{name} from {spec.component(name).path}")
            _write_weights(spec.component(name), temporary / name, getattr(torch, dtype), limit)
        temporary.rename(to)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(unwritable(to, error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_configs(spec: WanSpec, to: Path) -> None:
    """All that is no weights."""
    configs = {name: {"_class_name": CLASSES[name], **spec.component(name).config} for name in (*spec.experts, "vae")}
    for name, config in configs.items():
        _write_json(to / name / "config.json", config)
    config_of(spec.component("text_encoder")).save_pretrained(to / "text_encoder")
    scheduler = {"_class_name": spec.scheduler_class, **spec.scheduler}
    _write_json(to / "scheduler" / "scheduler_config.json", scheduler)
    with unpacked(spec.tokenizer_home) as tokenizer:
        shutil.copytree(tokenizer, to / "tokenizer")
    for name in IMAGES if spec.image else ():
        shutil.copytree(spec.folder / name, to / name)
    _write_json(to / "model_index.json", _index(spec))
    if (spec.folder / DEFAULTS_FILE).is_file():
        shutil.copy(spec.folder / DEFAULTS_FILE, to)


def _index(spec: WanSpec) -> dict[str, Any]:
    """As diffusers writes it."""
    experts = {name: ["diffusers", CLASSES[name]] for name in spec.experts}
    images = {name: ["transformers", kind] if spec.image else [None, None] for name, kind in IMAGES.items()}
    return {
        "_class_name": "WanImageToVideoPipeline" if spec.kind == "i2v" else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": spec.boundary_ratio,
        "expand_timesteps": spec.kind == "ti2v",
        "scheduler": ["diffusers", spec.scheduler_class],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer_2": [None, None],
        "vae": ["diffusers", CLASSES["vae"]],
        **experts,
        **(images if spec.kind == "i2v" else {}),
    }


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(value), indent=2) + "\n")


def _write_weights(component: Component, folder: Path, dtype: torch.dtype, limit: int) -> None:
    weights = weights_of(component)
    module, tied = _module(component), "encoder.embed_tokens.weight"
    shapes = {name: tuple(one.shape) for name, one in module.state_dict().items() if name != tied}
    weights.check_names((_stored(weights, name) for name in shapes), ignored=["shared", "embed_tokens"])
    # transformers heeds its own list for float16 alone.
    keep = set() if component.name == "text_encoder" else set(getattr(module, "_keep_in_fp32_modules", None) or ())
    dtypes = {}
    for name in shapes:
        made = torch.float32 if keep.intersection(name.split(".")) else dtype
        dtypes[name] = (
            made
            if weights.is_scaled(_stored(weights, name))
            else PLAIN.get(weights.stored(_stored(weights, name)).dtype, made)
        )

    def make(name: str) -> Tensor:
        return weights.read(_stored(weights, name), shapes[name], dtypes[name], torch.device("cpu"))

    sizes = {name: torch.empty(shape, dtype=dtypes[name], device="meta").nbytes for name, shape in shapes.items()}
    stem = "model" if component.name == "text_encoder" else "diffusion_pytorch_model"
    write_sharded(folder, stem, sizes, make, limit)


def _stored(weights: Weights, name: str) -> str:
    """The tokens' embedding has two names, of which one may be stored."""
    return "encoder.embed_tokens.weight" if name == "shared.weight" and name not in weights else name


def _module(component: Component) -> nn.Module:
    """diffusers' or transformers' own, on the meta device."""
    with torch.device("meta"):
        if component.name == "text_encoder":
            return cast(nn.Module, UMT5EncoderModel(config_of(component)))
        kind: Any = AutoencoderKLWan if component.name == "vae" else WanTransformer3DModel
        return cast(nn.Module, kind.from_config(dict(component.config)))
