"""Libraries that only some commands need: each says in one sentence that one is missing, and how to get it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cineline.cli import main
from cineline.core.extras import EXTRAS

PLAN = ["plan", "--model", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "--devices", "2xL40S"]


def test_extras_are_pyprojects() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for library, extra in EXTRAS.items():
        assert not any(needed.startswith(library) for needed in project["dependencies"])
        assert library in [needed.partition(">")[0] for needed in project["optional-dependencies"][extra]]


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("accelerate", ["bench", "exact"]),
        ("accelerate", ["bench", "line"]),
        ("torchmetrics", ["eval", "compare", "a.safetensors", "a.safetensors"]),
        ("fastapi", ["serve"]),
        ("ray", ["generate", "a cat", "--launcher", "ray"]),
        ("ray", ["serve", "--launcher", "ray"]),
        ("matplotlib", [*PLAN, "--picture", "plan.png"]),
    ],
)
def test_what_is_missing_is_named(
    library: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"latents": torch.ones(16, 5, 16, 16)}, "a.safetensors")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(sys, "argv", ["cineline", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f'{library} is needed for this and not installed: run pip install "cineline[{EXTRAS[library]}]".' in sentence
