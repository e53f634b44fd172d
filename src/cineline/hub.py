"""From what a user calls a model to its spec: a folder, a hub id, or the built-in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cineline.errors import CheckpointError
from cineline.spec import FamilySpec, WanSpec

BUILD_LIMIT_S = 300.0

BUILTIN = "random-ti2v-1"
"""Folder of the built-in model; its number is raised whenever what is built changes."""

FILES = ["model_index.json", "cineline.json", "*/*.json", "*/*.safetensors", "tokenizer/*"]


def open_model(model: str | Path | FamilySpec | None) -> FamilySpec:
    """The model's spec, downloading it first where it is a hub id.

    Raises:
        CheckpointError: there is no such model, or it is none that Cineline runs.
    """
    if model is None:
        return WanSpec.open(_builtin())
    if not isinstance(model, (str, Path)):
        return model
    folder = Path(model)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise CheckpointError(f"model={str(model)[:40]!r} cannot be a folder ({error.strerror}): give one.") from None
    if is_folder:
        return WanSpec.open(folder)
    if exists:
        raise CheckpointError(f"model={str(model)!r} is a file: give the folder that holds model_index.json.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(f"model={str(model)!r} does not exist: give a folder, or a hub id such as owner/name.")
    return WanSpec.open(_download(str(model)))


def _builtin() -> Path:
    """The model that is used when none is named, made on first use in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cineline"
    folder = cache / BUILTIN
    if folder.is_dir():
        return folder
    # In a process of its own, because its libraries talk and this one may be the user's.
    made = subprocess.run(
        [sys.executable, "-P", "-m", "cineline.models.random_checkpoint", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    if not folder.is_dir():  # whoever made it: another process may have been faster
        reason = made.stderr.strip().split("\n")[-1]
        raise CheckpointError(f"The built-in model cannot be made at {folder} ({reason}): set XDG_CACHE_HOME.")
    return folder


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
