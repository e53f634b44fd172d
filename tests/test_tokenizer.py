"""A tokenizer whose files are not all there, or not this text encoder's, is refused; others are not."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Checkpoint

from cineline import CheckpointError, Engine
from cineline.engine.hub import MINIS, folder_of, open_model
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.spiece import READERS, _is_installed
from cineline.families.wan.text import Tokenizer
from cineline.families.wan.vocabulary import check_numbers

Spoil = Callable[[Path], object]


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for part in checkpoint(RandomConfig("t2v", seed=3)).iterdir():
        if part.name == "tokenizer":
            shutil.copytree(part, folder / part.name)
        else:
            (folder / part.name).symlink_to(part)
    return folder


def change(file: Path, path: list[str], value: Callable[[Any], Any]) -> None:
    """A value within a JSON file."""
    inner = whole = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value(inner[path[-1]])
    file.write_text(json.dumps(whole))


def vocabulary(home: Path, value: Callable[[Any], Any]) -> None:
    change(home / "tokenizer.json", ["model", "vocab"], value)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        open_model(folder)
    assert str(folder / "tokenizer") in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


FILES: list[tuple[Spoil, str]] = [
    (lambda home: (home / "tokenizer.json").unlink(), "has none of tokenizer.json, spiece.model"),
    (lambda home: (home / "tokenizer.json").write_text(""), "cannot be read"),
    (lambda home: (home / "tokenizer.json").write_text("[]"), "no JSON object"),
    (lambda home: (home / "tokenizer.json").write_text("{}"), "holds no vocabulary"),
    (lambda home: (home / "tokenizer.json").write_text('{"model": {"vocab": 7}}'), "holds no vocabulary"),
    (lambda home: (home / "tokenizer.json").write_text('{"model": null}'), "holds no vocabulary"),
    (lambda home: (home / "tokenizer_config.json").unlink(), "does not exist"),
    (lambda home: vocabulary(home, lambda tokens: []), "has 3 tokens, far fewer than the text encoder's 72"),
    (lambda home: vocabulary(home, lambda tokens: {}), "has 3 tokens"),
    (lambda home: vocabulary(home, lambda tokens: {"a": 500, **{str(n): n for n in range(72)}}), "up to 500"),
    (lambda home: list(map(Path.unlink, home.iterdir())), "tokenizer_config.json' does not exist"),
]


@pytest.mark.parametrize(("spoil", "words"), FILES, ids=[words for _, words in FILES])
def test_files_without_a_vocabulary_are_refused_before_any_rank_starts(spoil: Spoil, words: str, copy: Path) -> None:
    open_model(copy)
    spoil(copy / "tokenizer")
    assert words in refusal(copy)


@given(tokens=st.integers(0, 300_000), rows=st.integers(1, 300_000))
def test_a_vocabulary_of_another_size_is_refused(tokens: int, rows: int) -> None:
    def check() -> None:
        check_numbers(Path("tokenizer"), range(tokens), {"vocab_size": rows})

    if 0.99 * rows <= tokens <= rows:
        check()
    else:
        with pytest.raises(CheckpointError, match="far fewer" if tokens < rows else "numbers its tokens up to"):
            check()


@pytest.mark.parametrize(
    ("tokens", "fits"),
    [(256_300, True), (256_000, True), (250_100, False), (151_936, False), (49_408, False), (32_100, False)],
    ids=["umT5", "umT5 without sentinels", "mT5", "Qwen", "CLIP", "T5"],
)
def test_umt5s_vocabulary_fits_wans_text_encoder_and_other_models_do_not(tokens: int, fits: bool) -> None:
    try:
        check_numbers(Path("tokenizer"), range(tokens), {"vocab_size": 256_384})
    except CheckpointError:
        assert not fits
    else:
        assert fits


def test_planning_needs_no_tokenizer(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    open_model(copy)
    with pytest.raises(CheckpointError, match="tokenizer' cannot be loaded"):
        Tokenizer(copy / "tokenizer", {})


@pytest.mark.parametrize("name", MINIS)
def test_the_tokenizers_that_ship_belong_to_their_text_encoders(name: str) -> None:
    spec = WanSpec.open(folder_of(name))
    Tokenizer(spec.tokenizer_home, spec.text)


def elsewhere(token: str) -> Spoil:
    """As of another model: the special token has the last number, and what follows it moves up."""
    return lambda home: vocabulary(
        home, lambda known: [*(own for own in known if own[0] != token), *(own for own in known if own[0] == token)]
    )


def no_class(home: Path) -> None:
    (home / "tokenizer_config.json").write_text("{}")


LOADED: list[tuple[Spoil, str]] = [
    (elsewhere("<pad>"), "has pad_token number 71, but the text encoder's config says 0"),
    (elsewhere("</s>"), "has eos_token number 71, but the text encoder's config says 1"),
    (no_class, "has pad_token number None"),
    (lambda home: (home / "tokenizer.json").rename(home / "vocab.json"), "tokenizer"),
]


@pytest.mark.parametrize(("spoil", "words"), LOADED, ids=["pad", "eos", "no class", "another's file"])
def test_what_transformers_makes_of_the_files_is_refused_by_the_head(spoil: Spoil, words: str, copy: Path) -> None:
    """What only shows when it is loaded."""
    spec = WanSpec.open(copy)
    Tokenizer(copy / "tokenizer", spec.text)
    home = copy / "tokenizer"
    spoil(home)
    open_model(copy)
    with pytest.raises(CheckpointError) as refused:
        Tokenizer(copy / "tokenizer", spec.text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def field(number: int, content: bytes) -> bytes:
    """One of a message in protobuf's wire format."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def as_spiece(home: Path) -> None:
    """The same vocabulary as a SentencePiece model, with no tokenizer.json beside it."""
    stored = json.loads((home / "tokenizer.json").read_text())["model"]["vocab"]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [
        field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kinds.get(token, 1)])
        for token, score in stored
    ]
    unknown = b"\xc0\x02\x02"  # unk_id, field 40 of the trainer's, is 2
    (home / "spiece.model").write_bytes(b"".join(field(1, piece) for piece in pieces) + field(2, unknown))
    (home / "tokenizer.json").unlink()


def test_a_sentencepiece_model_alone_is_read_as_its_tokenizer_json(copy: Path) -> None:
    spec = WanSpec.open(copy)
    wanted = Tokenizer(copy / "tokenizer", spec.text)
    as_spiece(copy / "tokenizer")
    open_model(copy)
    found = Tokenizer(copy / "tokenizer", spec.text)
    for prompt in ("", "a cat", "Red, green; 3 of each!", "snö </s>"):
        assert all(map(torch.equal, found(prompt), wanted(prompt)))


@pytest.mark.parametrize("lacking", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]])
def test_without_what_reads_it_the_libraries_are_named(
    lacking: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [READERS[library] for library in lacking]
    monkeypatch.setattr("cineline.families.wan.spiece._is_installed", lambda module: module not in modules)
    spec = WanSpec.open(copy)
    Tokenizer(copy / "tokenizer", spec.text)  # a tokenizer.json needs none of them
    as_spiece(copy / "tokenizer")
    open_model(copy)
    with pytest.raises(CheckpointError) as refused:
        Tokenizer(copy / "tokenizer", spec.text)
    words = "has a spiece.model and no tokenizer.json, which takes libraries that are not installed"
    assert str(refused.value) == (
        f"'{copy}/tokenizer' {words}: run pip install \"cineline[spiece]\" (it brings {' and '.join(lacking)}), "
        "or add a tokenizer.json."
    )


def test_a_module_is_installed_where_it_can_be_found() -> None:
    assert _is_installed("json.decoder")
    assert not _is_installed("no_such_package") and not _is_installed("no_such_package.inner")


def test_the_engine_says_so(copy: Path) -> None:
    no_class(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="pad_token"):
        Engine(copy, device="cpu")
