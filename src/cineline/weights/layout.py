"""Which files hold a component's weights, by diffusers' and transformers' names (no torch)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from cineline.errors import CheckpointError, reason, shown

STEMS = ("diffusion_pytorch_model", "model")
"""Names that diffusers and transformers give their files."""

SUFFIX, INDEX = ".safetensors", ".safetensors.index"
SHARD = re.compile(r"-\d+-of-\d+\b")


def files_of(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: those of the variant where it has that, else the plain ones, else the only
    variant that there is.

    Raises:
        CheckpointError: there are none, or several variants to choose from.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        names = set()
    chosen = folder / choose(names, folder, variant)
    return shards_of(chosen) if chosen.suffix == ".json" else [chosen]


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, which need not be there.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shown(index)} cannot be read ({reason(error)}): download it again.") from None
    return [index.parent / name for name in sorted(set(names))]


def choose(names: Collection[str], folder: Path, variant: str | None = None) -> str:
    """Of the names in a component's folder that of the file with its weights, or of their index.

    Raises:
        CheckpointError: as `files_of`.
    """
    if (named := named_choice(names, variant)) is not None:
        return named
    others = sorted(name for name in names if INDEX in name or (name.endswith(SUFFIX) and not SHARD.search(name)))
    if len(others) == 1 and not variant:
        return others[0]
    if others:
        raise CheckpointError(
            f"{shown(folder)} has {len(others)} sets of weights ({shown(others)}), none of which is meant by "
            f"variant={shown(variant)}: choose one, such as --variant {shown(variant_of(others[0]) or 'fp16')}."
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise CheckpointError(
            f"{shown(folder)} has its weights in PyTorch's .bin files, which may run any code when they are loaded: "
            "use safetensors (diffusers' save_pretrained writes them)."
        )
    shards = sum(name.endswith(SUFFIX) for name in names)
    raise CheckpointError(
        f"{shown(folder)} has {shards} safetensors files and no index: it must hold one file, or several and their "
        "index."
    )


def named_choice(names: Collection[str], variant: str | None = None) -> str | None:
    """The same, where the variant or the plain weights are there."""
    for wanted in (variant, None) if variant else (None,):
        for stem in STEMS:
            for name in (_index(stem, wanted), _file(stem, wanted)):
                if name in names:
                    return name
    return None


def has_variant(names: Collection[str], variant: str) -> bool:
    """Whether a component's folder has files of that variant."""
    return any(name in names for stem in STEMS for name in (_index(stem, variant), _file(stem, variant)))


def variant_of(name: str) -> str:
    """The variant in the name of a file or an index, "" for none."""
    if INDEX in name:
        return name.partition(INDEX)[2].removesuffix(".json").removeprefix(".")
    return name.removesuffix(SUFFIX).rpartition(".")[2] if "." in name.removesuffix(SUFFIX) else ""


def _index(stem: str, variant: str | None) -> str:
    return f"{stem}{INDEX}.{variant}.json" if variant else f"{stem}{INDEX}.json"


def _file(stem: str, variant: str | None) -> str:
    return f"{stem}.{variant}{SUFFIX}" if variant else f"{stem}{SUFFIX}"
