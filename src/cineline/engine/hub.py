"""From what a user calls a model to its spec: a mini model's name, a folder, or a hub id.

Of a hub id the configs come first, which is all that most questions need; weights come when ranks are to start.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineline.core.config import ModelFiles
from cineline.core.family import FamilySpec, StoredFamily
from cineline.errors import CheckpointError, reason, shown
from cineline.families.registry import open_checkpoint, with_files
from cineline.weights.layout import choose, files_of, has_variant, named_choice, shards_of

log = logging.getLogger(__name__)

MINIS = ("mini-ti2v", "mini-t2v")
"""Trained models that ship with the package, by the names they go by everywhere; the first is the default."""

DIFFUSERS = "-Diffusers"
"""How the names of those models end that were converted."""

CONFIGS = ["model_index.json", "cineline.json", "cineline-cache.json", "*/*.json", "tokenizer*/*"]
WEIGHTS = ["*/*.safetensors", "*/*.bin"]

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""Errors of the place that is written to."""

LOCKED = (401, 403)
"""The hub's answers where a model is gated or private; to strangers the first one, also of models that do not exist."""

CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
"""A commit's folder in the hub's cache, from the cache's on."""


def open_model(
    model: str | Path | FamilySpec | None, variant: str | None = None, files: ModelFiles | None = None
) -> FamilySpec:
    """The model's spec, downloading its configs where it is a hub id.

    Args:
        variant: of its weights, such as fp16, where there are several.
        files: that weights come from instead; beside them, no model is the one that they are of.

    Raises:
        CheckpointError: there is no such model, or it is none that Cineline runs.
    """
    if files is not None and files.given:
        if variant is not None and model is None:
            raise CheckpointError(f"variant={shown(variant)} is for a model's folder: leave it out.")
        return with_files(None if model is None else open_model(model, variant), files)
    if model is not None and not isinstance(model, (str, Path)):
        if variant is not None:
            raise CheckpointError(f"variant={shown(variant)} is for a model by name: a spec has its own.")
        return model
    return open_checkpoint(folder_of(model), variant)


def name_of(spec: FamilySpec) -> str | None:
    """What `open_model` opens this spec's model by, from whatever folder it is called in; None where nothing does."""
    if not isinstance(spec, StoredFamily):
        return None
    folder = spec.folder.absolute()
    if spec.folder in spec.files.values():  # there is none
        return None
    return folder.name if folder.parent == _minis() and folder.name in MINIS else str(folder)


def public_name(spec: FamilySpec) -> str | None:
    """What anybody may open this spec's model by, on whatever machine: a hub id, or the name of a mini model."""
    name = name_of(spec)
    return name if name is None or name in MINIS else public_path(Path(name))


def public_path(path: Path) -> str | None:
    """The hub id, and the path in it, of what the hub's cache holds; None of anything else."""
    cached = CACHED.search(path.absolute().as_posix())
    return cached and f"{cached['owner']}/{cached['name']}{cached.string[cached.end() :]}"


def _minis() -> Path:
    return Path(__file__).absolute().parent.parent / "minis"


def folder_of(model: str | Path | None) -> Path:
    """Where its configs are, downloading them first where it is a hub id.

    Raises:
        CheckpointError: there is no such model.
    """
    if model is None or str(model) in MINIS:
        return _minis() / str(model or MINIS[0])
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
    found = Path(download(str(model), allow_patterns=CONFIGS))
    if not (found / "model_index.json").exists():
        remedy = "give one that does" if str(model).endswith(DIFFUSERS) else f"try {shown(f'{model}{DIFFUSERS}')}"
        raise CheckpointError(
            f"model={shown(folder)} has no model_index.json, as models in diffusers format do: {remedy}."
        )
    return found


@dataclass(frozen=True)
class Missing:
    """Weights of a hub's model that are not here.

    Attributes:
        hub_id, commit: whose. files: their names. nbytes: of all of them.
    """

    hub_id: str
    commit: str
    files: Sequence[str]
    nbytes: int


def missing_weights(spec: FamilySpec) -> Missing | None:
    """What `fetch_weights` would download; None where all is here, or nothing can be had.

    Raises:
        CheckpointError: the weights have no such variant, are in no format that is read, or the hub cannot be asked.
    """
    if not isinstance(spec, StoredFamily):
        return None
    folder, variant = spec.folder, spec.variant
    components = sorted(path.parent for path in folder.glob("*/config.json") if path.parent.name not in spec.files)
    found = CACHED.search(folder.as_posix())
    if found is None or not _is_cached(folder):
        _check_variant(variant, components, _names_here)
        return None
    if _is_here(components, variant):
        return None
    hub_id, commit = f"{found['owner']}/{found['name']}", found["commit"]
    try:
        files = download(hub_id, revision=commit, allow_patterns=WEIGHTS, dry_run=True)
    except CheckpointError as error:
        if not _is_all_there(components, variant):
            raise
        log.warning("%s The weights that are here are used.", error)
        return None
    listed = {file.filename: file for file in files}

    def names(component: Path) -> set[str]:
        return {Path(name).name for name in listed if Path(name).parent.name == component.name} | _names_here(component)

    _check_variant(variant, components, names)
    wanted = [name for component in components for name in _wanted(component, names(component), variant)]
    lacking = [name for name in wanted if name in listed and not (folder / name).exists()]
    nbytes = sum(listed[name].file_size or 0 for name in lacking if listed[name].will_download)
    return Missing(hub_id, commit, lacking, nbytes) if lacking else None


def fetch_weights(spec: FamilySpec) -> None:
    """Download the weights of a hub's model that are not here, with the hub's own progress on a terminal.

    Raises:
        CheckpointError: as `missing_weights`.
    """
    if missing := missing_weights(spec):
        download(missing.hub_id, revision=missing.commit, allow_patterns=list(missing.files))


def _is_cached(folder: Path) -> bool:
    """Whether it is in the cache that is downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve() in folder.resolve().parents


def _names_here(component: Path) -> set[str]:
    return {path.name for path in component.iterdir()}


def _is_here(components: Sequence[Path], variant: str | None) -> bool:
    """Whether nothing of a hub's model is missing: the plain weights or the variant, not another that happens to be."""
    if variant and not any(has_variant(_names_here(component), variant) for component in components):
        return False
    named = all(named_choice(_names_here(component), variant) for component in components)
    return named and _is_all_there(components, variant)


def _is_all_there(components: Sequence[Path], variant: str | None) -> bool:
    try:
        return all(file.exists() for component in components for file in files_of(component, variant))
    except CheckpointError:
        return False


def _wanted(component: Path, names: set[str], variant: str | None) -> Iterator[str]:
    """The files of a component's weights, by their names in the repository."""
    chosen = component / choose(names, component, variant)
    for file in shards_of(chosen) if chosen.suffix == ".json" else [chosen]:
        yield f"{component.name}/{file.name}"


def _check_variant(variant: str | None, components: Sequence[Path], names: Callable[[Path], set[str]]) -> None:
    if variant and not any(has_variant(names(component), variant) for component in components):
        where = shown(components[0].parent) if components else "the model"
        raise CheckpointError(
            f"variant={shown(variant)} is in no component of {where}: leave it out, or name one it has."
        )


def download(hub_id: str, what: str = "model", **arguments: Any) -> Any:
    """Files of a repository, as `snapshot_download` takes its arguments.

    Args:
        what: it is, for errors.

    Raises:
        CheckpointError: they cannot be had.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(hub_id, what):
        return snapshot_download(hub_id, **arguments)


@contextmanager
def _hub_errors(hub_id: str, what: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if getattr(error, "errno", None) in DISK:
            raise CheckpointError(
                f"{what}={shown(hub_id)} cannot be downloaded ({reason(error)}): check the disk, and HF_HOME, which "
                "says where it goes."
            ) from None
        told = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(told, HfHubHTTPError) and told.response.status_code in LOCKED:
            raise CheckpointError(
                f"{what}={shown(hub_id)} is no folder here, and the hub does not let you have it "
                f"({told.response.status_code}): check the name, accept the licence on the hub's page and log in with "
                "`hf auth login`, or set HF_TOKEN."
            ) from None
        raise CheckpointError(
            f"{what}={shown(hub_id)} is no folder here and cannot be downloaded ({type(error).__name__}: "
            f"{reason(error)}): check the name and the network."
        ) from None
