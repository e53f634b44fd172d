"""What a model is, as one number: snapshots go on with the model that made them, and with no other, and hosts have
one model alike (no torch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard
from zipfile import BadZipFile, ZipFile, is_zipfile

from cineline.core.family import FamilySpec, StoredFamily
from cineline.errors import CheckpointError, reason, shown
from cineline.families.configs import read_json
from cineline.weights.layout import files_of
from cineline.weights.lora import CONFIG
from cineline.weights.sources import GGUF, PICKLES, SAFETENSORS, open_source

CONFIGS = ("model_index.json", "*/config.json", "*/*_config.json")
TOKENIZER = "tokenizer*/[!.]*"

TOLD_ELSEWHERE = ("variant", "defaults", "files", "loras")
"""Fields of a stored family's spec that change no bits by themselves: the files say what the variant is, and each
request's own settings what the defaults have come to."""

SAMPLE = 4096
"""Bytes of each tensor, from its middle."""

SAMPLES = 4096
"""Of a file that does not say where its tensors are."""

LENGTH = 8
"""Bytes that say how long something is, here and in safetensors files."""


def identity_of(spec: FamilySpec, whole: bool = False) -> str:
    """The SHA-256 of what the model is, in hexadecimal.

    Of a stored family that is the spec's fields, the configs, the tokenizer's files, and of each file of weights that
    the ranks read its name, its size, its header and a sample of each tensor, since fine-tunes of a model have the same
    headers. Where the folder is does not matter. Of another family's spec it is its class and its `repr`.

    Args:
        whole: of all bytes of each file of weights, too.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    if whole and isinstance(spec, StoredFamily):
        digest.update(b"".join(_whole(path) for path in _weights_of(spec)))
    for part in _stored_parts(spec) if isinstance(spec, StoredFamily) else (repr(spec).encode(errors="replace"),):
        digest.update(len(part).to_bytes(LENGTH, "little") + part)
    digest.update(f"{type(spec).__module__}.{type(spec).__qualname__}".encode())
    return digest.hexdigest()


def check_same(spec: FamilySpec, identity: str, whole: bool, who: str) -> None:
    """Refuse a model that is not the same here as where the number was made.

    Args:
        whole: as of `identity_of`. who: looks, and where.

    Raises:
        CheckpointError: it is not here, or another.
    """
    paths = [spec.folder, *spec.files.values(), *(lora.path for lora in spec.loras)] if _is_stored(spec) else []
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"{who} has no {shown(path)}: put the model, and all files of it that are named, at the same path on "
                "every host."
            )
    if identity_of(spec, whole) != identity:
        named = shown(paths[0]) if paths else type(spec).__name__
        raise CheckpointError(
            f"{who} has another model in {named} than rank 0's host: copy it from there, or download both alike."
        )


def _is_stored(spec: FamilySpec) -> TypeGuard[StoredFamily]:
    return isinstance(spec, StoredFamily)


def _weights_of(spec: StoredFamily) -> Iterator[Path]:
    """All files of weights, in an order that does not depend on where they are."""
    for component in sorted(path.parent for path in spec.folder.glob("*/config.json")):
        yield from _weights(component, spec.variant) if component.name not in spec.files else ()
    for _, given in sorted(spec.files.items()):
        yield from sorted(given.iterdir()) if given.is_dir() else [given]
    for lora in spec.loras:
        yield from sorted(lora.path.iterdir()) if lora.path.is_dir() else [lora.path]


def _whole(path: Path) -> bytes:
    """The SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None


def _stored_parts(spec: StoredFamily) -> Iterator[bytes]:
    yield _canonical(_own_fields(spec))
    folder = spec.folder
    for path in sorted(path for pattern in CONFIGS for path in folder.glob(pattern)):
        yield _name(folder, path)
        yield _canonical(read_json(path, "it was there a moment ago"))
    for path in sorted(path for path in folder.glob(TOKENIZER) if path.is_file()):
        yield _name(folder, path)
        yield _content(path)
    for component in sorted(path.parent for path in folder.glob("*/config.json")):
        for path in _weights(component, spec.variant) if component.name not in spec.files else ():
            yield _name(folder, path)
            yield from _samples(path)
    for name, path in sorted([*spec.files.items(), *_paths(spec)]):
        yield name.encode()
        yield from _given(path)
    for lora in spec.loras:
        yield f"{lora.name}={lora.level}:{lora.scale!r}".encode()
        yield from _given(lora.path)
        yield from (_content(path) for path in (lora.path.parent / CONFIG,) if path.is_file())


def _paths(spec: StoredFamily) -> Iterator[tuple[str, Path]]:
    """Other paths that the spec names, such as a tokenizer's."""
    for name in _fields(spec):
        value = getattr(spec, name)
        if isinstance(value, Path) and value != spec.folder and value not in spec.files.values():
            yield name, value


def _given(path: Path) -> Iterator[bytes]:
    """Of a file or folder that was given by itself, whatever it is called."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix.lower() in (*SAFETENSORS, *GGUF):
            yield from _samples(file)
        elif file.suffix.lower() in PICKLES and is_zipfile(file):
            yield from _records(file)
        elif file.is_file():
            yield from _spread(file)


def _spread(path: Path) -> Iterator[bytes]:
    """Of any file: its size, and samples from its beginning to its end; all of it where it is small."""
    try:
        size = path.stat().st_size
        yield size.to_bytes(LENGTH, "little")
        with path.open("rb") as stream:
            for at in range(0, size, max(SAMPLE, size // SAMPLES)):
                stream.seek(at)
                yield stream.read(SAMPLE)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None


def _fields(spec: object) -> list[str]:
    return [each.name for each in fields(spec)] if is_dataclass(spec) else []


def _own_fields(spec: object) -> dict[str, Any]:
    """But paths."""
    names = [name for name in _fields(spec) if name not in TOLD_ELSEWHERE]
    own = {name: getattr(spec, name) for name in names}
    return {name: value for name, value in own.items() if not isinstance(value, Path)}


def _canonical(value: Mapping[str, Any]) -> bytes:
    """JSON that is the same for what is equal."""

    def plain(other: Any) -> Any:
        return dict(other) if isinstance(other, Mapping) else repr(other)

    return json.dumps(value, sort_keys=True, default=plain).encode()


def _name(folder: Path, path: Path) -> bytes:
    return path.relative_to(folder).as_posix().encode(errors="surrogateescape")


def _weights(component: Path, variant: str | None) -> list[Path]:
    try:
        return files_of(component, variant)
    except CheckpointError:  # no rank reads this component, or the one that does says so
        return []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None


def _samples(path: Path) -> Iterator[bytes]:
    """Of a safetensors or GGUF file: its size, its header, and a sample of each tensor."""
    places = sorted((one.start, one.start + one.nbytes) for one in open_source(path).stored.values())
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(places[0][0] if places else size)
            yield size.to_bytes(LENGTH, "little")
            yield header[LENGTH:] if path.suffix.lower() in SAFETENSORS else header
            for begin, end in places:
                taken = min(SAMPLE, end - begin)
                stream.seek(begin + (end - begin - taken) // 2)
                yield stream.read(taken)
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None


def _records(path: Path) -> Iterator[bytes]:
    """Of a zip archive, as torch's files are: its size, and each record's name, size and checksum of all its bytes."""
    try:
        yield path.stat().st_size.to_bytes(LENGTH, "little")
        with ZipFile(path) as archive:
            for one in archive.infolist():
                yield f"{one.filename.partition('/')[2]} {one.file_size} {one.CRC}".encode()
    except (OSError, BadZipFile) as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None
