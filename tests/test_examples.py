"""The examples run as they are, on a small checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import Checkpoint
from PIL import Image

from cineline.families.wan.random_checkpoint import RandomConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "made"),
    [
        ("text_to_video.py", [], ["text_0.mp4", "text_1.mp4", "text_2.mp4"]),
        ("image_to_video.py", ["picture.png"], ["image.mp4"]),
    ],
)
def test_an_example_makes_its_videos(
    name: str, arguments: list[str], made: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint(RandomConfig(seed=3)), model)
    small = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2}
    (model / "cineline.json").write_text(json.dumps(small))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    command = [sys.executable, str(EXAMPLES / name), *arguments, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == made
