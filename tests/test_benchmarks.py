"""`python -m benchmarks`: each command, in a short form, prints and writes what it measured."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory, prediction, traffic
from benchmarks.__main__ import app
from benchmarks.calibrate import calibrated
from benchmarks.prediction import PredictionCase
from benchmarks.preview import PreviewCase
from benchmarks.simulator import Constants
from benchmarks.videos import VideosCase
from cineline import ParallelConfig, VideoRequest
from cineline.bench import measure
from cineline.bench.measure import Run
from cineline.cli import run
from cineline.core.config import DeviceConfig
from cineline.families.wan.random_checkpoint import RandomConfig

MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def run_once(monkeypatch: MonkeyPatch) -> None:
    """However much others use the machine."""
    monkeypatch.setattr(measure, "OTHERS_LIMIT", float("inf"))


def found(arguments: str, folder: Path, monkeypatch: MonkeyPatch) -> Any:
    """What a command writes."""
    file = folder / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments.split(), "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert not ended.value.code
    result = json.loads(file.read_text())
    assert result["machine"]["command"].startswith(f"python -m benchmarks {arguments}")
    return result


def test_simulator_says_how_close_it_is(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    sizes = "--stage-ms 5 --hidden-mb 0.1 --runs 1"
    result = found(f"simulator --arm pp=2,cfg=2 --in-flight 1,3 {sizes}", tmp_path, monkeypatch)
    assert result["constants"].keys() == {"send_s", "last_s", "forward_s", "back_s"}
    assert [row["in_flight"] for row in result["rows"]] == [1, 3]
    assert all(row["simulated_s"] > 0.1 and row["runs"] and "error" in row for row in result["rows"])


def test_decode_times_three_ways(tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ways = found("decode --kind ti2v --frames 3 --size 48 --width 16 --runs 1", tmp_path, monkeypatch)["ways"]
    assert list(ways) == ["tail", "layers", "rows"]
    assert (ways["layers"]["equal"], ways["layers"]["difference"]) == (1, 0)
    assert ways["rows"]["equal"] >= 0.999
    assert ways["rows"]["difference"] <= 1
    assert "100.0000%" in capsys.readouterr().out


def test_traffic_counts_what_the_formula_says(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "CASES", (ParallelConfig(pp=2),))
    (row,) = found("traffic", tmp_path, monkeypatch)["rows"]
    assert row["counted"] == row["computed"] > 0


def test_videos_times_every_arm(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(VideosCase, "model", RandomConfig("t2v"))
    monkeypatch.setattr(VideosCase, "requests", lambda case: [small_request()] * case.count)
    result = found("videos --pp 1,2 --requests 2 --steps 1 --runs 1", tmp_path, monkeypatch)
    assert {arm: len(runs) for arm, runs in result["runs"].items()} == {"1": 1, "2": 1}


def test_preview_times_both_arms(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(PreviewCase, "model", RandomConfig("ti2v"))
    one = small_request().model_copy(update={"guidance_scale_2": None})
    monkeypatch.setattr(PreviewCase, "requests", [one] * 2)
    result = found("preview --runs 1", tmp_path, monkeypatch)
    assert {arm: len(runs) for arm, runs in result["runs"].items()} == {"none": 1, "each step": 1}


@pytest.mark.real_start
def test_memory_divides_the_weights(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(memory.THIRDS, "t2v", RandomConfig("t2v", seed=1))
    monkeypatch.setattr(memory, "bare_bytes", nothing)
    one, two = found("memory --pp 2", tmp_path, monkeypatch)["rows"]
    assert 0 < sum(one["read"]) < sum(two["read"]) < 1.05 * sum(one["read"])  # the patch embedding twice
    assert one["share"] == 1
    assert len(two["resident"]) == 2
    assert min(two["resident"]) > 1e7  # the libraries


def test_plan_predicts_seconds_and_bytes(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(PredictionCase, "model", RandomConfig("t2v"))
    monkeypatch.setattr(PredictionCase, "request", lambda case, seed: small_request())
    monkeypatch.setattr(prediction, "_measure", lambda *arguments: ([Run(1.0, 0.0)], [int(2e6)], [1]))
    monkeypatch.setattr(prediction, "calibrate_apart", lambda line, config: calibrated(line, 1e12))
    monkeypatch.setattr(prediction, "measure_constants", lambda case: Constants(0.002, 0.001, 0.001, 0.001))
    (row,) = found("plan --kind t2v --pp 1 --requests 1 --steps 1 --runs 1", tmp_path, monkeypatch)["rows"]
    assert row["predicted_s"] > 0
    assert len(row["weights"]) == len(row["peaks"]) == 1
    assert row["weights"][0] > 1e6


def nothing(folder: Path, kind: str, stages: int, config: DeviceConfig, when: str) -> list[int]:
    """Ranks with next to no model would take half of the time."""
    return [0] * stages


def small_request() -> VideoRequest:
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    return VideoRequest(prompt="x", guidance_scale=4.0, guidance_scale_2=3.0, **sizes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "--kind", "sora"], "kind='sora'"),
        (["decode", "--size", "17"], "use 16 or 32"),
        (["nothing"], "No such command 'nothing': see "),
    ],
)
def test_a_bad_option_is_refused(
    arguments: list[str], words: str, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_page_says_how_long_frames_take(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("The page is measured in Chromium: apt install chromium.")
    arms = found("page --jobs 120 --ranks 3 --seconds 0.5", tmp_path, monkeypatch)["arms"]
    assert arms.keys() == {"1280 px", "390 px"}
    assert all(arm["ms"] and arm["drawn_ms"] and arm["script_ms"] for arm in arms.values())


def test_replicas_times_one_line_and_two(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    sizes = "--requests 3 --steps 2 --stage-ms 5 --pp 1 --in-flight 1 --runs 1"
    runs = found(f"replicas --launcher local {sizes}", tmp_path, monkeypatch)["runs"]
    assert {count: len(own) for count, own in runs.items()} == {"1": 1, "2": 1}
