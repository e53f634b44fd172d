"""Several engines as one: who gets what, what is left when one ends, and that each has numbers of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_family import FaultySpec
from forked_ranks import processes_of
from oracle import Checkpoint
from served import LIMIT_S, answering, create, served, small_model, wait_done
from test_engine import assert_right, request
from toy_family import ToySpec

from cineline import Engine, EngineClosed, InvalidConfig, ParallelConfig, RankFailed
from cineline.cli import main
from cineline.core.config import DeviceConfig
from cineline.engine.auto import replicate
from cineline.engine.replica import VISIBLE, Replica
from cineline.engine.replicas import Replicas, folder_of
from cineline.families.registry import known_model
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.planning.hardware import device_named
from cineline.server.run import opened
from cineline.server.settings import ServeConfig


def pair(folder: Path | None = None, **options: Any) -> Replicas:
    """Two engines of two stages, which end with their first lost rank."""

    def make(replica: Replica) -> Engine:
        own = {"snapshot_dir": folder and folder_of(folder, replica), "restarts": 0} | options
        return Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", replica=replica, **own)

    if folder is not None:
        folder.mkdir(exist_ok=True)
    return Replicas(make, 2)


def test_requests_go_to_the_one_that_has_least_to_do_and_have_one_numbering() -> None:
    with pair() as lines:
        handles = [lines.submit(request("slow", seed=seed, num_inference_steps=20)) for seed in range(3)]
        assert [handle.job.id for handle in handles] == [0, 1, 2]
        handles[1].cancel()
        handles.append(lines.submit(request("slow", seed=3)))
        assert handles[3].job.id == 3  # of the second one, which has nothing to do
        for handle, seed in ((handles[0], 0), (handles[2], 2)):
            assert_right(handle, request("slow", seed=seed, num_inference_steps=20))
        assert_right(handles[3], request("slow", seed=3))
        deadline = time.monotonic() + LIMIT_S
        while not all(state.busy_s for state in lines.ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [state.rank for state in lines.ranks] == [0, 1, 2, 3]
        assert lines.check(request(num_inference_steps=7)).steps == 7
    assert isinstance(lines.failure, EngineClosed)


def test_what_they_have_computed_is_told_as_of_one_line() -> None:
    with pair(live=True) as lines:
        for handle in [lines.submit(request(seed=seed)) for seed in range(2)]:
            handle.result(LIMIT_S)
        engines = list(lines._engines)
    count, found = lines.recent.since(0)
    assert count == len(found) == sum(engine.recent.since(0)[0] for engine in engines)
    assert {(piece.rank, piece.item.request) for piece in found} == {(0, 0), (1, 0), (2, 1), (3, 1)}
    assert lines.recent.since(count) == (count, [])


def test_where_one_ends_the_other_goes_on_until_it_ends_too() -> None:
    with pair() as lines:
        first, second = (lines.submit(request("slow", seed=seed, num_inference_steps=40)) for seed in range(2))
        processes_of(lines._engines[0])[1].kill()
        with pytest.raises(RankFailed):
            first.result(LIMIT_S)
        assert first.is_abandoned and lines.failure is None
        again = [lines.submit(request(seed=seed)) for seed in range(2)]
        assert {handle.job.id % 2 for handle in again} == {1}
        assert_right(second, request("slow", seed=1, num_inference_steps=40))
        assert not second.is_abandoned
        processes_of(lines._engines[1])[0].kill()
        deadline = time.monotonic() + LIMIT_S
        while lines.failure is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(RankFailed):
            lines.submit(request())


def test_where_one_cannot_be_made_none_is_left() -> None:
    made = []

    def make(replica: Replica) -> Engine:
        if replica.number:
            raise InvalidConfig("There is no second one.")
        made.append(Engine(ToySpec(), device="cpu", replica=replica))
        return made[0]

    with pytest.raises(InvalidConfig, match="no second one"):
        Replicas(make, 2)
    assert isinstance(made[0].failure, EngineClosed)


def test_each_goes_on_with_what_its_folder_has(tmp_path: Path) -> None:
    wanted = [request("slow", seed=seed, num_inference_steps=20) for seed in range(4)]
    with pair(tmp_path / "kept") as lines:
        files = [{"video": tmp_path / f"{seed}.mp4"} for seed in range(4)]
        handles = [lines.submit(one, file) for one, file in zip(wanted, files, strict=True)]
        while min(handle.progress[0] for handle in handles) < 5:
            time.sleep(0.01)
        for handle in handles:
            handle.park()
    with pair(tmp_path / "kept") as lines:
        again = lines.resume(tmp_path / "kept")
        assert sorted(handle.outputs["video"].name for handle in again) == [f"{seed}.mp4" for seed in range(4)]
        assert min(handle.progress[0] for handle in again) >= 4
        for handle in again:
            assert_right(handle, wanted[int(handle.outputs["video"].stem)])
            handle.delivered()
    with pair(tmp_path / "kept") as lines:
        assert lines.resume(tmp_path / "kept") == []


def test_what_two_folders_have_goes_on_once(tmp_path: Path) -> None:
    """As after runs with two replicas, with one, and with two."""
    outputs = {"video": tmp_path / "a.mp4"}
    (tmp_path / "kept").mkdir()
    for number, steps in ((0, 3), (1, 6)):
        folder = folder_of(tmp_path / "kept", Replica(number, 2))
        with Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", snapshot_dir=folder) as line:
            handle = line.submit(request("slow", num_inference_steps=20), outputs)
            while handle.progress[0] < steps:
                time.sleep(0.01)
            handle.park()
    with pair(tmp_path / "kept") as lines:
        (handle,) = lines.resume(tmp_path / "kept")
        assert handle.progress[0] >= 5 and handle.job.id == 1
        assert_right(handle, request("slow", num_inference_steps=20))


def test_accelerators_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,5,6,7")
    assert Replica(1, 2).devices(2, "cuda") == {VISIBLE: "6,7"}
    assert Replica(1, 2).devices(2, "cpu") == Replica().devices(4, "cuda") == {}
    with pytest.raises(InvalidConfig, match="3 of 2 ranks need 6 accelerators, and here are 4"):
        Replica(0, 3).devices(2, "cuda")


def test_a_service_keeps_two_lines_at_work(tmp_path: Path, checkpoint: Checkpoint) -> None:
    one = served(small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path), pp=1)

    def make_engine(snapshots: Path) -> Replicas:
        snapshots.mkdir(exist_ok=True)
        return Replicas(
            lambda replica: Engine(
                one.spec, one.parallel, device="cpu", snapshot_dir=folder_of(snapshots, replica), replica=replica
            ),
            2,
        )

    two = replace(one, make_engine=make_engine, replicas=2)
    config = ServeConfig(port=0, data_dir=tmp_path / "data")
    with opened(two, config) as server, answering(server) as client:
        jobs = [create(client, seed=seed)["id"] for seed in range(4)]
        assert all(wait_done(client, job)["status"] == "completed" for job in jobs)
        time.sleep(0.6)  # a beat of the ranks
        text = client.get("/metrics").text
    busy = [line for line in text.splitlines() if line.startswith("cineline_rank_busy_seconds_total")]
    assert len(busy) == 2 and not any(line.endswith(" 0.0") for line in busy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "0"], "replicas='0' is not auto, nor a whole number from 1 to 100"),
        (["--replicas", "1,2"], "replicas='1,2' is not auto"),
        (["--replicas", "auto", "--pp", "2"], "leave out --pp, or give a number"),
        (["--replicas", "auto", "--device", "cpu"], "for CUDA devices, not for the CPU"),
        (["--launcher", "rays"], "launcher='rays' is not known"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cineline", "serve", "--data-dir", str(tmp_path / "data"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_planner_says_how_many() -> None:
    spec = known_model("Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    assert spec is not None
    four = [device_named("NVIDIA L40S", 48e9)] * 4
    parallel, in_flight, count = replicate(spec, DeviceConfig("cuda", "bfloat16"), None, lambda: (four, "pcie4"))
    assert count * parallel.ranks == 4 and count > 1 and in_flight >= 1
