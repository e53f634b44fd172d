"""The Wan 2.1 and 2.2 models as data: shapes from a checkpoint's config files, default requests, rules (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from cineline.core.config import Cut, DeviceConfig, Dtype, ParallelConfig
from cineline.core.hardware import Device, Link
from cineline.core.request import RANDOM, Job, VideoRequest
from cineline.core.work import ITEMSIZE
from cineline.errors import CheckpointError, InvalidConfig, InvalidRequest, shown
from cineline.families.configs import read_json
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.costs.line import PlannedLine
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.job import WanJob
from cineline.families.wan.rules import Rules
from cineline.families.wan.schedules import SOLVERS as SOLVERS
from cineline.families.wan.shapes import WanKind, WanShapes
from cineline.families.wan.vocabulary import check_tokenizer
from cineline.planning.cut import default_cut

Defaults = Mapping[str, float]

WAN_DEFAULTS: Mapping[WanKind, Defaults] = {
    "ti2v": {
        "height": 704,
        "width": 1280,
        "num_frames": 121,
        "fps": 24,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    },
    "t2v": {
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    },
    "i2v": {
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 3.5,
        "guidance_scale_2": 3.5,
    },
}
"""Official default requests of Wan 2.2 (github.com/Wan-Video/Wan2.2, wan/configs)."""

_WAN_21: Defaults = {"height": 720, "width": 1280, "num_frames": 81, "fps": 16, "guidance_scale": 5.0}

WAN_21_DEFAULTS: Mapping[WanKind, Defaults] = {
    "t2v": {**_WAN_21, "num_inference_steps": 50},
    "i2v": {**_WAN_21, "num_inference_steps": 40},
}
"""The same of Wan 2.1 (github.com/Wan-Video/Wan2.1, generate.py)."""

BETWEEN_STEPS = 50
"""Of its model for videos between two pictures, in the same place."""

SMALL: Defaults = {"height": 480, "width": 832}
"""Of its 1.3B model, which was trained for that size, and of checkpoints that say so in a `cineline.json`."""

SMALL_HEADS = 12
"""Attention heads of that model."""

DEFAULTS_FILE = "cineline.json"

TRANSFORMER_DEFAULTS: Mapping[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-06,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
"""What diffusers' `WanTransformer3DModel` takes where a config leaves a key out; null it takes as it is."""

NULLABLE = ("out_channels", "cross_attn_norm", "qk_norm", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
"""Keys whose null means something there. Of null for another one it builds no model, or none that runs; `ffn_dim` alone
it takes for 4 times the width then, which no Wan 2.2 has."""

CLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
"""What transformers' `CLIPVisionConfig` takes where a config leaves a key out."""

NO_DEFAULTS = ("prompt", "image", "decode", "preset", "loras", "last_image", "num_videos", "fit", "preview", "cache")
"""Request fields that a checkpoint cannot have defaults for; what loses quality is asked for by name."""


@dataclass(frozen=True)
class WanSpec(WanShapes):
    """A Wan 2.1 or 2.2 checkpoint in diffusers format: what `FamilySpec` and `PlannedFamily` ask for."""

    stages_class: ClassVar[str] = "cineline.families.wan.stages:WanStages"

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> WanSpec:
        """Read the configs of a folder in diffusers format; no weights.

        Raises:
            CheckpointError: the folder is no Wan 2.1 or 2.2 checkpoint.
        """
        try:
            return replace(cls._open(folder), variant=variant)
        except KeyError as error:
            raise CheckpointError(
                f"{shown(folder)}: a config file lacks {error}: download the checkpoint again."
            ) from None

    @classmethod
    def _open(cls, folder: Path) -> WanSpec:
        index = read_json(folder / "model_index.json", "a folder in diffusers format has it at its top")
        experts = tuple(name for name in ("transformer", "transformer_2") if _class_of(index, name))
        if not experts or experts[0] != "transformer":
            raise CheckpointError(
                f"{shown(folder / 'model_index.json')} names no 'transformer': use a whole checkpoint."
            )
        configs = [_filled(folder / name / "config.json") for name in experts]
        vae = read_json(folder / "vae" / "config.json", "each component has one")
        text = read_json(folder / "text_encoder" / "config.json", "each component has one")
        kind = cls._kind(folder, index, configs[0], vae)
        check_alike([folder] * len(configs), configs)
        boundary = index.get("boundary_ratio")
        if boundary is not None and len(experts) == 1:
            raise CheckpointError(
                f"{shown(folder / 'model_index.json')} has boundary_ratio={shown(boundary)} but no 'transformer_2': "
                "add the second expert or remove the boundary."
            )
        check_tokenizer(folder, text)
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "each component has one")
        _check_solver(folder, _class_of(index, "scheduler"), scheduler)
        spec = cls(
            folder=folder,
            kind=kind,
            transformer=configs[0],
            experts=experts,
            text=text,
            vae=vae,
            scheduler=scheduler,
            scheduler_class=str(_class_of(index, "scheduler")),
            boundary_ratio=boundary,
            defaults=_defaults(default_request(kind, configs[0], len(experts)), _own_defaults(folder)),
            image=_image_encoder(folder, index, configs[0]),
        )
        if not (spec.layers > 0 and min(spec.grid) > 0):
            raise CheckpointError(
                f"{shown(folder)}: {shown(spec.layers)} blocks on a grid of {shown(spec.grid)} is no model: download "
                "the checkpoint again."
            )
        return spec

    @staticmethod
    def _kind(
        folder: Path, index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> WanKind:
        if index.get("expand_timesteps"):
            return "ti2v"
        channels, latent_channels = transformer["in_channels"], vae["z_dim"]
        if channels == latent_channels:
            return "t2v"
        if channels == 2 * latent_channels + vae.get("scale_factor_temporal", 4):
            return "i2v"
        raise CheckpointError(
            f"{shown(folder)}: a transformer with {shown(channels)} input channels does not fit a VAE with "
            f"{shown(latent_channels)}: use the components of one checkpoint."
        )

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """See `FamilySpec.place`."""
        if parallel.expert_placement == "split" and len(self.experts) < 2:
            raise InvalidConfig(
                f"expert_placement='split' needs a model with two experts, {shown(self.folder)} has one."
            )
        heads = int(self.transformer["num_attention_heads"])
        shares = parallel.tp * parallel.ulysses
        if heads % shares:
            raise InvalidConfig(
                f"tp={parallel.tp} x ulysses={parallel.ulysses} does not divide the model's {heads} attention heads: "
                f"use a product among {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}."
            )
        width = int(self.transformer["ffn_dim"])
        if width % parallel.tp:
            raise InvalidConfig(f"tp={parallel.tp} does not divide the model's feed-forward width {width}: use less.")
        return parallel.placed(self.layers, self.high_share)

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        """See `FamilySpec.cut`."""
        costs = self.costs(config.dtype, config.vae_dtype)
        filled = default_cut(costs, parallel)
        return filled.cut(self.layers, costs.text_layers, len(costs.decoder_bytes))

    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> ModelCosts:
        """See `PlannedFamily.costs`."""
        return ModelCosts.of(self, dtype, vae_dtype)

    def prompt_bytes(self, dtype: Dtype) -> int:
        """See `PromptedFamily`."""
        return TEXT_TOKENS * int(self.text["d_model"]) * ITEMSIZE[dtype]

    def line(
        self,
        parallel: ParallelConfig,
        devices: Sequence[Device],
        link: Link,
        job: Job,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
    ) -> PlannedLine:
        """See `PlannedFamily.line`."""
        return PlannedLine(self, self.costs(dtype, vae_dtype), parallel, tuple(devices), link, job)

    def example(self, fields: Mapping[str, Any]) -> VideoRequest:
        """See `PlannedFamily.example`: an image of one pixel, the video's size being given."""
        if self.kind != "i2v":
            return VideoRequest(prompt="an example", **fields)
        sizes = {name: int(self.defaults[name]) for name in ("height", "width")}
        image = Image.new("RGB", (1, 1))
        last = image if self.pictures == 2 else None
        return VideoRequest(prompt="an example", image=image, last_image=last, **{**sizes, **fields})

    def resolve(self, request: VideoRequest, number: int) -> WanJob:
        """See `FamilySpec.resolve`."""
        return Rules(self).resolve(request, number)


def check_alike(paths: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse experts that differ.

    Args:
        paths: where each config is from.

    Raises:
        CheckpointError: they differ; the first key is named.
    """
    for name, value in configs[0].items():
        for path, other in zip(paths[1:], configs[1:], strict=True):
            if other[name] != value:
                where = shown(path) if path == paths[0] else f"{shown(paths[0])} and {shown(path)}"
                raise CheckpointError(
                    f"The experts of {where} differ in {shown(name)}, {shown(value)} and {shown(other[name])}: "
                    "Wan 2.2's are alike, use those of one checkpoint."
                )


def _filled(file: Path) -> dict[str, Any]:
    """A transformer's config as diffusers takes it: with defaults for what is left out, and no other keys.

    What diffusers only asks for truth is alike here where it is alike there, so that experts can be compared.

    Raises:
        CheckpointError: it says null where a value is needed.
    """
    config = read_json(file, "each component has one")
    filled = {name: config.get(name, default) for name, default in TRANSFORMER_DEFAULTS.items()}
    for name, value in filled.items():
        if value is None and name not in NULLABLE:
            raise CheckpointError(
                f"{shown(file)}: {shown(name)} is null, and Wan's transformers have a value there: give it, "
                "leave the key out for diffusers' default, or download the checkpoint again."
            )
    filled["out_channels"] = filled["out_channels"] or filled["in_channels"]
    return filled | {"cross_attn_norm": bool(filled["cross_attn_norm"])}


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """A component's class in a model index, None where there is none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _check_solver(folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
    if name not in SOLVERS:
        raise CheckpointError(
            f"{shown(folder)}: scheduler {shown(name)} is not supported: use one of {', '.join(SOLVERS)}."
        )
    if config.get("use_dynamic_shifting"):
        raise CheckpointError(
            f"{shown(folder)}: the scheduler's config has use_dynamic_shifting, whose shift diffusers' Wan pipelines "
            "do not say: set it to false there."
        )
    prediction = config.get("prediction_type")
    if not name.startswith("FlowMatch") and prediction != "flow_prediction":  # left out it is noise, for other models
        raise CheckpointError(
            f"{shown(folder)}: the scheduler's prediction_type is {shown(prediction)}, and Wan's transformers predict "
            "a flow: set 'flow_prediction', or download the checkpoint again."
        )


def default_request(kind: WanKind, transformer: Mapping[str, Any], experts: int) -> Defaults:
    """The official one of a model of that kind: with one expert that takes text, or text and image, it is Wan 2.1's."""
    if kind == "ti2v" or experts > 1:
        return WAN_DEFAULTS[kind]
    small = kind == "t2v" and int(transformer["num_attention_heads"]) <= SMALL_HEADS
    between = {"num_inference_steps": BETWEEN_STEPS} if transformer.get("pos_embed_seq_len") else {}
    return {**WAN_21_DEFAULTS[kind], **(SMALL if small else {}), **between}


def _image_encoder(folder: Path, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of the CLIP encoder that a transformer asks for.

    Raises:
        CheckpointError: it is not there, or not of this transformer.
    """
    if transformer["image_dim"] is None:
        return None
    if _class_of(index, "image_encoder") is None:
        raise CheckpointError(
            f"{shown(folder / 'model_index.json')} names no 'image_encoder', and the transformer's image_dim="
            f"{shown(transformer['image_dim'])} needs one (Wan 2.1): use a whole checkpoint."
        )
    config = read_json(folder / "image_encoder" / "config.json", "each component has one")
    read_json(folder / "image_processor" / "preprocessor_config.json", "each component has one")
    config = {**CLIP_DEFAULTS, **config}
    rows = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
    seen = transformer["pos_embed_seq_len"] or rows
    if config["hidden_size"] != transformer["image_dim"] or seen not in (rows, 2 * rows):
        raise CheckpointError(
            f"{shown(folder)}: the image encoder makes {rows} rows of width {shown(config['hidden_size'])}, and the "
            f"transformer takes {shown(seen)} of width {shown(transformer['image_dim'])}: use the components of one "
            "checkpoint."
        )
    return config


def _defaults(official: Defaults, own: Mapping[str, Any]) -> dict[str, Any]:
    """The kind's, with a checkpoint's own before them; a first guidance scale alone means both there, too."""
    defaults = {**official, **own}
    if "guidance_scale" in own and "guidance_scale_2" not in own:
        defaults.pop("guidance_scale_2", None)
    return defaults


def _own_defaults(folder: Path) -> dict[str, Any]:
    path = folder / DEFAULTS_FILE
    if not path.exists():
        return {}
    own = read_json(path, "it holds default request fields")
    try:
        checked = VideoRequest(**{"prompt": "checked"} | own)
    except InvalidRequest as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None
    useless = [name for name in own if name in NO_DEFAULTS or own[name] in (None, RANDOM)]
    if useless:
        raise CheckpointError(
            f"{shown(path)}: {shown(useless[0])} cannot have the default {shown(own[useless[0]])}: remove it."
        )
    for name, other in (("boundary_ratio", "switch_step"), ("sigmas", "num_inference_steps")):
        both = name in own and other in own
        if both and (name != "sigmas" or len(own["sigmas"]) != own["num_inference_steps"]):
            raise CheckpointError(
                f"{shown(path)}: {shown({name: own[name], other: own[other]})} do not go together: remove one."
            )
    return checked.model_dump(include=set(own))
