"""A service that ends in whatever way loses no job and makes none twice, and the bits are those of an engine."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import commit
from lora_files import truth, write
from oracle import Checkpoint
from served import (
    LIMIT_S,
    ServerProcess,
    answering,
    create,
    delay,
    get,
    served,
    serving,
    small_model,
    wait_done,
    wait_ready,
)
from test_server import generated

from cineline import Engine, InvalidRequest, ModelFiles, OutputError, ParallelConfig, RankFailed, VideoRequest
from cineline.core.faults import VARIABLE
from cineline.core.request import Job
from cineline.engine import sink
from cineline.engine.room import Room
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.media.video import video_writer
from cineline.server import files
from cineline.server.run import opened
from cineline.server.settings import ServeConfig
from cineline.server.store import Store

STEP_S = 0.1

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path_factory.mktemp("model"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts services, none of which outlives a test that fails."""
    started: list[ServerProcess] = []

    def one(*arguments: Any, **options: Any) -> ServerProcess:
        started.append(ServerProcess(*arguments, **options))
        return started[-1]

    yield one
    for server in started:
        if server.process.poll() is None:
            server.kill()


def all_jobs(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {
        video["id"]: video for video in client.get("/v1/videos", params={"limit": 100, "order": "asc"}).json()["data"]
    }


def fields_of(number: int, steps: int) -> dict[str, Any]:
    """Of one of several that differ."""
    return {"prompt": f"cat {number}", "seed": number, "num_frames": 5 + 4 * (number % 2), "num_inference_steps": steps}


def assert_all_made(client: httpx.Client, jobs: list[str], model: Path, data: Path, steps: int, place: Path) -> None:
    wanted = generated(model, place, [VideoRequest(**fields_of(number, steps)) for number in range(len(jobs))])
    for job, content in zip(jobs, wanted, strict=True):
        assert wait_done(client, job, 4 * LIMIT_S)["status"] == "completed"
        assert client.get(f"/v1/videos/{job}/content").content == content
    assert list(all_jobs(client)) == jobs
    assert sorted(path.stem for path in (data / "videos").iterdir()) == sorted(jobs)
    assert not list((data / "inputs").iterdir())


def steps_of(client: httpx.Client) -> dict[str, int]:
    """Of the jobs that are being denoised."""
    return {job: video["step"] for job, video in all_jobs(client).items() if video["phase"] == "denoising"}


def assert_gone_on(client: httpx.Client, before: dict[str, int]) -> None:
    """At most a step is done again."""
    for job, step in before.items():
        assert get(client, job)["step"] >= step - 1


@pytest.mark.real_start
@pytest.mark.parametrize(("kills", "count", "steps"), [(1, 5, 8), pytest.param(20, 10, 40, marks=pytest.mark.serve)])
def test_a_service_that_is_killed_and_one_that_is_told_to_end_lose_no_job_and_make_none_twice(
    kills: int, count: int, steps: int, start: Start, model: Path, tmp_path: Path
) -> None:
    chance, data = random.Random(commit()), tmp_path / "data"
    options = ("--pp", "2", "--in-flight", "2", "--keep-for", "1h", "--grace", "20s")
    server = start(model, data, *options, step_s=STEP_S)
    jobs = [create(server.client, **fields_of(number, steps))["id"] for number in range(count)]
    finished: dict[str, int] = {}
    for kill in range(kills):
        before: dict[str, int] = {}
        if kill % 4 != 3:  # else while it loads
            wait_ready(server.client)
        until = time.monotonic() + chance.uniform(0.5, 3.0)
        while time.monotonic() < until:
            found = all_jobs(server.client)
            assert list(found) == jobs
            before = steps_of(server.client)
            for job, video in found.items():
                assert video["status"] in ("queued", "in_progress", "completed"), video
                if video["status"] == "completed":
                    finished.setdefault(job, (data / "videos" / f"{job}.mp4").stat().st_mtime_ns)
        server.kill()
        server = start(model, data, *options, step_s=STEP_S)
        if before:
            wait_ready(server.client)
            assert_gone_on(server.client, before)
    wait_ready(server.client)
    second = [sys.executable, "-m", "cineline", "serve", "--model", str(model), "--data-dir", str(data), "--port", "0"]
    refused = subprocess.run(second, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert refused.returncode == 2 and "is in use by another service" in refused.stderr
    before = steps_of(server.client)
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 20
    with serving(model, data, pp=1) as client:  # on another line
        assert_gone_on(client, before)
        assert_all_made(client, jobs, model, data, steps, tmp_path)
    assert not list((data / "snapshots").glob("0*"))
    for job, changed in finished.items():
        assert (data / "videos" / f"{job}.mp4").stat().st_mtime_ns == changed


@pytest.mark.real_start
def test_what_a_model_is_made_of_is_given_as_to_generate_and_stays_until_its_jobs_are_done(
    start: Start, model: Path, tmp_path: Path
) -> None:
    data, files = tmp_path / "data", ModelFiles(vae=model / "vae" / "diffusion_pytorch_model.safetensors")
    lora = f"style={write(truth(model, 1), 'diffusers', tmp_path / 'lora.safetensors')}@0.5"
    given = ["--vae", str(files.vae), "--lora-mode", "runtime", "--skip-guidance-at-one", "--pp", "2"]
    server = start(model, data, *given, "--lora", lora)
    asks: list[dict[str, Any]] = [{"prompt": "a cat", "loras": ["style@2"]}, {"prompt": "a cat", "loras": []}]
    jobs = [create(server.client, **fields)["id"] for fields in asks]
    refused = server.client.post("/v1/videos", json={"prompt": "a cat", "loras": ["other"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loras")
    found = []
    for job in jobs:
        assert wait_done(server.client, job)["status"] == "completed"
        found.append(server.client.get(f"/v1/videos/{job}/content").content)
    jobs.append(create(server.client, prompt="a dog", num_inference_steps=5_000)["id"])
    assert server.terminate() == 0
    engine = Engine(model, ParallelConfig(pp=2), device="cpu", files=files, loras=[lora], lora_mode="runtime")
    requests = [VideoRequest(**fields, skip_guidance_at_one=True) for fields in asks]
    assert found == generated(engine, tmp_path, requests) and found[0] != found[1]
    other = [sys.executable, "-m", "cineline", "serve", "--model", str(model), "--data-dir", str(data), "--port", "0"]
    told = subprocess.run([*other, *given], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert told.returncode == 2 and "1 jobs are not done that were taken for" in told.stderr
    with sqlite3.connect(data / "jobs.sqlite3") as stored:
        assert all(json.loads(row[0])["skip_guidance_at_one"] for row in stored.execute("SELECT request FROM jobs"))
    stored.close()


def test_a_file_that_is_there_completes_its_job_and_one_that_is_not_whole_does_not(model: Path, tmp_path: Path) -> None:
    """As after an end between the file's name and the job's state, or of the host within the file."""
    data = tmp_path / "data"
    with serving(model, data) as client:
        jobs = [create(client, **fields_of(number, 4))["id"] for number in range(3)]
        for job in jobs:
            wait_done(client, job)
    with sqlite3.connect(data / "jobs.sqlite3") as jobs_there:
        jobs_there.execute("UPDATE jobs SET state = 'in_progress', completed_at = NULL, nbytes = 0")
    jobs_there.close()
    paths = [data / "videos" / f"{job}.mp4" for job in jobs]
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: len(content) // 2])
    paths[2].unlink()
    before = paths[0].stat().st_mtime_ns
    with serving(model, data) as client:
        assert_all_made(client, jobs, model, data, 4, tmp_path)
    assert paths[0].stat().st_mtime_ns == before


def test_what_these_devices_cannot_hold_any_more_fails_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has a snapshot, and one that waits; the service goes on with the other, and is free of them later."""
    data = tmp_path / "data"
    with serving(model, data, step_s=0.05, in_flight=2) as client:
        jobs = [create(client, **fields_of(number, 12))["id"] for number in range(6)]
        while min(get(client, job)["step"] for job in jobs[:2]) < 3:
            time.sleep(0.01)

    def check(room: Room, job: Job) -> None:
        if job.seed in (1, 5):
            raise InvalidRequest("It needs 2 GB: use a smaller size.")

    with monkeypatch.context() as patch:
        patch.setattr(Room, "check", check)
        with serving(model, data, in_flight=2) as client:
            for number, job in enumerate(jobs):
                done = wait_done(client, job)
                if number in (1, 5):
                    assert (done["status"], done["error"]["code"]) == ("failed", "invalid_request")
                else:
                    assert done["status"] == "completed"
    assert not list((data / "snapshots").glob("0*"))


def test_a_full_disk_refuses_new_jobs_and_keeps_the_old(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, tmp_path / "data", step_s=0.05, in_flight=1) as client:
        done, running = create(client)["id"], create(client, num_inference_steps=8)["id"]
        wait_done(client, done)
        with monkeypatch.context() as full:
            full.setattr(files, "RESERVE", 2**62)
            answer = client.post("/v1/videos", json={"prompt": "a cat"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
            assert wait_done(client, running)["status"] == "completed"
            assert client.get(f"/v1/videos/{done}/content").status_code == 200
        assert wait_done(client, create(client)["id"])["status"] == "completed"


def test_finished_jobs_go_when_their_time_is_over_or_they_take_too_much(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", keep_for="1s") as client:
        job = create(client)["id"]
        assert wait_done(client, job)["expires_at"] is not None
        deadline = time.monotonic() + LIMIT_S
        while all_jobs(client):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not list((tmp_path / "data" / "videos").iterdir())
    with serving(model, tmp_path / "data", keep_bytes="1B") as client:
        jobs = [create(client, seed=seed)["id"] for seed in range(3)]
        deadline = time.monotonic() + LIMIT_S
        while list(all_jobs(client)) != jobs[2:] or get(client, jobs[2])["status"] != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_engine_that_ends_ends_the_service_and_its_jobs_wait(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times: then those that ran each time have failed."""
    data, job = tmp_path / "data", ""
    kill = {"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2}
    monkeypatch.setenv(VARIABLE, json.dumps([*json.loads(delay(0.05)), kill]))
    for _ in range(3):
        with (
            opened(served(model, 2, restarts=0), ServeConfig(port=0, data_dir=data)) as server,
            httpx.Client(base_url=server.address, timeout=LIMIT_S) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            made = None if job else pool.submit(create, client)
            with pytest.raises(RankFailed, match="jobs that are not done go on with the next start"):
                server.answer()
            job = job if made is None else made.result(LIMIT_S)["id"]
    monkeypatch.delenv(VARIABLE)
    with serving(model, data) as client:
        failed = get(client, job)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "rank_failed")
        assert wait_done(client, create(client)["id"])["status"] == "completed"


def test_a_video_that_cannot_be_written_is_made_once_more_and_fails_at_the_third_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def writer(path: Path, fps: int, about: str | None) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OutputError("No space.")
        return video_writer(path, fps, about)

    monkeypatch.setattr(sink, "video_writer", writer)
    with serving(model, tmp_path / "data") as client:
        for left, status in ((2, "completed"), (3, "failed")):
            done = wait_done(client, create(client, seed=left)["id"])
            assert done["status"] == status
        assert done["error"] == {"code": "storage_failed", "message": "No space."}
        assert wait_done(client, create(client)["id"])["status"] == "completed"
    assert not list((tmp_path / "data" / "snapshots").glob("0*"))


def test_while_the_service_ends_no_jobs_are_taken(model: Path, tmp_path: Path) -> None:
    config = ServeConfig(port=0, data_dir=tmp_path / "data")
    with opened(served(model, 1), config) as server, answering(server) as client:
        waiting = create(client)["id"]
        server._service.stopping = True
        assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
        refused = client.post("/v1/videos", json={"prompt": "a cat"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert int(refused.headers["retry-after"]) > 0
        assert get(client, waiting)["id"] == waiting


def test_a_state_that_cannot_be_written_is_tried_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, failures = Store.complete, iter([sqlite3.OperationalError("database or disk is full"), OSError("full")])

    def complete_later(store: Store, job: str, nbytes: int, keep_s: float) -> bool:
        for failure in failures:
            raise failure
        return complete(store, job, nbytes, keep_s)

    monkeypatch.setattr(Store, "complete", complete_later)
    with serving(model, tmp_path / "data") as client:
        jobs = [create(client, **fields_of(number, 4))["id"] for number in range(2)]
        assert_all_made(client, jobs, model, tmp_path / "data", 4, tmp_path)
