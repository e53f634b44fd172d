"""Files: a video that plays everywhere, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from cineline import OutputError, Video
from cineline.core.output import whole_file
from cineline.core.request import Branch, Kind, WorkItem
from cineline.core.trace import Slice, write_trace


def colours(frames: int) -> np.ndarray:
    """Frames that are red on the left, blue on the right and grow brighter."""
    picture = np.zeros((frames, 48, 64, 3), dtype=np.uint8)
    picture[:, :, :32, 0] = np.linspace(60, 250, frames, dtype=np.uint8)[:, None, None]
    picture[:, :, 32:, 2] = np.linspace(60, 250, frames, dtype=np.uint8)[:, None, None]
    return picture


@pytest.mark.parametrize(("suffix", "tolerance"), [(".webp", 0), (".gif", 8)])
def test_an_animation_shows_the_frames_at_their_rate_without_end(suffix: str, tolerance: int, tmp_path: Path) -> None:
    frames = colours(9)
    Video(torch.zeros(1), frames, fps=8).save(tmp_path / f"a{suffix}")
    decoded = []
    with Image.open(tmp_path / f"a{suffix}") as animation:
        for picture in ImageSequence.Iterator(animation):
            decoded.append(np.asarray(picture.convert("RGB")).astype(int))
            assert picture.info["duration"] in (120, 125, 130)  # GIF counts in 10 ms
        assert animation.info["loop"] == 0
    assert np.abs(np.stack(decoded) - frames).max() <= tolerance


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_video_is_h264_yuv420p_with_the_frames_colours_and_rate(suffix: str, tmp_path: Path) -> None:
    frames = colours(9)
    path = tmp_path / f"a{suffix}"
    Video(torch.zeros(1), frames, fps=24).save(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 24
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    away_from_edges = np.r_[4:28, 36:60]
    difference = np.abs(decoded.astype(int) - frames)[:, 4:-4, away_from_edges]
    assert difference.mean() < 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="stopped at its latents"):
        Video(torch.zeros(1), None, fps=24).save(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match=r"use .mp4"):
        Video(torch.zeros(1), colours(1), fps=24).save(tmp_path / "a.avi")
    with pytest.raises(OutputError, match="does not exist"):
        Video(torch.zeros(1), colours(1), fps=24).save(tmp_path / "no" / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half(temporary: Path, error: Exception) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(OutputError, match="No space left"), whole_file(path) as temporary:
        write_half(temporary, OSError(28, "No space left on device"))
    with pytest.raises(KeyError), whole_file(path) as temporary:
        write_half(temporary, KeyError())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_has_a_row_a_stage_and_a_slice_a_work_item(tmp_path: Path) -> None:
    item = WorkItem(Kind.DENOISE, 3, 7, Branch.UNCOND)
    slices = [Slice(1, item, 5_000, 9_000, 1_000), Slice(0, WorkItem(Kind.DECODE, 3, 2), 2_000, 4_000, 0)]
    write_trace(slices, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["rank 0", "rank 1"]
    first, second = (event for event in events if event["ph"] == "X")
    assert (first["name"], first["tid"], first["ts"], first["dur"]) == ("r3 decode 2", 0, 0.0, 2.0)
    assert (second["name"], second["tid"], second["ts"], second["dur"]) == ("r3 step 7 uncond", 1, 3.0, 4.0)
