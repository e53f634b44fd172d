"""A request that no device can hold is refused at once, with the planner's numbers, and no other notices."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import Checkpoint
from toy_family import ToySpec

from cineline import Engine, InvalidConfig, InvalidRequest, ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig, Place
from cineline.core.hardware import Device
from cineline.core.request import Job
from cineline.engine.room import ANY_LINK, Room
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec

AXES: list[dict[str, Any]] = [{"pp": 1}, {"pp": 3}, {"pp": 2, "cfg": 2}]


WORDS = r"^64x64 with 4001 frames needs \d+\.\d GB on the device of stage \d, \d+\.\d GB more than its 0\.5 GB: use a "


def wan(frames: int = 5, **fields: Any) -> VideoRequest:
    return VideoRequest(prompt="a cat", height=64, width=64, num_frames=frames, num_inference_steps=2, **fields)


def prepared(checkpoint: Checkpoint, axes: dict[str, Any]) -> tuple[WanSpec, ParallelConfig, DeviceConfig, Job]:
    spec, config = WanSpec.open(checkpoint(RandomConfig())), DeviceConfig()
    parallel = spec.place(ParallelConfig(**axes))
    return spec, parallel.filled(spec.cut(parallel, config)), config, spec.resolve(wan(), 0)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_it_fits_to_the_byte(axes: dict[str, Any], checkpoint: Checkpoint) -> None:
    spec, parallel, config, job = prepared(checkpoint, axes)
    line = spec.line(parallel, [Device("any", 0.0)] * parallel.pp, ANY_LINK, job)
    peaks = [line.peak_bytes(Place(pp=stage), 0) for stage in range(parallel.pp)]
    Room(spec, parallel, config, [float(max(peaks))] * parallel.ranks).check(job)
    with pytest.raises(InvalidRequest, match=f"on the device of stage {peaks.index(max(peaks))}, 0.0 GB more"):
        Room(spec, parallel, config, [max(peaks) - 1.0] * parallel.ranks).check(job)


def test_ranks_that_share_a_device_share_its_memory(checkpoint: Checkpoint) -> None:
    spec, parallel, config, job = prepared(checkpoint, {"pp": 3})
    line = spec.line(parallel, [Device("any", 0.0)] * 3, ANY_LINK, job)
    total = sum(line.peak_bytes(Place(pp=stage), 0) for stage in range(3))
    Room(spec, parallel, config, [float(total)]).check(job)
    with pytest.raises(InvalidRequest, match="needs"):
        Room(spec, parallel, config, [total - 1.0]).check(job)


def test_what_is_not_known_refuses_nothing(checkpoint: Checkpoint) -> None:
    spec, parallel, config, job = prepared(checkpoint, {"pp": 1})
    Room(spec, parallel, config, []).check(job)
    Room(spec, parallel, replace(config, text_encoder="cpu"), [1.0]).check(job)
    Room(ToySpec(), parallel, config, [1.0]).check(ToySpec().resolve(wan(), 0))


def test_an_engine_refuses_what_is_too_large_and_goes_on(checkpoint: Checkpoint) -> None:
    spec, parallel, _, job = prepared(checkpoint, {"pp": 2})
    line = spec.line(parallel, [Device("any", 0.0)] * 2, ANY_LINK, job)
    enough = (max(line.peak_bytes(Place(pp=stage), 0) for stage in range(2)) + 1) / 1e9
    with Engine(spec, ParallelConfig(pp=2), device="cpu", memory_gb=enough) as engine:
        right = engine.submit(wan())
        with pytest.raises(InvalidRequest, match=WORDS):
            engine.submit(wan(frames=4001))
        after = engine.submit(wan())
        assert right.result(60).latents.equal(after.result(60).latents)
        assert (right.job.id, after.job.id) == (0, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_memory_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(InvalidConfig, match=r"memory_gb=\S+ is no finite number above 0: give GB, or leave it out\.$"):
        DeviceConfig(memory_gb=value)


def test_a_line_that_is_too_large_leaves_the_other_lines_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    spec, parallel, _, job = prepared(checkpoint, {"pp": 1})
    line = spec.line(parallel, [Device("any", 0.0)], ANY_LINK, job)
    enough = (line.peak_bytes(Place(), 0) + 1) / 1e9
    fields = wan().model_dump(exclude_none=True)
    lines = [json.dumps(fields | {"num_frames": frames}) for frames in (fields["num_frames"], 4001, 1)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    options = ["--requests", str(tmp_path / "lines.jsonl"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "cineline", "generate", "--model", spec.folder, "--memory-gb", repr(enough), *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "with 4001 frames needs" in done.stderr and "0002.mp4" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.mp4", "0003.mp4"]


def test_a_memory_beside_a_text_encoder_elsewhere_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"memory_gb=1\.0 is held against a resident text encoder"):
        DeviceConfig(memory_gb=1.0, text_encoder="cpu")
