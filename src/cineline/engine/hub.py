"""From what a user calls a model to its spec: a mini model's name, a folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from cineline.core.family import FamilySpec
from cineline.errors import CheckpointError, reason, shown
from cineline.families.registry import open_checkpoint

MINIS = ("mini-ti2v", "mini-t2v")
"""Trained models that ship with the package, by the names they go by everywhere; the first is the default."""

FILES = ["model_index.json", "cineline.json", "*/*.json", "*/*.safetensors", "tokenizer/*"]


def open_model(model: str | Path | FamilySpec | None) -> FamilySpec:
    """The model's spec, downloading it first where it is a hub id.

    Raises:
        CheckpointError: there is no such model, or it is none that Cineline runs.
    """
    if model is not None and not isinstance(model, (str, Path)):
        return model
    return open_checkpoint(folder_of(model))


def folder_of(model: str | Path | None) -> Path:
    """Where its files are, downloading them first where it is a hub id.

    Raises:
        CheckpointError: there is no such model.
    """
    if model is None or str(model) in MINIS:
        return Path(__file__).parent.parent / "minis" / str(model or MINIS[0])
    folder = Path(model)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise CheckpointError(f"model={shown(folder)} cannot be a folder ({reason(error)}): give one.") from None
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(f"model={shown(folder)} is a file: give the folder that holds model_index.json.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(
            f"model={shown(folder)} does not exist: give a folder, a hub id such as owner/name, or "
            f"{' or '.join(MINIS)}."
        )
    return _download(str(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"model={shown(hub_id)} is no folder here and cannot be downloaded ({type(error).__name__}: "
            f"{reason(error)}): check the name and the network."
        ) from None
