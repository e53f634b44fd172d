"""A model from files that the user names, beside a folder for what is missing or alone (no torch)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cineline.core.config import ModelFiles
from cineline.errors import CheckpointError, shown
from cineline.families.wan.known import KNOWN
from cineline.families.wan.recognise import (
    CALLED,
    KINDS,
    SPIECE,
    Found,
    look_into,
    text_config,
    transformer_config,
    vae_config,
)
from cineline.families.wan.shapes import OPTIONS, WanKind
from cineline.families.wan.spec import WanSpec, check_alike
from cineline.families.wan.tensors import check_tensors

log = logging.getLogger(__name__)

HEAD_SIZE = 128
"""Of all Wan 2.2 transformers."""

TOKENIZERS = ("google/umt5-xxl", "tokenizer")
"""Where a tokenizer may be beside a text encoder's file: as in Wan's own repositories, or in diffusers' folders."""

NOISE = {level: re.compile(rf"(?<![a-z]){level}(?![a-z])|{level}[-_ ]?noise") for level in ("high", "low")}
"""In the name of a file, or of its folder, in small letters."""


def assembled(files: ModelFiles, base: WanSpec | None) -> WanSpec:
    """The spec of a model whose components are in these files, and where `base` is given the others where it has them.

    Raises:
        CheckpointError: a file is broken, none of such a component, or of another model; a component is nowhere.
    """
    found = {name: _checked(name, look_into(path)) for name, path in files.given.items()}
    spec = _known(files, found) if base is None else base
    paths = {**spec.files, **files.given}
    _check_experts(spec, paths, found)
    transformers = _transformers(spec, found, base is not None)
    vae = {**spec.vae, **_vae(spec, found["vae"])} if "vae" in found else spec.vae
    text = {**spec.text, **text_config(found["text_encoder"])} if "text_encoder" in found else spec.text
    made = replace(
        spec,
        folder=paths["transformer"] if base is None or base.folder in base.files.values() else base.folder,
        transformer=transformers,
        vae=vae,
        text=text,
        files=paths,
        tokenizer=_tokenizer(base, found.get("text_encoder")),
    )
    if int(made.transformer["text_dim"]) != int(made.text["d_model"]):
        raise CheckpointError(
            f"{shown(made.folder)}: the transformer takes text of width {shown(made.transformer['text_dim'])}, and the "
            f"text encoder makes {shown(made.text['d_model'])}: use those of one model."
        )
    for name, one in found.items():
        check_tensors(one, made.component(name).config)
    return made


def _checked(name: str, found: Found) -> Found:
    """Refuse a file that is given as what it is not."""
    if not name.startswith(found.component):
        right = OPTIONS[found.component]
        raise CheckpointError(
            f"{OPTIONS[name]} {shown(found.source.path)} holds {CALLED[found.component]}: give it as {right}."
        )
    return found


def _known(files: ModelFiles, found: Mapping[str, Found]) -> WanSpec:
    """The model that ships as a table, by the transformer's channels, all of whose components must be given."""
    if "transformer" not in found:
        first = next(iter(found))
        raise CheckpointError(
            f"{OPTIONS[first]} {shown(files.given[first])} is given alone: give the model's other files, --transformer "
            "first, or its folder or hub id with --model."
        )
    if found["transformer"].sees:
        raise CheckpointError(
            f"--transformer {shown(files.given['transformer'])} is of an image-to-video model of Wan 2.1, whose image "
            f"encoder is in no file of these: give the folder or hub id of such a model with --model, such as "
            f"{shown('Wan-AI/Wan2.1-I2V-14B-480P-Diffusers')}."
        )
    kind = kind_of(found["transformer"])
    spec = next(spec for spec in KNOWN.values() if spec.kind == kind)
    for name in (*spec.experts, "vae", "text_encoder"):
        if name == "transformer_2" and name not in found:
            raise CheckpointError(
                f"--transformer {shown(files.given['transformer'])} is one of the two experts of "
                f"{shown(spec.folder.name)}: give the high-noise one as --transformer and the low-noise one as "
                "--transformer-2."
            )
        if name not in found:
            raise CheckpointError(
                f"The files given have no {name.replace('_', ' ')}: give it with {OPTIONS[name]}, or the folder or hub "
                f"id of such a model with --model, such as {shown(spec.folder)}."
            )
    return spec


def kind_of(found: Found) -> WanKind:
    """Which of Wan 2.2's models a transformer is of.

    Raises:
        CheckpointError: none.
    """
    if found.channels not in KINDS:
        known = ", ".join(f"{into} and {out} ({kind})" for (into, out), kind in KINDS.items())
        raise CheckpointError(
            f"{shown(found.source.path)} has {found.channels[0]} channels in and {found.channels[1]} out, and Wan "
            f"2.2's models have {known}: use one of these."
        )
    return KINDS[found.channels]


def _check_experts(spec: WanSpec, paths: Mapping[str, Path], found: Mapping[str, Found]) -> None:
    if "transformer_2" in found and len(spec.experts) == 1:
        raise CheckpointError(
            f"--transformer-2 {shown(paths['transformer_2'])} is for a model with two experts, and "
            f"{shown(spec.folder)} has one: leave it out."
        )
    experts = [name for name in spec.experts if name in paths]
    if len({paths[name].resolve() for name in experts}) < len(experts):
        raise CheckpointError(
            f"--transformer and --transformer-2 are both {shown(paths['transformer'])}: give the high-noise "
            "expert as the first and the low-noise one as the second."
        )
    for name in [name for name in experts if name in found] if len(spec.experts) > 1 else ():
        path = paths[name]
        level, other = ("high", "low") if name == "transformer" else ("low", "high")
        if _says(path, other) and not _says(path, level):
            log.warning(
                "%s is to be the %s-noise expert, and %s looks like the %s-noise one: nothing in it tells them apart.",
                OPTIONS[name],
                level,
                shown(path),
                other,
            )


def _says(path: Path, level: str) -> bool:
    """Whether its name says which expert it is, or where that says nothing its folder's."""
    for text in (path.name.lower(), path.resolve().parent.name.lower()):
        if any(noise.search(text) for noise in NOISE.values()):
            return NOISE[level].search(text) is not None
    return False


def _transformers(spec: WanSpec, found: Mapping[str, Found], beside: bool) -> Mapping[str, Any]:
    """The experts' common config."""
    configs, paths = [], []
    for name in spec.experts:
        if name not in found:
            configs.append(dict(spec.transformer))
            paths.append(spec.folder)
            continue
        one = found[name]
        asked = (int(spec.transformer["in_channels"]), int(spec.transformer["out_channels"]))
        if one.channels != asked:
            raise CheckpointError(
                f"{OPTIONS[name]} {shown(one.source.path)} has {one.channels[0]} channels in and {one.channels[1]} "
                f"out, and {shown(spec.folder)} has {asked[0]} and {asked[1]}: give files of one model."
            )
        if one.sees != (spec.image is not None):
            which = "an" if one.sees else "no"
            raise CheckpointError(
                f"{OPTIONS[name]} {shown(one.source.path)} is of a model with {which} image encoder (Wan 2.1), unlike "
                f"{shown(spec.folder)}: give files of one model."
            )
        size = int(spec.transformer["attention_head_dim"]) if beside else _head_size(one)
        configs.append({**spec.transformer, **transformer_config(one, size)})
        paths.append(one.source.path)
    check_alike(paths, configs)
    return configs[0]


def _head_size(found: Found) -> int:
    """As a config beside the weights says, in diffusers' words or the original ones, else that of all real models.

    Files of several models may lie in one folder: a config is this transformer's where it says its tensors' sizes.
    """
    path, own = found.source.path, transformer_config(found, 1)
    sizes = [own[name] for name in ("num_attention_heads", "num_layers", "ffn_dim", "in_channels")]
    try:
        told = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_text(encoding="utf-8-sig"))
        if "attention_head_dim" in told:
            size, channels = told["attention_head_dim"], told["in_channels"]
            width = size * told["num_attention_heads"]
        else:
            width, channels = told["dim"], told["in_dim"]
            size = width // told["num_heads"]
        is_own = [width, told["num_layers"], told["ffn_dim"], channels] == sizes
        return int(size) if is_own and size > 0 and width % size == 0 else HEAD_SIZE
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return HEAD_SIZE


def _vae(spec: WanSpec, found: Found) -> dict[str, Any]:
    """A VAE's config, which must be of the model's sort and have as many channels, whose statistics are not stored."""
    config = vae_config(found)
    names = {True: "Wan 2.2's VAE", False: "Wan 2.1's VAE"}
    asked = bool(spec.vae.get("is_residual")), int(spec.vae["z_dim"])
    if (config["is_residual"], config["z_dim"]) != asked:
        raise CheckpointError(
            f"--vae {shown(found.source.path)} is {names[config['is_residual']]} with {config['z_dim']} channels, and "
            f"{shown(spec.folder)} needs {names[asked[0]]} with {asked[1]}: give that one."
        )
    return config


def _tokenizer(base: WanSpec | None, found: Found | None) -> Path | None:
    """Where the tokenizer is: in the model's folder (None), beside the text encoder's file, in it, or where it was."""
    if base is not None and (found is None or (base.folder / "tokenizer").exists()):
        return base.tokenizer
    if found is None:
        return None
    path = found.source.path
    for name in TOKENIZERS:
        if (path.parent / name).is_dir():
            return path.parent / name
    if SPIECE in found.source.stored:
        return path
    if base is not None and base.tokenizer is not None:
        return base.tokenizer
    raise CheckpointError(
        f"--text-encoder-file {shown(path)} has no tokenizer: use ComfyUI's file, which has one, put the tokenizer "
        f"into a folder {shown(TOKENIZERS[0])} beside it, or give a model's folder or hub id with --model."
    )
