"""Files: a video that plays everywhere, written whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instant_line import InstantEngine
from PIL import Image, ImageSequence
from safetensors.torch import load
from test_streams import file_limit
from toy_family import ToySpec

from cineline import CheckpointError, CinelineError, OutputError, RankFailed, RequestHandle, Video, VideoRequest
from cineline.cli.batch import Task, check_tasks
from cineline.cli.generate import _run, _told
from cineline.core.output import VIDEO_SUFFIXES, is_changed, time_of, whole_file
from cineline.core.request import Branch, Kind, WorkItem
from cineline.core.streams import console
from cineline.core.trace import Slice, write_trace
from cineline.engine.handle import Ticket
from cineline.engine.hub import open_model
from cineline.engine.sink import Sink
from cineline.errors import shown
from cineline.media.compare import _video
from cineline.media.video import frames_writer, write_video


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


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 50), st.integers(1, 60))
def test_a_gif_shows_each_frame_when_it_is_due(tmp_path_factory: Any, fps: int, count: int) -> None:
    """Within the 5 ms that its clock of 1/100 s allows, and never for so short that players make it longer."""
    ends = np.cumsum(delays(tmp_path_factory.mktemp("gif") / "a.gif", fps, count))
    assert np.abs(ends - 1000 * np.arange(1, count + 1) / fps).max() <= 5
    assert np.diff(ends, prepend=0).min() >= 20


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1000), st.integers(2, 60))
def test_a_webp_shows_each_frame_when_it_is_due(tmp_path_factory: Any, fps: int, count: int) -> None:
    ends = np.cumsum(delays(tmp_path_factory.mktemp("webp") / "a.webp", fps, count))
    assert np.abs(ends - 1000 * np.arange(1, count + 1) / fps).max() <= 0.5


def delays(path: Path, fps: int, count: int) -> list[float]:
    """Of an animation's frames, in ms."""
    frames = np.zeros((count, 8, 8, 3), dtype=np.uint8)
    frames[..., 0] = (np.arange(count) * 4)[:, None, None]
    Video(torch.zeros(1), frames, fps).save(path)
    with Image.open(path) as animation:
        found = []
        for picture in ImageSequence.Iterator(animation):
            picture.load()  # WebP's says it only then
            found.append(picture.info["duration"])
        return found


@given(st.integers(51, 1000))
def test_a_gif_is_refused_at_rates_that_players_do_not_show(fps: int) -> None:
    path = Path("a.gif")
    with pytest.raises(OutputError, match=f"fps={fps}: a .gif has 50 at most"):
        Video(torch.zeros(1), colours(1), fps).save(path)
    task = Task(VideoRequest(prompt="x", fps=fps), path, None)
    with pytest.raises(OutputError, match=f"fps={fps}: a .gif has 50 at most"):
        check_tasks(open_model(None), [task], None)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_writing_a_video_prints_nothing(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for fps in (1, 24, 50):
        Video(torch.zeros(1), colours(5), fps).save(tmp_path / f"a{suffix}")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


NAMES = st.binary(min_size=1, max_size=20).map(lambda name: os.fsdecode(name.replace(b"\0", b"0").replace(b"/", b"_")))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([None, *VIDEO_SUFFIXES]), st.booleans(), st.integers(0, 9000), NAMES, st.integers(1, 12))
def test_on_a_full_disk_each_file_is_whole_or_not_there(
    tmp_path_factory: Any, suffix: str | None, latents: bool, room: int, name: str, count: int
) -> None:
    folder = tmp_path_factory.mktemp("full")
    video = None if suffix is None else folder / f"{name}{suffix}"
    tensors = folder / f"{name}.safetensors" if latents or video is None else None
    frames = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    job = ToySpec().resolve(VideoRequest(prompt="x", fps=24), 0)
    ticket = Ticket(job)
    ticket._chunks = list(np.split(frames, [count // 2])) if video and count > 1 else []
    left = None if ticket._chunks or video is None else frames
    wanted = torch.randn(1, 10 * count)
    ticket.future.set_result(Video(wanted, left, 24))
    sink = Sink(RequestHandle(ticket, lambda *_: False), video, tensors)
    there: list[Path] = []
    with file_limit(room):
        try:
            sink.update()
            there = sink.finish()
        except OutputError as error:
            assert error is sink.failed
            sink.give_up(error)
    assert sorted(folder.iterdir()) == sorted(there)
    assert set(there) | set(sink.missing) == {video, tensors} - {None}
    assert not set(there) & set(sink.missing)
    assert (sink.failed is None) == (not sink.missing)
    assert sink.failed is None or any(shown(path) in str(sink.failed) for path in sink.missing)
    assert sink.failed is None or "File too large" in str(sink.failed)
    if tensors in there and tensors is not None:
        assert load(tensors.read_bytes())["latents"].equal(wanted)
    if tensors is not None and room > 200 + 40 * count:
        assert tensors in there  # whatever became of the video
    if video in there and video is not None:
        assert len(list(_video(video))) == count


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_a_batch_goes_on_and_says_what_was_not_made(tmp_path_factory: Any, possible: list[bool]) -> None:
    folder = tmp_path_factory.mktemp("batch")
    tasks = []
    for number, right in enumerate(possible):
        path = folder / str(number) / f"{number}.gif"
        if right:
            path.parent.mkdir()
        tasks.append(Task(VideoRequest(prompt="x", num_frames=1), path, None))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), patch("cineline.cli.generate.POLL_S", 0.0):
        engine = InstantEngine(ToySpec())
        unmade = _run([engine.submit(task.request, task.outputs) for task in tasks], True, console())
    made = [task.video for task, right in zip(tasks, possible, strict=True) if right]
    assert out.getvalue() == "".join(f"{path}\n" for path in made)
    assert sorted(path for path in folder.glob("*/*")) == sorted(path for path in made if path)
    lost = [task.video for task, right in zip(tasks, possible, strict=True) if not right]
    assert list(unmade) == lost
    if lost:
        told = str(_told(unmade))
        assert str(lost[0].parent) in told if lost[0] else False
        assert f"; not made: {shown(lost[0].name)}" in told if lost[0] else False


@given(
    st.lists(NAMES.map(Path), min_size=1, max_size=9, unique=True),
    st.sampled_from([OutputError("Full: make room."), RankFailed(1, "it died"), CheckpointError("Bad: get another.")]),
)
def test_what_was_not_made_is_told_in_one_sentence(paths: list[Path], kind: CinelineError) -> None:
    error = copy.copy(kind)
    told = _told(dict.fromkeys(paths, error))
    names = ", ".join(shown(path.name) for path in paths[:5])
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    assert told is error and str(told) == f"{str(kind).removesuffix('.')}; not made: {names}{more}."
    assert "\n" not in str(told)


def test_a_single_file_that_the_error_names_is_not_told_twice() -> None:
    error = OutputError(f"{shown(Path('a.mp4'))} cannot be written: make room.")
    assert str(_told({Path("a.mp4"): error})) == "'a.mp4' cannot be written: make room."


def frames_at(path: Path, grey: int, count: int = 2) -> None:
    write_video(np.full((count, 8, 8, 3), grey, np.uint8), 8, path, as_folder=True)


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_frames_take_the_place_of_older_ones_through_a_link(tmp_path: Path) -> None:
    frames_at(tmp_path / "real", 1, 3)
    (tmp_path / "link").symlink_to("real")
    frames_at(tmp_path / "link", 2)
    assert sorted(contents(tmp_path / "real")) == ["0001.png", "0002.png"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "real"]


def test_what_comes_into_a_folder_while_frames_are_made_stays(tmp_path: Path) -> None:
    frames_at(tmp_path / "own", 1)
    with frames_writer(tmp_path / "own") as write:
        write(np.full((1, 8, 8, 3), 2, np.uint8))
        (tmp_path / "own" / "notes.txt").write_text("mine")
        (tmp_path / "own" / "sub").mkdir()
    assert sorted(contents_of(tmp_path / "own")) == ["0001.png", "notes.txt", "sub"]
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["own"]


def contents_of(path: Path) -> list[str]:
    return [each.name for each in path.iterdir()]


def test_a_folder_whose_place_cannot_be_taken_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_at(tmp_path / "own", 1)
    before = contents(tmp_path / "own")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "own" and "old" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="cannot be written"):
        frames_at(tmp_path / "own", 2)
    assert contents(tmp_path / "own") == before
    assert contents_of(tmp_path) == ["own"]


def test_what_a_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".own.{os.getpid()}").mkdir()
    frames_at(tmp_path / "own", 1)
    assert contents_of(tmp_path) == ["own"]


def test_a_folder_is_changed_by_new_frames_alone(tmp_path: Path) -> None:
    frames_at(tmp_path / "own", 1)
    before = time_of(tmp_path / "own")
    (tmp_path / "own" / ".DS_Store").touch()
    (tmp_path / "own" / ".DS_Store").unlink()
    assert not is_changed(tmp_path / "own", before)
    frames_at(tmp_path / "own", 1)
    assert is_changed(tmp_path / "own", before)


def test_the_same_frames_make_the_same_file(tmp_path: Path) -> None:
    """Of a size for which libx264's code for AVX-512 makes several, in memory that has been used."""
    chance = np.random.default_rng(2)
    blocks = np.kron(chance.normal(128, 50, (9, 20, 26, 3)), np.ones((1, 8, 8, 1)))
    frames = (blocks + chance.normal(0, 20, blocks.shape)).clip(0, 255).astype(np.uint8)
    found = set()
    for _ in range(12):
        used = [
            np.frombuffer(chance.bytes(int(size)), np.uint8).copy() for size in chance.integers(1_000, 3_000_000, 8)
        ]
        del used
        write_video(frames, 8, tmp_path / "a.mp4")
        found.add((tmp_path / "a.mp4").read_bytes())
    assert len(found) == 1
