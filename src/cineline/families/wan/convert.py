"""A model, wherever its weights are, to a folder in diffusers format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from cineline.core.config import Dtype
from cineline.core.output import check_folder, unwritable
from cineline.errors import OutputError, shown
from cineline.families.wan.ratios import RATIOS_FILE
from cineline.families.wan.shapes import Component
from cineline.families.wan.spec import DEFAULTS_FILE, WanSpec
from cineline.families.wan.spiece import TOKENIZER_CLASS
from cineline.families.wan.tensors import EMBEDDING, TIED
from cineline.families.wan.text import config_of, unpacked
from cineline.families.wan.weights import weights_of
from cineline.weights.files import Weights
from cineline.weights.sharded import Planned, write_sharded

SHARD_BYTES = 2 * 10**9
"""Of a file."""

PIECE_BYTES = 2**26
"""Of the numbers that are in memory at once, in float32; reading and dequantising holds a few such pieces."""

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
    parts = [Part.of(spec.component(name), getattr(torch, dtype)) for name in (*spec.experts, "vae", "text_encoder")]
    try:
        with TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary) / "model"  # with the permissions that folders have
            made.mkdir()
            _write_configs(spec, made)
            for part in parts:
                tell(f"{part.component.name} from {part.component.path}")
                part.write(made / part.component.name, limit)
            made.rename(to)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(unwritable(to, error)) from None


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
    for name in (DEFAULTS_FILE, RATIOS_FILE):
        if (spec.folder / name).is_file():
            shutil.copy(spec.folder / name, to)


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
        "tokenizer": ["transformers", TOKENIZER_CLASS if spec.tokenizer_home.is_file() else "T5TokenizerFast"],
        "transformer_2": [None, None],
        "vae": ["diffusers", CLASSES["vae"]],
        **experts,
        **(images if spec.kind == "i2v" else {}),
    }


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(value), indent=2) + "\n")


@dataclass(frozen=True)
class Part:
    """A component's weights, all of them there.

    Attributes:
        shapes, dtypes: of its tensors, as they will be written.
    """

    component: Component
    weights: Weights
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, component: Component, dtype: torch.dtype) -> Part:
        """Look into its files.

        Raises:
            CheckpointError: a tensor is missing, extra or misshapen.
        """
        weights, module = weights_of(component), module_of(component)
        shapes = {name: tuple(one.shape) for name, one in module.state_dict().items() if name != TIED}
        weights.check_names((_stored(weights, name) for name in shapes), ignored=["shared", "embed_tokens"])
        # transformers heeds its own list for float16 alone.
        keep = set() if component.name == "text_encoder" else set(getattr(module, "_keep_in_fp32_modules", None) or ())
        dtypes = {}
        for name, shape in shapes.items():
            stored = _stored(weights, name)
            weights.check_shape(stored, shape)
            made = torch.float32 if keep.intersection(name.split(".")) else dtype
            dtypes[name] = made if weights.is_scaled(stored) else PLAIN.get(weights.stored(stored).dtype, made)
        return cls(component, weights, shapes, dtypes)

    def write(self, folder: Path, limit: int) -> None:
        """As diffusers writes it.

        Raises:
            CheckpointError: a tensor cannot be read. OutputError: a file cannot be written.
        """
        planned = {name: Planned(shape, self.dtypes[name]) for name, shape in self.shapes.items()}
        stem = "model" if self.component.name == "text_encoder" else "diffusion_pytorch_model"
        write_sharded(folder, stem, planned, self._pieces, limit)

    def _pieces(self, name: str) -> Iterator[Tensor]:
        return self.weights.pieces(_stored(self.weights, name), self.shapes[name], self.dtypes[name], PIECE_BYTES)


def _stored(weights: Weights, name: str) -> str:
    """The tokens' embedding has two names, of which one may be stored."""
    return TIED if name == EMBEDDING and name not in weights else name


def module_of(component: Component) -> nn.Module:
    """diffusers' or transformers' own, on the meta device."""
    with torch.device("meta"):
        if component.name == "text_encoder":
            return cast(nn.Module, UMT5EncoderModel(config_of(component)))
        kind: Any = AutoencoderKLWan if component.name == "vae" else WanTransformer3DModel
        return cast(nn.Module, kind.from_config(dict(component.config)))
