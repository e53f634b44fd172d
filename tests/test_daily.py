"""What people do every day: seeds, pictures, batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instant_line import InstantEngine
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image
from toy_family import ToySpec

from cineline import Engine, InvalidRequest, OutputError, ParallelConfig, Video, VideoRequest
from cineline.cli import main
from cineline.cli.batch import Outputs, Task, check_tasks
from cineline.cli.files import settle_files
from cineline.core.image import Fit, fitted, fitting
from cineline.core.request import DRAWN_BELOW, IMAGES
from cineline.engine.folder import SnapshotFolder
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec
from cineline.media.about import read_about
from cineline.media.video import frames_writer

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}


def small(**fields: Any) -> VideoRequest:
    return VideoRequest(**{"prompt": "a cat", **SMALL, **fields})


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint(RandomConfig("ti2v", seed=3))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, ParallelConfig(pp=2), device="cpu") as opened:
        yield opened


def test_the_largest_seed_has_diffusers_bits(engine: Engine, folder: Path, oracle: Oracle) -> None:
    request = small(seed=2**64 - 1)
    assert_equal(engine.submit(request).result(60), oracle.run(folder, "float32", request))


def test_several_videos_have_the_bits_of_as_many_requests(engine: Engine, folder: Path, oracle: Oracle) -> None:
    handles = engine.submit_all(small(seed=7, num_videos=3))
    assert [handle.job.seed for handle in handles] == [7, 8, 9]
    for seed, handle in enumerate(handles, 7):
        assert_equal(handle.result(60), oracle.run(folder, "float32", small(seed=seed)))


def test_one_handle_is_of_one_video(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="num_videos=2 are as many requests: use Engine"):
        engine.submit(small(num_videos=2))


def test_seeds_that_would_be_too_large_are_refused_before_any_is_queued(engine: Engine) -> None:
    before = engine.submit(small(num_frames=1, decode=False)).job.id
    with pytest.raises(InvalidRequest, match=r"seed=18446744073709551616 is out of range"):
        engine.submit_all(small(seed=2**64 - 2, num_videos=3))
    assert engine.submit(small(num_frames=1, decode=False)).job.id == before + 1


def test_a_random_seed_is_drawn_once_and_kept(tmp_path: Path) -> None:
    with Engine(ToySpec(), device="cpu", snapshot_dir=tmp_path / "kept") as engine:
        handles = [engine.submit(small(seed="random", num_inference_steps=1000)) for _ in range(2)]
        several = engine.submit_all(small(seed="random", num_videos=2, num_inference_steps=1000))
        seeds = [handle.job.seed for handle in (*handles, *several)]
        assert len(set(seeds)) == 4  # by chance alike once in a billion runs
        assert all(0 <= seed <= DRAWN_BELOW for seed in seeds)
        assert seeds[3] == seeds[2] + 1
    kept = SnapshotFolder(tmp_path / "kept")
    assert [each.request.seed for each in kept.unfinished()] == seeds
    kept.close(10)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", "any", "seed='any' cannot be used: it is no whole number: give one, or random"),
        ("seed", 1.5, "seed=1.5 cannot be used"),
        ("num_videos", 0, "num_videos=0 cannot be used: it is not from 1 to 10000"),
        ("num_videos", "2", "num_videos='2' cannot be used: it is no number"),
    ],
)
def test_what_is_no_seed_or_number_of_videos_is_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        small(**{field: value})


def test_a_task_becomes_one_for_each_video(folder: Path) -> None:
    spec = WanSpec.open(folder)
    tasks = [
        Task(small(num_videos=2, seed=5), Path("a.mp4"), Path("a.safetensors")),
        Task(small(seed="random"), Path("b.mp4"), None, 2),
        Task(small(), Path("c.mp4"), None, 3),
    ]
    made = settle_files(spec, tasks, None, Outputs(None, None, None), True)[0]
    assert [task.video and task.video.name for task in made] == ["a-1.mp4", "a-2.mp4", "b.mp4", "c.mp4"]
    assert [task.latents and task.latents.name for task in made[:2]] == ["a-1.safetensors", "a-2.safetensors"]
    assert [task.request.seed for task in made[:2]] == [5, 6]
    assert isinstance(made[2].request.seed, int)
    assert made[3] == tasks[2]


def test_several_videos_count_from_the_models_own_seed(tmp_path: Path, folder: Path) -> None:
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "cineline.json").write_text('{"seed": 40}')
    tasks = [Task(small(num_videos=2), Path("a.mp4"), None)]
    made, _ = settle_files(WanSpec.open(tmp_path), tasks, None, Outputs(None, None, None), True)
    assert [task.request.seed for task in made] == [40, 41]


def test_a_line_whose_seeds_are_too_large_is_named(folder: Path) -> None:
    spec, file = WanSpec.open(folder), Path("lines.jsonl")
    wanted = [Task(small(seed=2**64 - 1, num_videos=2), Path("a.mp4"), None, 4)]
    tasks, _ = settle_files(spec, wanted, file, Outputs(None, None, None), True)
    with pytest.raises(InvalidRequest, match=r"'lines.jsonl', line 4: seed=18446744073709551616 is out of range"):
        check_tasks(spec, tasks, file)


@pytest.fixture
def cineline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs `cineline generate` in an empty folder, with an engine that is done at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["cineline.cli.generate"], "Engine", InstantEngine)
    monkeypatch.setattr(sys.modules["cineline.cli.generate"], "POLL_S", 0.0)
    monkeypatch.setattr("cineline.engine.sink.save_latents", lambda latents, path, about: path.write_text("latents"))
    sizes = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    def run(*words: str) -> tuple[str, str]:
        """What it prints: the files, and what it says."""
        monkeypatch.setattr(sys, "argv", ["cineline", "generate", "--model", str(folder), *sizes, *words])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr()
        return said.out, said.err

    return run


Cineline = Callable[..., tuple[str, str]]


def test_one_frame_becomes_a_picture(cineline: Cineline, tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "JPEG", "webp"):
        out, _ = cineline("a cat", "--num-frames", "1", "--output", f"a.{suffix}")
        assert out == f"a.{suffix}\n"
        with Image.open(tmp_path / f"a.{suffix}") as picture:
            assert picture.size == (32, 32)
            assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - 90).max() <= (suffix in ("jpg", "JPEG"))
            assert not getattr(picture, "is_animated", False)


def test_several_frames_are_no_picture(cineline: Cineline, tmp_path: Path) -> None:
    out, said = cineline("a cat", "--output", "a.png")
    assert out == ""
    assert "'a.png' is a picture, and num_frames=5: use num_frames=1, a video's suffix" in said
    with pytest.raises(OutputError, match="is a picture, and num_frames=2"):
        Video(torch.zeros(1), np.zeros((2, 8, 8, 3), np.uint8), 8).save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_frames_become_a_folder_of_pngs(cineline: Cineline, tmp_path: Path) -> None:
    assert cineline("a cat", "--output", "shots/")[0] == "shots\n"
    assert sorted(path.name for path in (tmp_path / "shots").iterdir()) == [
        f"000{number}.png" for number in range(1, 6)
    ]
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    Video(torch.zeros(1), frames, 8).save(f"{tmp_path}/shots/")  # in their place
    read = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "shots").iterdir())]
    assert np.array_equal(np.stack(read), frames)
    assert [path.name for path in tmp_path.iterdir()] == ["shots"]


def test_a_folder_with_anything_else_is_left_alone(cineline: Cineline, tmp_path: Path) -> None:
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "notes.txt").write_text("mine")
    out, said = cineline("a cat", "--output", "shots/", "--overwrite")
    assert (out, "'shots' holds more than frames ('notes.txt')" in said) == ("", True)
    (tmp_path / "a").write_text("a file")
    assert "'a' is a file, not a folder of frames" in cineline("a cat", "--output", "a/")[1]
    assert [path.name for path in (tmp_path / "shots").iterdir()] == ["notes.txt"]


def test_frames_that_cannot_all_be_written_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "0001.png").write_text("old")
    with pytest.raises(OutputError, match="No space left"), frames_writer(tmp_path / "shots") as write:
        write(np.zeros((1, 8, 8, 3), np.uint8))
        raise OSError(28, "No space left on device")
    assert [path.read_text() for path in (tmp_path / "shots").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["shots"]


def test_the_line_that_show_prints_gives_the_same_bits(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    request = VideoRequest(
        prompt="a cat\u2028", image=picture, height=32, width=64, num_frames=5, num_inference_steps=2, seed="random"
    )
    made = engine.submit(request).result(60)
    made.save(tmp_path / "a.mp4")
    monkeypatch.setattr(sys, "argv", ["cineline", "show", str(tmp_path / "a.mp4")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code is None
    printed = capsys.readouterr()
    line = json.loads(printed.out)
    assert "It needs --image, whose pixels are not in the file: size and SHA-256 32x32 " in printed.err
    assert "a model without a public name" in printed.err
    assert made.frames is not None
    assert_equal(engine.submit(VideoRequest(**line, image=picture)).result(60), (made.latents, made.frames))
    for private in (str(engine.spec.folder), engine.spec.folder.name, str(tmp_path), "/"):  # type: ignore[attr-defined]
        assert private not in json.dumps(read_about(tmp_path / "a.mp4"))


@pytest.fixture(scope="module")
def i2v(checkpoint: Checkpoint) -> Path:
    return checkpoint(RandomConfig("i2v", seed=3))


@pytest.fixture(scope="module")
def image_engine(i2v: Path) -> Iterator[Engine]:
    with Engine(i2v, ParallelConfig(pp=2), device="cpu") as opened:
        yield opened


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pictured(**fields: Any) -> VideoRequest:
    """With scales, which diffusers has other defaults for."""
    return small(**{"image": picture(1), "guidance_scale": 3.0, "guidance_scale_2": 2.0, **fields})


def test_beside_an_image_the_prompt_may_be_empty(image_engine: Engine, i2v: Path, oracle: Oracle) -> None:
    request = pictured(prompt="")
    assert_equal(image_engine.submit(request).result(60), oracle.run(i2v, "float32", request))


def test_an_empty_prompt_alone_is_refused(cineline: Cineline) -> None:
    words = "is empty: describe the video in at least one word, or give an image"
    assert words in cineline(" ")[1]
    assert "There is no prompt: give one, an --image" in cineline()[1]
    picture(1).save("a.png")
    assert cineline("--image", "a.png", "--output", "a.mp4")[0] == "a.mp4\n"


def test_float16_has_diffusers_bits(checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(RandomConfig("t2v", seed=3))
    request = small(guidance_scale=4.0, guidance_scale_2=3.0)
    with Engine(folder, ParallelConfig(pp=2), device="cpu", dtype="float16", vae_dtype="float16") as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(folder, "float16", request, "float16"))


@pytest.mark.parametrize(
    ("fit", "width", "height"), [("crop", 50, 32), ("crop", 20, 48), ("pad", 50, 32), ("pad", 20, 48)]
)
def test_an_image_in_another_shape_is_cropped_or_padded(
    fit: Fit, width: int, height: int, image_engine: Engine, i2v: Path, oracle: Oracle
) -> None:
    given = picture(1, width, height)
    ready = fitted(given, 32, 32, fit)
    assert ready.size == (32, 32)
    handle = image_engine.submit(pictured(image=given, fit=fit))
    assert_equal(handle.result(60), oracle.run(i2v, "float32", pictured(image=ready)))
    bits = oracle.run(i2v, "float32", pictured(image=given))
    assert_equal(image_engine.submit(pictured(image=given)).result(60), bits)  # stretched, as diffusers does
    assert not handle.result().latents.equal(bits[0])


def test_what_becomes_of_an_image_is_said() -> None:
    def said(width: int, height: int, fit: Fit) -> str:
        return fitting(Image.new("RGB", (width, height)), 64, 32, fit)

    assert said(64, 32, "pad") == "image 64x32"
    assert said(128, 64, "crop") == "image 128x64 scaled"
    assert said(100, 100, "crop") == "image 100x100 cropped to 100x50"
    assert said(300, 100, "crop") == "image 300x100 cropped to 200x100"
    assert said(100, 100, "pad") == "image 100x100 scaled to 32x32 and padded"
    assert said(256, 64, "pad") == "image 256x64 scaled to 64x16 and padded"
    assert said(100, 100, "stretch") == "image 100x100 stretched 2.00 times as wide"
    assert said(400, 100, "stretch") == "image 400x100 stretched 2.00 times as high"


def test_padding_is_black_and_cropping_keeps_the_middle() -> None:
    white = Image.new("RGB", (10, 10), "white")
    padded = np.asarray(fitted(white, 40, 20, "pad"))
    assert padded[:, :10].max() == 0 and padded[:, 30:].max() == 0 and padded[:, 10:30].min() == 255
    bars = np.zeros((10, 40, 3), np.uint8)
    bars[:, 15:25] = 255
    assert np.asarray(fitted(Image.fromarray(bars), 10, 10, "crop")).min() == 255


def test_another_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="fit='fill' is not known: use 'stretch', 'crop' or 'pad'"):
        small(fit="fill")


@pytest.mark.parametrize("frames", [5, 9])
def test_a_video_between_two_images_has_diffusers_bits(
    frames: int, image_engine: Engine, i2v: Path, oracle: Oracle
) -> None:
    request = pictured(last_image=picture(2, 40, 20), num_frames=frames)
    made = image_engine.submit(request).result(60)
    assert_equal(made, oracle.run(i2v, "float32", request))
    assert not made.latents.equal(oracle.run(i2v, "float32", pictured(num_frames=frames))[0])


def test_a_last_image_is_fitted_as_the_first(image_engine: Engine, i2v: Path, oracle: Oracle) -> None:
    given = picture(2, 50, 32)
    handle = image_engine.submit(pictured(last_image=given, fit="crop"))
    ready = pictured(last_image=fitted(given, 32, 32, "crop"))
    assert handle.fitting == ", image 32x32, last image 50x32 cropped to 32x32"
    assert_equal(handle.result(60), oracle.run(i2v, "float32", ready))


def test_a_last_image_stands_in_for_split_experts_too(i2v: Path, oracle: Oracle) -> None:
    request = pictured(last_image=picture(2))
    with Engine(i2v, ParallelConfig(pp=2, expert_placement="split"), device="cpu") as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(i2v, "float32", request))


def test_a_last_image_where_there_can_be_none_is_refused(engine: Engine, image_engine: Engine) -> None:
    for request, words in (
        (pictured(last_image=picture(2), num_frames=1), "has no room for a last_image behind the first one: use 5"),
        (pictured(image=None, last_image=picture(2)), "needs an image"),
        (pictured(last_image=Path("no.png")), "last_image='no.png' cannot be read"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            image_engine.submit(request)
    with pytest.raises(InvalidRequest, match="takes no last_image: leave it out"):
        engine.submit(small(image=picture(1), last_image=picture(2)))


def test_both_images_are_kept_with_a_request(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "kept")
    request = VideoRequest(prompt="x", image=picture(1), last_image=picture(2))
    folder.add(ToySpec().resolve(request, 0), request, {})
    folder.close(10)
    again = SnapshotFolder(tmp_path / "kept")
    (kept,) = again.unfinished()
    again.close(10)
    for name in IMAGES:
        assert getattr(kept.request, name).tobytes() == getattr(request, name).tobytes()
