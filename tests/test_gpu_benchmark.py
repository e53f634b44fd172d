"""`make gpu` where there is no GPU: the small form, its files and its table, gone on with where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

STEPS = ("decoder-ti2v-5b", "waits-ti2v-5b")
ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *steps: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(folder), "--only", *steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_small_form_writes_each_step_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run(tmp_path, STEPS[0])
    first = tmp_path / f"{STEPS[0]}.json"
    written = first.stat().st_mtime_ns
    told = run(tmp_path, *STEPS)
    assert "There is no GPU here" in told
    assert first.stat().st_mtime_ns == written
    decoder, waits = (json.loads((tmp_path / f"{name}.json").read_text()) for name in STEPS)
    assert decoder["complete"] and decoder["device"] == "cpu" and "torch" in decoder["machine"]
    arms = {row["arm"]: row for row in decoder["rows"]}
    assert list(arms) == [
        "diffusers",
        *(f"slice {stage} of {count}" for count in (1, 4) for stage in range(1, count + 1)),
    ]
    assert arms["slice 1 of 1"]["equal"] and arms["slice 4 of 4"]["equal"]
    assert {row["arm"] for row in waits["rows"]} >= {"ADMIT", "ENCODE", "DENOISE 0 COND", "FINISH 0", "DECODE 0"}
    table = (tmp_path / "table.md").read_text()
    assert table in told
    assert all(f"| {step} | {arm} |" in table for step, arm in [(STEPS[0], "diffusers"), (STEPS[1], "ADMIT")])


def test_what_the_cpu_has_done_a_gpu_does_again(tmp_path: Path) -> None:
    from benchmarks.gpu.__main__ import _complete

    (tmp_path / "waits-ti2v-5b.json").write_text(json.dumps({"complete": True, "device": "cpu"}))
    assert _complete(tmp_path, "waits-ti2v-5b", "cpu")
    assert not _complete(tmp_path, "waits-ti2v-5b", "cuda")
    assert not _complete(tmp_path, "waits-t2v-a14b", "cpu")
