"""Judging and comparing videos: figures that can be worked out by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cineline import InvalidRequest, Video
from cineline.media.compare import compare, compare_files
from training.judge import Verdict, judge
from training.scenes import Motion, Scene, Shape, all_scenes, first_frame, held_out_scenes
from training.score import Shown, contact_sheet, tally


def test_no_object_no_verdict() -> None:
    flat = np.full((5, 32, 32, 3), (40, 70, 210), np.uint8)
    assert judge(flat) == Verdict(None, None, None, "blue")


def test_several_blobs_are_no_shape_and_what_stands_still_does_not_move() -> None:
    frames = np.full((5, 64, 64, 3), 245, np.uint8)
    for x, y in ((5, 5), (45, 50), (50, 8)):
        frames[:, y : y + 9, x : x + 9] = (220, 40, 40)
    assert judge(frames) == Verdict("red", None, None, "white")


def squares(places: list[tuple[float, float] | None], side: int = 64) -> np.ndarray:
    """A red square on white at these centres, in sides; none where there is None."""
    frames = np.full((len(places), side, side, 3), 245, np.uint8)
    for frame, place in zip(frames, places, strict=True):
        if place is not None:
            left, top = (round(side * (centre - 0.1)) for centre in place)
            frame[max(0, top) : top + 13, max(0, left) : left + 13] = (220, 40, 40)
    return frames


LINE = np.linspace(0, 1, 17)


@pytest.mark.parametrize(
    ("places", "shape", "motion"),
    [
        ([(0.2 + 0.5 * t, 0.5) for t in LINE], "square", "right"),
        ([(0.2 + 0.5 * t, 0.5) if t < 0.7 else None for t in LINE], None, None),  # it vanishes
        ([(0.2, 0.5) if t < 0.5 else (0.7, 0.5) for t in LINE], "square", None),  # it jumps
        ([(0.2 + 0.5 * t, 0.2 + 0.45 * t) for t in LINE], "square", None),  # neither right nor down
        ([(0.4 + 0.1 * t, 0.5) for t in LINE], "square", None),  # hardly any motion
        ([(0.3 + 0.2 * t + 0.3 * np.sin(6.3 * t), 0.5) for t in LINE], "square", None),  # there and back
    ],
)
def test_only_a_steady_motion_in_one_way_counts(
    places: list[tuple[float, float] | None], shape: Shape | None, motion: Motion | None
) -> None:
    assert judge(squares(places)) == Verdict("red", shape, motion, "white")


def test_a_wrong_video_matches_nothing_else() -> None:
    scene = Scene("red", "square", "left", "blue")
    seen = Verdict("red", "circle", "right", "blue")
    assert seen.matches(scene) == {"colour": True, "shape": False, "motion": False, "background": True}


def test_the_tally_counts_properties_and_each_shape_and_motion() -> None:
    scenes = held_out_scenes()[:3]
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    right = [Shown(scene, Verdict(**vars(scene)), None, frames) for scene in scenes]
    wrong = Shown(scenes[0], Verdict(None, None, None, "none"), None, frames)
    counts = tally([*right, wrong])
    assert counts["colour"] == counts["shape"] == (3, 4)
    assert sum(many for name, (_, many) in counts.items() if name.startswith("shape: ")) == 4
    assert contact_sheet([*right, wrong]).size[1] > 2 * 16


def test_a_first_frame_says_nothing_of_the_motion() -> None:
    pictures: dict[tuple[str, ...], np.ndarray] = {}
    for scene in all_scenes():
        words = scene.colour, scene.shape, scene.background
        assert np.array_equal(pictures.setdefault(words, first_frame(scene, 64)), first_frame(scene, 64))
    for scene in held_out_scenes():
        picture = first_frame(scene, 64).astype(int)
        border = np.concatenate([picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)])
        assert np.ptp(border, axis=0).max() == 0, scene


def test_psnr_and_ssim_are_the_textbooks() -> None:
    reference = torch.zeros(2, 3, 16, 16)
    other = reference.clone()
    other[1] = 51.0
    found = compare(reference, other, peak=255.0)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / (51**2 / 2)))
    assert found.worst_psnr == pytest.approx(10 * math.log10(25))
    # Two flat frames: SSIM is its luminance term alone, (2ab + c1) / (a^2 + b^2 + c1).
    c1 = (0.01 * 255) ** 2
    assert found.ssim == pytest.approx((1 + c1 / (51**2 + c1)) / 2, rel=1e-4)
    assert (found.equal, found.largest) == (False, 51.0)
    same = compare(reference, reference, peak=255.0)
    assert (same.equal, same.psnr) == (True, None)
    assert same.ssim == pytest.approx(1)
    flat = compare(torch.ones(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), peak=0.0)
    assert (flat.equal, flat.psnr, flat.ssim) == (False, None, None)
    assert compare(reference[..., :8, :8], other[..., :8, :8], 255.0).ssim is None


def test_files_are_compared_or_refused(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    Video(torch.zeros(1), frames, fps=8).save(tmp_path / "a.mp4")
    Video(torch.zeros(1), frames[:4], fps=8).save(tmp_path / "b.mp4")
    assert compare_files(tmp_path / "a.mp4", tmp_path / "a.mp4").equal
    latents = torch.randn(16, 5, 16, 16)
    save_file({"latents": latents}, tmp_path / "a.safetensors")
    save_file({"latents": latents + 0.01}, tmp_path / "b.safetensors")
    save_file({"other": latents}, tmp_path / "c.safetensors")
    save_file({"latents": latents * math.nan}, tmp_path / "d.safetensors")
    for suffix, largest in ((".webp", 0), (".gif", 255)):
        Video(torch.zeros(1), frames, fps=8).save(tmp_path / f"a{suffix}")
        assert compare_files(tmp_path / f"a{suffix}", tmp_path / "a.webp").largest <= largest
    found = compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.largest == pytest.approx(0.01, rel=1e-3)
    (tmp_path / "text.mp4").write_text("no video")
    for one, two, rule in (
        ("a.mp4", "b.mp4", "one length and size"),
        ("a.mp4", "a.safetensors", "two files of one kind"),
        ("a.safetensors", "c.safetensors", "holds no 'latents'"),
        ("a.safetensors", "d.safetensors", "not finite"),
        ("a.mp4", "text.mp4", "cannot be read"),
        ("a.mp4", "nothing.mp4", "cannot be read"),
        ("a.safetensors", "nothing.safetensors", "cannot be read"),
    ):
        with pytest.raises(InvalidRequest, match=rule):
            compare_files(tmp_path / one, tmp_path / two)


def test_compare_from_the_command_line(tmp_path: Path) -> None:
    save_file({"latents": torch.ones(16, 5, 16, 16)}, tmp_path / "a.safetensors")
    files = [str(tmp_path / "a.safetensors")] * 2
    command = [sys.executable, "-m", "cineline", "eval", "compare", *files, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "equal yes, largest difference 0" in done.stdout
    assert "PSNR none" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["equal"], found["psnr"]) == (True, None)
