"""From what a user calls a model to its spec: a folder, a hub id, or the built-in one."""

from __future__ import annotations

import re
from pathlib import Path

from cineline.errors import CheckpointError
from cineline.spec import FamilySpec, WanSpec

FILES = ["model_index.json", "cineline.json", "*/*.json", "*/*.safetensors", "tokenizer/*"]


def open_model(model: str | Path | FamilySpec | None) -> FamilySpec:
    """The model's spec, downloading it first where it is a hub id.

    Raises:
        CheckpointError: there is no such model, or it is none that Cineline runs.
    """
    if model is None:
        from cineline.models.random_checkpoint import builtin_checkpoint

        return WanSpec.open(builtin_checkpoint())
    if not isinstance(model, (str, Path)):
        return model
    folder = Path(model)
    if folder.is_dir():
        return WanSpec.open(folder)
    if folder.exists():
        raise CheckpointError(f"model={str(model)!r} is a file: give the folder that holds model_index.json.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(f"model={str(model)!r} does not exist: give a folder, or a hub id such as owner/name.")
    return WanSpec.open(_download(str(model)))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"model={hub_id!r} is no folder here and cannot be downloaded ({type(error).__name__}: {reason}): "
            "check the name and the network."
        ) from None
