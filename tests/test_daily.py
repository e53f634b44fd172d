"""Seeds, several videos of a request: what people do every day."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import Checkpoint, Oracle, assert_equal
from toy_family import ToySpec

from cineline import Engine, InvalidRequest, ParallelConfig, VideoRequest
from cineline.cli.batch import Task, check_tasks, split_tasks
from cineline.core.request import DRAWN_BELOW
from cineline.engine.folder import SnapshotFolder
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec

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
    made = split_tasks(spec, tasks, None)
    assert [task.video and task.video.name for task in made] == ["a-1.mp4", "a-2.mp4", "b.mp4", "c.mp4"]
    assert [task.latents and task.latents.name for task in made[:2]] == ["a-1.safetensors", "a-2.safetensors"]
    assert [task.request.seed for task in made[:2]] == [5, 6]
    assert isinstance(made[2].request.seed, int)
    assert made[3] is tasks[2]


def test_several_videos_count_from_the_models_own_seed(tmp_path: Path, folder: Path) -> None:
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "cineline.json").write_text('{"seed": 40}')
    made = split_tasks(WanSpec.open(tmp_path), [Task(small(num_videos=2), Path("a.mp4"), None)], None)
    assert [task.request.seed for task in made] == [40, 41]


def test_a_line_whose_seeds_are_too_large_is_named(folder: Path) -> None:
    spec, file = WanSpec.open(folder), Path("lines.jsonl")
    tasks = split_tasks(spec, [Task(small(seed=2**64 - 1, num_videos=2), Path("a.mp4"), None, 4)], file)
    with pytest.raises(InvalidRequest, match=r"'lines.jsonl', line 4: seed=18446744073709551616 is out of range"):
        check_tasks(spec, tasks, file)
