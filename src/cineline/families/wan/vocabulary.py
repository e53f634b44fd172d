"""Whether a checkpoint's tokenizer belongs to its text encoder (no torch).

Where it does not, transformers makes one of what there is, and every word is unknown or another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cineline.errors import CheckpointError, shown
from cineline.families.configs import read_json

VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files that transformers takes a vocabulary from."""

LEAST_SHARE = 0.99
"""Of an encoder's rows, those that a tokenizer of its own has tokens for; the others fill up a multiple of 128."""

UMT5 = {"vocab_size": 250112, "pad_token_id": 0, "eos_token_id": 1}
"""transformers' defaults for what a text encoder's config may leave out."""


def check_tokenizer(folder: Path, text: Mapping[str, Any]) -> None:
    """Hold the files of a checkpoint's tokenizer against its text encoder's config.

    Where there is no folder `tokenizer`, nothing is said: planning needs none.

    Raises:
        CheckpointError: there is no vocabulary, or not this text encoder's.
    """
    home = folder / "tokenizer"
    if not home.exists():
        return
    read_json(home / "tokenizer_config.json", "each component has one")
    if not any((home / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{shown(home)} has none of {', '.join(VOCABULARIES)}, and every word would be unknown: download it again."
        )
    file = home / VOCABULARIES[0]
    if file.is_file():
        check_numbers(home, _numbers(file), text)


def check_numbers(home: Path, numbers: Collection[int], text: Mapping[str, Any]) -> None:
    """Hold the numbers of a tokenizer's tokens against the text encoder's rows.

    Raises:
        CheckpointError: far fewer tokens than rows, or a number beyond them.
    """
    rows = UMT5["vocab_size"] if text.get("vocab_size") is None else text["vocab_size"]
    if type(rows) is not int or rows < 1:
        raise CheckpointError(
            f"{shown(home.parent)}: the text encoder's vocab_size={shown(rows)} is no size: download it again."
        )
    if len(numbers) < LEAST_SHARE * rows:
        raise CheckpointError(
            f"{shown(home)} has {len(numbers)} tokens, far fewer than the text encoder's {shown(rows)}: use the "
            "tokenizer that belongs to it, or download it again."
        )
    if max(numbers) >= rows:
        raise CheckpointError(
            f"{shown(home)} numbers its tokens up to {max(numbers)}, but the text encoder has {shown(rows)}: use the "
            "tokenizer that belongs to it."
        )


def check_special(home: Path, name: str, number: int | None, text: Mapping[str, Any]) -> None:
    """Hold a tokenizer's `pad` or `eos` token against the text encoder's config.

    Raises:
        CheckpointError: there is none, or it has another number there.
    """
    key = f"{name}_token_id"
    wanted = text.get(key, UMT5[key])
    if number is None or number not in (wanted if isinstance(wanted, list) else [number if wanted is None else wanted]):
        raise CheckpointError(
            f"{shown(home)} has {name}_token number {number}, but the text encoder's config says {shown(wanted)}: use "
            "the tokenizer that belongs to it, or download it again."
        )


def _numbers(file: Path) -> set[int]:
    """Of all tokens in a tokenizer.json."""
    stored = read_json(file, "it holds the vocabulary")
    try:
        vocabulary = stored["model"]["vocab"]
        own = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        return own | {int(token["id"]) for token in stored.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{shown(file)} holds no vocabulary: download it again.") from None
