"""A model's identity: another for whatever changes its bits, and for nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import write
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_family import ToySpec

from cineline import CheckpointError, ModelFiles
from cineline.engine.hub import open_model
from cineline.families import identity as identities
from cineline.families.identity import identity_of
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import SOLVERS, WanSpec
from cineline.weights.sources import open_source


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy to be changed, its transformer in several files."""
    made = checkpoint(RandomConfig("t2v", max_shard_size="100KB"))
    return Path(shutil.copytree(made, tmp_path / "copy"))


def identity(folder: Path, variant: str | None = None) -> str:
    return identity_of(open_model(folder, variant))


def in_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SAME: dict[str, Callable[[Path], object]] = {
    "another place": lambda folder: None,
    "other defaults": lambda folder: (folder / "cineline.json").write_text('{"num_frames": 9}'),
    "other words": lambda folder: (folder / "README.md").write_text("hello"),
    "a hidden file": lambda folder: (folder / "tokenizer" / ".lock").write_text("hello"),
    "other white space": lambda folder: in_json(folder / "vae" / "config.json"),
    "another order": lambda folder: (folder / "vae" / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((folder / "vae" / "config.json").read_text()).items())))
    ),
    "a file that nobody reads": lambda folder: (folder / "transformer" / "more.json").write_text("{}"),
}


@pytest.mark.parametrize("change", SAME)
def test_it_is_the_same_where_the_model_is(change: str, folder: Path, checkpoint: Checkpoint) -> None:
    SAME[change](folder)
    assert identity(folder) == identity(checkpoint(RandomConfig("t2v", max_shard_size="100KB")))


def _as_variant(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("model.fp16.safetensors"))


OTHER: dict[str, Callable[[Path], object]] = {
    "a config": lambda folder: in_json(folder / "transformer_2" / "config.json", added=1),
    "the index": lambda folder: in_json(folder / "model_index.json", added=1),
    "the solver's config": lambda folder: in_json(folder / "scheduler" / "scheduler_config.json", flow_shift=4.0),
    "the tokenizer": lambda folder: (folder / "tokenizer" / "added.json").write_text("{}"),
    "other files": _as_variant,
}


@pytest.mark.parametrize("change", OTHER)
def test_it_is_another_where_the_model_is(change: str, folder: Path) -> None:
    before = identity(folder)
    OTHER[change](folder)
    assert identity(folder) != before


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "text_encoder", "vae"])
def test_a_fine_tune_of_any_tensor_is_another_model(component: str, folder: Path) -> None:
    """Also of one tensor alone; the headers are the same."""
    before = identity(folder)
    found = {before}
    tensors = 0
    for file in sorted((folder / component).glob("*.safetensors")):
        content = file.read_bytes()
        weights = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        for name, tensor in weights.items():
            save_file({**weights, name: tensor + 1}, file, metadata)
            found.add(identity(folder))
            tensors += 1
        file.write_bytes(content)
    assert len(found) == tensors + 1 and tensors > 1
    assert identity(folder) == before


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SOLVERS), st.floats(0.1, 0.9))
def test_what_is_changed_of_a_spec_is_another_model(solver: str, boundary: float) -> None:
    spec = open_model("mini-t2v")
    assert isinstance(spec, WanSpec)
    changed = replace(spec, scheduler_class=solver, boundary_ratio=boundary)
    assert (identity_of(changed) == identity_of(spec)) == (changed == spec)


def test_the_minis_are_two_models_and_a_family_of_ones_own_is_what_it_says() -> None:
    named = [open_model("mini-ti2v"), open_model("mini-t2v"), ToySpec(), ToySpec(layers=4)]
    assert len({identity_of(spec) for spec in named}) == 4
    assert identity_of(ToySpec()) == identity_of(ToySpec(layers=8))
    assert all(len(identity_of(spec)) == 64 for spec in named)


def test_it_is_the_same_in_another_process_which_needs_no_torch() -> None:
    code = (
        "import sys; from cineline.engine.hub import open_model; from cineline.families.identity import identity_of; "
        "print(identity_of(open_model('mini-t2v')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [identity_of(open_model("mini-t2v")), "False"]


@pytest.mark.parametrize("content", [b"", b"\x05" + bytes(7) + b"hello", b"\x02" + bytes(7) + b"[]"])
def test_weights_that_are_none_are_refused(content: bytes, folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        identity(folder)
    assert str(refused.value) == (
        f"{str(file)!r} is no safetensors file, or its header is truncated: download it again."
    )
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(CheckpointError, match="does not exist: check the path"):
        identity(folder)


@pytest.mark.parametrize("how", ["gguf Q8_0", "pickle"])
def test_a_fine_tune_in_any_file_is_another_model(
    how: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a large file the tensor is: there are not samples of all bytes, but of all tensors."""
    monkeypatch.setattr(identities, "SAMPLES", 2)
    monkeypatch.setattr(identities, "SAMPLE", 64)
    made = checkpoint(RandomConfig("ti2v"))
    file, _ = write(made, "transformer", how, tmp_path)
    files, content = ModelFiles(file), file.read_bytes()
    spec = open_model(made, files=files)
    found = {identity_of(spec)}
    changed: list[Any] = []
    if how == "pickle":
        state = torch.load(file)
        changed += [{**state, name: one + 1} for name, one in list(state.items())[::4]]
    else:
        changed += [one.start + one.nbytes // 2 for one in list(open_source(file).stored.values())[::4]]
    for change in changed:
        if how == "pickle":
            torch.save(change, file)
        else:
            file.write_bytes(content[:change] + bytes([content[change] ^ 1]) + content[change + 1 :])
        found.add(identity_of(spec))
    assert len(found) == len(changed) + 1 > 20
    file.write_bytes(content)
    assert identity_of(spec) in found
