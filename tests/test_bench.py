"""`cineline bench`: what counts as a run, and that each command prints and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from oracle import Checkpoint
from served import small_model

from cineline import VideoRequest
from cineline.bench import measure
from cineline.bench.line import LineCase
from cineline.bench.measure import CpuClock, Run, Summary, interleave, ratios, run_quietly
from cineline.cli import main
from cineline.families.wan.random_checkpoint import RandomConfig


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_clock_tells_our_cpu_and_our_childrens_from_others() -> None:
    clock = CpuClock()
    (busy, ours), code = clock.read(), "import time\nwhile time.process_time() < 0.5: pass"
    burn(0.3)
    subprocess.run([sys.executable, "-c", code], check=True)
    busy_after, ours_after = clock.read()
    assert 0.7 < ours_after - ours < 2
    assert busy_after - busy > 0.7


def test_a_run_is_repeated_while_others_use_the_machine_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = iter([0.5, 0.2, 0.01])
    seconds = iter([3.0, 2.0, 1.0])
    busy = 0.0

    class Clock:
        def read(self) -> tuple[float, float]:
            return busy, 0.0

    def arm() -> float:
        nonlocal busy
        time.sleep(0.05)
        busy += next(shares) * 0.05 * (psutil.cpu_count() or 1)
        return next(seconds)

    monkeypatch.setattr(measure, "CpuClock", Clock)
    run = run_quietly(arm)
    assert (run.seconds, run.repeats) == (1.0, 2)
    assert run.others < 0.03


def test_arms_take_turns_in_an_order_that_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "OTHERS_LIMIT", float("inf"))  # the arms take no time at all

    def arm(name: str) -> float:
        order.append(name)
        return 1.0

    arms = {name: partial(arm, name) for name in "abc"}
    runs = interleave(arms, 2, lambda line: None)
    assert "".join(order) == "abcbca"
    assert {name: len(own) for name, own in runs.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_taken_round_by_round() -> None:
    base, arm = [Run(4.0, 0), Run(9.0, 0), Run(8.0, 0)], [Run(2.0, 0), Run(3.0, 0), Run(2.0, 0)]
    assert ratios(base, arm) == Summary(3.0, 2.0, 4.0)


def bench_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cineline", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """In this one, each run once, however much others use the machine: a new process and its ranks load for seconds."""
    monkeypatch.setattr(measure, "OTHERS_LIMIT", float("inf"))
    monkeypatch.setattr(sys, "argv", ["cineline", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_schedule_prints_and_writes_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.json"
    sizes = ["--stage-ms", "5", "--hidden-mb", "0.1", "--steps", "3", "--runs", "2"]
    bench(monkeypatch, "schedule", "--pp", "3", "--in-flight", "1,2", *sizes, "--json", str(file))
    result = json.loads(file.read_text())
    assert {count: len(runs) for count, runs in result["runs"].items()} == {"1": 2, "2": 2}
    assert all(run["seconds"] >= 3 * (3 + 1) * 0.005 for run in result["runs"]["1"])
    assert "torch" in result["machine"]
    assert "1.50" in capsys.readouterr().out  # 2MP / (P + 1)


def test_schedule_runs_waves_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.json"
    sizes = ["--stage-ms", "5", "--hidden-mb", "0.1", "--steps", "4", "--branches", "1", "--runs", "1"]
    bench(monkeypatch, "schedule", "--pp", "2", "--in-flight", "3", "--waves", "4", *sizes, "--json", str(file))
    result = json.loads(file.read_text())
    ((run,),), (base,) = result["runs"].values(), result["one_stage"]
    assert run["seconds"] >= 4 * 3 * 4 * 0.005  # each stage's, for 12 requests
    share = float(capsys.readouterr().out.split("2.00 │")[1].split("(")[0])  # of the limit M P / max(M, P)
    assert base["seconds"] >= 5 * 4 * 2 * 0.005  # 5 requests on one stage
    assert share == pytest.approx(100 * (12 / 5) * base["seconds"] / run["seconds"] / 2, abs=0.01)


def test_schedule_skips_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.json"
    sizes = ["--stage-ms", "5", "--hidden-mb", "0.1", "--steps", "10", "--runs", "1", "--skip-share", "0.5"]
    bench(monkeypatch, "schedule", "--pp", "2", "--in-flight", "2", *sizes, "--json", str(file))
    result = json.loads(file.read_text())
    ((run,),), (base,) = result["runs"].values(), result["one_stage"]
    assert run["seconds"] >= 5 * 2 * 2 * 0.005  # each stage's, for 2 requests: 5 of 10 steps
    assert base["seconds"] >= 10 * 2 * 2 * 0.005  # one request on one stage, which skips none
    assert "4.00" in capsys.readouterr().out  # twice what the line allows


def test_exact_says_what_is_equal(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    folder = str(checkpoint(RandomConfig("t2v", seed=3)))
    done = bench_in_a_process("exact", "--model", folder, "--arm", "pp=2", "--in-flight", "3", "--json", str(file))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["axes"], row["latents"], row["frames"], row["requests"], row["deviation"]) == ("pp=2", 3, 3, 3, 0.0)


def small_requests(case: LineCase, count: int) -> list[VideoRequest]:
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": case.steps}
    return [VideoRequest(prompt="x", seed=seed, decode=False, cache=case.cache, **sizes) for seed in range(count)]


def test_recovery_times_snapshots_beside_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    monkeypatch.setattr(LineCase, "requests", small_requests)
    bench(monkeypatch, "recovery", "--in-flight", "2", "--steps", "3", "--runs", "2", "--json", str(file))
    runs = json.loads(file.read_text())["runs"]
    assert {name: len(own) for name, own in runs.items()} == {"none": 2, "in memory": 2, "on disk too": 2}
    assert "throughput" in capsys.readouterr().out


def test_line_times_all_arms_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "l.json"
    monkeypatch.setattr(LineCase, "requests", small_requests)
    bench(monkeypatch, "line", "--in-flight", "2", "--steps", "2", "--runs", "1", "--json", str(file))
    assert json.loads(file.read_text())["runs"]["2"].keys() == {"diffusers", "pp=1", "pp=2"}
    assert "x diffusers" in capsys.readouterr().out


def test_line_skips_steps_here_and_in_diffusers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LineCase, "requests", small_requests)
    bench(monkeypatch, "line", "--in-flight", "1", "--steps", "5", "--runs", "1", "--cache", "mag:0.1")
    assert "5 steps of which 3 are skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["line", "--in-flight", "1,x"], "in_flight='1,x'"),
        (["line", "--kind", "t2v", "--cache", "mag"], "cache='mag' is for kind='ti2v'"),
        (["line", "--kind", "sora"], "kind='sora'"),
        (["schedule", "--in-flight", "0"], "in_flight='0'"),
        (["exact", "--json", "no/such/folder/x.json"], "does not exist"),
        (["exact", "--model", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_option_is_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cineline", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    assert words in capsys.readouterr().err


def test_serve_times_clients_beside_a_batch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "v.json"
    model = small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path)
    options = ["--model", str(model), "--clients", "2", "--steps", "8", "--runs", "1", "--asks", "5"]
    done = bench_in_a_process("serve", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    asked = "clients, while somebody asks"
    assert {name: len(runs) for name, runs in result["runs"].items()} == {"a batch": 1, "clients": 1, asked: 1}
    assert 0 < len(result["answers_s"]["list"]) <= 5 * (1 + result["runs"][asked][0]["repeats"])
    assert "99 %" in done.stdout
