"""A run that ended goes on from its snapshot folder, on any line, with the bits of one that was not disturbed."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from faulty_family import FaultySpec
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image
from safetensors.torch import load_file
from test_engine import assert_right, request
from toy_family import ToySpec
from toy_reference import toy_reference

from cineline import (
    Engine,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    ParallelConfig,
    RankFailed,
    RequestHandle,
    VideoRequest,
)
from cineline.core.faults import VARIABLE
from cineline.core.request import Job
from cineline.engine.room import Room
from cineline.families.wan.random_checkpoint import RandomConfig

LIMIT_S = 60.0
STEPS = 12


class Left(Exception):
    """The run ends before it is done."""


def engine(stages: int = 2, **options: Any) -> Engine:
    return Engine(FaultySpec(), ParallelConfig(pp=stages), device="cpu", **options)


def wanted(number: int) -> VideoRequest:
    return request("slow", seed=number, num_inference_steps=STEPS)


def left_in_the_middle(folder: Path, requests: list[VideoRequest], steps: int = 4, **options: Any) -> None:
    with pytest.raises(Left), engine(snapshot_dir=folder, **options) as line:
        handles = [line.submit(one) for one in requests]
        while handles[0].progress[0] < steps:
            time.sleep(0.01)
        raise Left


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def assert_all_right(handles: list[RequestHandle], numbers: range) -> None:
    for handle, number in zip(handles, numbers, strict=True):
        assert_right(handle, wanted(number))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_all_goes_on_on_any_number_of_stages(stages: int, tmp_path: Path) -> None:
    """Those that had not begun, too; what is submitted beside is not mixed up with it."""
    folder = tmp_path / "snapshots"
    left_in_the_middle(folder, [wanted(number) for number in range(8)], in_flight=3)
    assert entries(folder) == [f"{number:04}" for number in range(1, 9)]
    with engine(stages, snapshot_dir=folder, in_flight=4) as line:
        handles = line.resume(folder)
        new = line.submit(wanted(8))
        assert handles[0].progress[0] >= 3
        assert_all_right([*handles, new], range(9))
        assert line.resume(folder) == []
    assert entries(folder) == []


def test_an_engine_without_a_folder_takes_over_one(tmp_path: Path) -> None:
    left_in_the_middle(tmp_path, [wanted(0), wanted(1)])
    with engine(3) as line:
        handles = line.resume(tmp_path)
        with pytest.raises(InvalidConfig, match="is in use by another run"):
            engine(snapshot_dir=tmp_path)
        assert_all_right([*handles, line.submit(wanted(2))], range(3))
    assert entries(tmp_path) == []


def test_it_may_end_again_and_again(tmp_path: Path) -> None:
    left_in_the_middle(tmp_path, [wanted(number) for number in range(3)], steps=3)
    for steps in (6, 9):
        with pytest.raises(Left), engine(2 + steps % 2) as line:
            handles = line.resume(tmp_path)
            assert len(handles) == 3
            while handles[0].progress[0] < steps:
                time.sleep(0.01)
            raise Left
    with engine() as line:
        handles = line.resume(tmp_path)
        assert handles[0].progress[0] >= 8
        assert_all_right(handles, range(3))
    assert entries(tmp_path) == []


def test_an_image_comes_with_its_request(tmp_path: Path, checkpoint: Checkpoint, oracle: Oracle) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    file = tmp_path / "first.png"
    Image.fromarray(pixels).save(file)
    fields: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8}
    one = VideoRequest(prompt="a cat", image=file, guidance_scale=3.0, **fields)
    model, folder = checkpoint(RandomConfig("i2v")), tmp_path / "snapshots"
    with pytest.raises(Left), Engine(model, ParallelConfig(pp=2), device="cpu", snapshot_dir=folder) as line:
        handle = line.submit(one)
        while handle.progress[0] < 3:
            time.sleep(0.001)
        raise Left
    file.unlink()
    with Engine(model, ParallelConfig(pp=2, expert_placement="split"), device="cpu", snapshot_dir=folder) as line:
        (handle,) = line.resume(folder)
        assert handle.progress[0] >= 2
        video = handle.result(LIMIT_S)
    same = one.model_copy(update={"image": Image.fromarray(pixels)})
    assert_equal(video, oracle.run(model, "float32", same))


def test_what_failed_by_a_rank_is_kept_and_what_was_cancelled_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = {"do": "memory", "rank": 1, "at": "before", "kind": "denoise", "number": 3, "request": 1}
    monkeypatch.setenv(VARIABLE, json.dumps([fault]))
    with engine(snapshot_dir=tmp_path) as line:
        handles = [line.submit(wanted(number)) for number in range(4)]
        assert handles[2].cancel()
        assert handles[3].park()
        with pytest.raises(RankFailed):
            handles[1].result(LIMIT_S)
        assert_right(handles[0], wanted(0))
    monkeypatch.delenv(VARIABLE)
    assert entries(tmp_path) == ["0002", "0004"]
    with engine(snapshot_dir=tmp_path) as line:
        handles = line.resume(tmp_path)
        for handle, number in zip(handles, (1, 3), strict=True):
            assert_right(handle, wanted(number))


def test_what_its_caller_has_not_written_is_kept(tmp_path: Path) -> None:
    folder, there, other = tmp_path / "snapshots", tmp_path / "a.mp4", tmp_path / "a.safetensors"
    other.write_text("of a run before")
    with engine(snapshot_dir=folder) as line:
        handles = [line.submit(wanted(number), {"video": there, "latents": other}) for number in range(3)]
        assert_all_right(handles, range(3))
        handles[2].delivered()
        time.sleep(0.5)
    assert entries(folder) == ["0001", "0002"]
    there.write_text("a video")
    with engine(snapshot_dir=folder) as line:
        handles = line.resume(folder)
        assert [handle.outputs for handle in handles] == [{"latents": other}] * 2
        for handle, number in zip(handles, range(2), strict=True):
            video = handle.result(LIMIT_S)  # only the video is there
            assert video.frames is None
            assert video.latents.equal(toy_reference(ToySpec(), wanted(number))[0])
        handles[0].delivered()
    assert entries(folder) == ["0002"]
    os.utime(other)
    with engine(snapshot_dir=folder) as line:
        assert line.resume(folder) == []
    assert entries(folder) == []


def test_what_is_refused_in_resuming_loses_nothing(tmp_path: Path) -> None:
    left_in_the_middle(tmp_path, [wanted(0)])
    entry = tmp_path / "0001" / "request.json"
    text = entry.read_text()
    entry.write_text(text.replace('"steps": ', '"steps": 1'))
    with engine(3, snapshot_dir=tmp_path) as line:
        for _ in range(2):
            with pytest.raises(InvalidConfig, match="Request 0001 began with steps=112"):
                line.resume(tmp_path)
    entry.write_text(text)
    with engine(restarts=0) as line:
        refused = pytest.raises(InvalidConfig, match="takes no snapshots without a folder")
        with refused:
            line.resume(tmp_path)
    with pytest.raises(EngineClosed):
        line.resume(tmp_path)
    (tmp_path / "run.json").unlink()  # as where a process was killed in between
    with engine(restarts=0, snapshot_dir=tmp_path) as line:
        assert_all_right(line.resume(tmp_path), range(1))


def test_what_is_too_large_for_these_devices_stays_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_in_the_middle(tmp_path, [wanted(0), wanted(1), wanted(2)])

    def check(room: Room, job: Job) -> None:
        if job.seed == 1:
            raise InvalidRequest("It needs 2 GB: use a smaller size.")

    with monkeypatch.context() as patch, engine(snapshot_dir=tmp_path) as line:
        patch.setattr(Room, "check", check)
        with engine() as small:
            line._line._check = small._line._check  # looked up where the line is made
        first, second, third = line.resume(tmp_path)
        with pytest.raises(InvalidRequest, match="needs 2 GB"):
            second.result(LIMIT_S)
        assert_right(first, wanted(0))
        assert_right(third, wanted(2))
    assert entries(tmp_path) == ["0002"]
    with engine(3, snapshot_dir=tmp_path) as line:
        (handle,) = line.resume(tmp_path)
        assert_right(handle, wanted(1))


def test_what_is_too_large_goes_where_its_caller_gives_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_in_the_middle(tmp_path, [wanted(0)])

    def check(room: Room, job: Job) -> None:
        raise InvalidRequest("It needs 2 GB: use a smaller size.")

    monkeypatch.setattr(Room, "check", check)
    with engine(snapshot_dir=tmp_path) as line:
        (handle,) = line.resume(tmp_path)
        assert not handle.cancel()
        handle.delivered()
    assert entries(tmp_path) == []


def test_what_would_give_other_bits_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    left_in_the_middle(tmp_path, [wanted(0)])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (FaultySpec(), {"dtype": "bfloat16"}, "was made with dtype='float32', and 'bfloat16' would give other bits"),
        (FaultySpec(), {"vae_dtype": "bfloat16"}, "was made with vae_dtype='float32'"),
        (FaultySpec(layers=4), {}, "is another, or has changed since"),
        (ToySpec(), {}, "is another, or has changed since"),
    ]
    for spec, options, words in cases:
        with pytest.raises(InvalidConfig, match=words):
            Engine(spec, device="cpu", snapshot_dir=tmp_path, **options)
        refused = pytest.raises(InvalidConfig, match=words)
        with Engine(spec, device="cpu", **options) as line, refused:
            line.resume(tmp_path)
    refused = pytest.raises(InvalidConfig, match="cannot be resumed by an engine with snapshot_dir=")
    with engine(snapshot_dir=tmp_path.parent / "other") as line, refused:
        line.resume(tmp_path)
    entry = tmp_path / "0001" / "request.json"
    entry.write_text(entry.read_text().replace('"num_frames": ', '"num_frames": 1'))
    refused = pytest.raises(InvalidConfig, match="Request 0001 began with num_frames=1")
    with engine(snapshot_dir=tmp_path) as line, refused:
        line.resume(tmp_path)
    assert entries(tmp_path) == ["0001"]


def test_a_full_disk_leaves_the_run_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with engine(snapshot_dir=tmp_path) as line:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            handles = [line.submit(wanted(number)) for number in range(3)]
            assert_all_right(handles, range(3))
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (words,) = [message for message in caplog.messages if "Snapshots" in message]
    assert "the run goes on; if it stops, request 0001 cannot be resumed" in words


# The command line.

LINES = 4
COMMAND = [sys.executable, "-m", "cineline", "generate"]
SIZE = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 10}


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint(RandomConfig("ti2v", seed=3))


def batch(folder: Path) -> list[str]:
    """Writes a file of requests; the options that run it."""
    lines = [{"prompt": f"cat {number}", "seed": number, **SIZE} for number in range(LINES)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "out").mkdir()
    out = str(folder / "out")
    return ["--requests", str(folder / "requests.jsonl"), "--output-dir", out, "--save-latents", out]


def environment(seconds: float) -> Mapping[str, str]:
    """Steps that take so long."""
    delay = {"do": "delay", "rank": 0, "at": "before", "kind": "denoise", "seconds": seconds, "times": 100_000}
    return {**os.environ, VARIABLE: json.dumps([delay])}


def ended_by(number: signal.Signals, options: list[str], out: Path) -> None:
    """Run it until the first file is there, and end it then."""
    process = subprocess.Popen(
        [*COMMAND, *options], env=environment(0.1), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + LIMIT_S
    while not list(out.glob("*.mp4")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree if number == signal.SIGKILL else tree[:1]:
        one.send_signal(number)
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert "Go on with: cineline generate --resume" in said
    assert not psutil.wait_procs(tree, timeout=10)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_batch_goes_on_on_two_stages_and_on_three(
    number: signal.Signals, model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    snapshots, out = tmp_path / "snapshots", tmp_path / "out"
    options = ["--model", str(model), "--pp", "2", "--in-flight", "3", *batch(tmp_path)]
    ended_by(number, [*options, "--snapshot-dir", str(snapshots)], out)
    left = entries(snapshots)
    assert 0 < len(left) < LINES
    for stages in ("2", "3") if number == signal.SIGKILL else ("3",):
        place = tmp_path / stages
        shutil.copytree(snapshots, place / "snapshots")
        before = {path: path.stat().st_mtime_ns for path in out.iterdir() if not path.name.startswith(".")}
        command = [*COMMAND, "--resume", str(place / "snapshots"), *(["--pp", stages] if stages == "3" else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == 2 * len(left)
        names = [f"{line:04}.{suffix}" for line in range(1, LINES + 1) for suffix in ("mp4", "safetensors")]
        assert sorted(path.name for path in out.iterdir()) == names
        for path, changed in before.items():
            assert path.stat().st_mtime_ns == changed
        for line in range(LINES):
            one = VideoRequest(prompt=f"cat {line}", seed=line, **SIZE)
            assert load_file(out / f"{line + 1:04}.safetensors")["latents"].equal(oracle.run(model, "float32", one)[0])
        assert entries(place / "snapshots") == []
        for path in set(out.iterdir()) - before.keys():
            path.unlink()


def test_what_is_not_done_is_not_begun_anew_by_mistake(model: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "snapshots"
    options = ["--model", str(model), "--pp", "2", *batch(tmp_path), "--snapshot-dir", str(snapshots)]
    ended_by(signal.SIGKILL, options, tmp_path / "out")
    refused: list[tuple[list[str], str]] = [
        (options, "requests that are not done: go on with them by --resume"),
        (["--resume", str(snapshots), "--dtype", "bfloat16"], "was made with dtype='float32', and 'bfloat16' would"),
        (["--resume", str(snapshots), "--model", "mini-ti2v"], "is another, or has changed since"),
        (["--resume", str(snapshots), "--seed", "3"], "--seed=3 is given beside --resume"),
        (["--resume", str(snapshots), "--output-dir", str(tmp_path)], "is given beside --resume"),
        (["a cat", "--resume", str(snapshots)], "prompt='a cat' is given beside --resume"),
        (["--resume", str(tmp_path)], "has no run.json"),
    ]
    for command, words in refused:
        done = subprocess.run([*COMMAND, *command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") <= 2


def test_torchrun_goes_on_from_the_folder(model: Path, tmp_path: Path, oracle: Oracle) -> None:
    snapshots, latents = tmp_path / "snapshots", tmp_path / "a.safetensors"
    fault = {"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 6}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    script = Path(__file__).parent / "torchrun_chaos.py"
    fields = [word for name, value in SIZE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [
            *(
                sys.executable,
                *torchrun,
                str(script),
                "generate",
                "a cat",
                *fields,
            ),
            *("--model", str(model), "--save-latents", str(latents), "--snapshot-dir", str(snapshots)),
        ],
        env={**os.environ, VARIABLE: json.dumps([fault]), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # A loss costs at most one step: the snapshot after step 5 may still have been on its way when rank 1 was killed.
    assert re.search(r"goes on at step [56]\b", done.stderr), done.stderr
    one = VideoRequest(prompt="a cat", **SIZE)
    assert load_file(latents)["latents"].equal(oracle.run(model, "float32", one)[0])
    assert entries(snapshots) == []
