"""What the page is made of, without a browser: its files, the line's slices, what the model takes, a job's settings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from oracle import Checkpoint
from served import LIMIT_S, create, serving, small_model, wait_done
from toy_family import ToySpec

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.core.request import Branch, Kind, WorkItem
from cineline.core.trace import Slice, slice_name
from cineline.engine import recent
from cineline.engine.hub import open_model
from cineline.engine.recent import Recent
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.server import owners
from cineline.server.keys import Client
from cineline.server.line import KEPT_S, LineView
from cineline.server.model import takes_of
from cineline.server.owners import Owners
from cineline.server.page_files import page_files

KEY = "a key of sixteen or more"
Row = tuple[int, str, int, str, float, float]
"""Rank, kind, number, branch, and from when to when, in microseconds."""


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path_factory.mktemp("model"))


@contextmanager
def listening(client: httpx.Client) -> Iterator[list[tuple[str, Any]]]:
    """What `/v1/events` tells meanwhile."""
    told: list[tuple[str, Any]] = []
    over = threading.Event()

    def listen() -> None:
        with client.stream("GET", "/v1/events") as answer:
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    told.append((name, json.loads(line.removeprefix("data: "))))
                if over.is_set():
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        create(client)  # something to be told
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def rows_of(told: list[tuple[str, Any]]) -> dict[str | None, list[list[Any]]]:
    """Slices by job, in the order in which they were told."""
    found: dict[str | None, list[list[Any]]] = {}
    for name, data in list(told):
        for each in data["of"] if name == "slices" else ():
            found.setdefault(each["video"], []).extend(each["slices"])
    return found


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def decodes(rows: list[list[Any]]) -> int:
    return sum(row[1] == "decode" for row in rows)


def test_the_line_s_slices_are_the_trace_s(model: Path, tmp_path: Path) -> None:
    """As the events tell them, and as `--trace` writes them in the end: the same run, the same slices."""
    trace = tmp_path / "trace.json"
    with serving(model, tmp_path / "data", trace=trace) as client:
        with listening(client) as told:
            jobs = [create(client, seed=seed)["id"] for seed in (1, 2)]
            for job in jobs:
                assert wait_done(client, job)["status"] == "completed"
            # two ranks, two chunks: all that a job has was told when its last chunk's are
            wait_for(lambda: all(decodes(rows_of(told).get(job, [])) == 4 for job in jobs))
            found = rows_of(told)
        (last,) = {each["id"] for each in client.get("/v1/videos").json()["data"]} - set(jobs)
        wait_done(client, last)
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    begin_us = min(row[4] for job in jobs for row in found[job])
    for request, job in enumerate(jobs):
        wanted = [each for each in events if each["args"]["request"] == request]
        named = [
            (
                rank,
                f"r{request} step {number} {branch}"
                if kind == "denoise"
                else f"r{request} {kind}" + (f" {number}" if kind == "decode" else ""),
            )
            for rank, kind, number, branch, *_ in found[job]
        ]
        assert sorted(named) == sorted((each["tid"], each["name"]) for each in wanted)
        by_time = sorted(wanted, key=lambda each: (each["tid"], each["ts"]))
        mine = sorted(found[job], key=lambda row: (row[0], row[4]))
        for (*_, start, took, waited), each in zip(mine, by_time, strict=True):
            assert took == each["dur"] and waited / 1000 == pytest.approx(each["args"]["waited_ms"])
            assert start - begin_us == pytest.approx(each["ts"], abs=1.001)  # whole microseconds since 1970


def test_an_engine_that_is_closed_has_told_all_of_its_trace(tmp_path: Path) -> None:
    for live in (True, False):
        trace = tmp_path / "trace.json"
        with Engine(ToySpec(), ParallelConfig(pp=2), device="cpu", trace=trace, live=live) as engine:
            for handle in [engine.submit(VideoRequest(prompt="a", seed=seed)) for seed in range(3)]:
                handle.result(LIMIT_S)
        count, told = engine.recent.since(0)
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
        named = sorted((each.rank, slice_name(each.item)) for each in told)
        assert named == (sorted((event["tid"], event["name"]) for event in events) if live else [])
        assert count == len(told) and events


def test_who_joins_later_is_told_the_last_minute(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data") as client:
        job = create(client)["id"]
        wait_done(client, job)
        with listening(client) as told:
            wait_for(lambda: decodes(rows_of(told).get(job, [])) == 4)
        now_us = next(data["now_us"] for name, data in told if name == "slices")
        assert abs(now_us / 1e6 - time.time()) < LIMIT_S
        line = next(data for name, data in told if name == "line")
        assert [state["rank"] for state in line] == [0, 1]


# The view.


def piece(request: int, end_s: float, rank: int = 0) -> Slice:
    return Slice(
        rank, WorkItem(Kind.DENOISE, request, 3, Branch.UNCOND), int((end_s - 1) * 1e9), int(end_s * 1e9), 5_000
    )


def test_slices_of_others_have_no_name_and_old_ones_are_not_told() -> None:
    known, now = Owners(), time.time()
    known.note(0, SimpleNamespace(id="video_a", owner="me"))  # type: ignore[arg-type]
    known.note(1, SimpleNamespace(id="video_b", owner="other"))  # type: ignore[arg-type]
    slices = Recent()
    slices.add([piece(0, now), piece(1, now), piece(2, now), piece(0, now - KEPT_S - 5)])
    view = LineView(SimpleNamespace(owners=known, engine=SimpleNamespace(recent=slices)))  # type: ignore[arg-type]
    count, told = view.slices(Client("me"), 0)
    row = (0, "denoise", 3, "uncond", int((now - 1) * 1e9) // 1000, pytest.approx(1e6), 5.0)
    assert (count, told) == (4, [{"video": "video_a", "slices": [row]}, {"video": None, "slices": [row, row]}])
    assert view.slices(Client("me"), 4) == (4, [])
    slices.add([piece(0, now, rank=1)])
    assert view.slices(Client("me"), 4)[1] == [{"video": "video_a", "slices": [(1, *row[1:])]}]


def test_the_newest_slices_and_owners_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = Recent()
    slices.add(piece(number, 1.0) for number in range(recent.MOST_SLICES + 3))
    count, found = slices.since(0)
    assert (count, len(found), found[0].item.request) == (recent.MOST_SLICES + 3, recent.MOST_SLICES, 3)
    monkeypatch.setattr(owners, "MOST", 2)
    known = Owners()
    for number in range(3):
        known.note(number, SimpleNamespace(id=f"video_{number}", owner="me"))  # type: ignore[arg-type]
    assert [known.job(number, Client("me")) for number in range(3)] == [None, "video_1", "video_2"]


# Files.


@pytest.fixture(scope="module")
def keyed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.toml").write_text(f'[keys.me]\nkey = "{KEY}"\n')
    with serving(model, folder / "data", api_keys=folder / "keys.toml") as client:
        yield client


def test_the_page_needs_no_key_and_runs_nothing_that_is_not_its_own(keyed: httpx.Client) -> None:
    for path in ["/", *(f"/page/{name}" for name in page_files())]:
        answer = keyed.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert keyed.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        head = keyed.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(answer.content))
    assert keyed.get("/v1/models").status_code == 401


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/a/b"])
def test_nothing_else_is_at_its_place(path: str, keyed: httpx.Client) -> None:
    assert keyed.get(path).status_code == 404
    assert keyed.post("/").status_code == 405


def test_the_page_s_files_name_no_other_host() -> None:
    for name, file in page_files().items():
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and 'src="//' not in text, name
        assert "style=" not in text and "innerHTML" not in text and "<script>" not in text, name


# What the model takes, and what a job was made of.


def test_what_models_take_is_what_their_rules_say(checkpoint: Checkpoint) -> None:
    ti2v = takes_of(open_model("mini-ti2v"), {})
    assert (ti2v.image, ti2v.last_image, ti2v.mini, ti2v.length) == ("may", "no", True, True)
    assert ti2v.defaults["width"] == 128 and ti2v.defaults["num_inference_steps"] == 25
    assert (ti2v.width_step, ti2v.frames_step) == (32, 4)
    names = [each.name for each in ti2v.fields]
    assert names == ["flow_shift", "solver", "preset", "cache", "preview"]
    assert "euler" in ti2v.fields[1].values[0]["enum"]
    i2v = takes_of(open_model(checkpoint(RandomConfig("i2v", seed=3))), {"num_frames": 9})
    assert (i2v.image, i2v.last_image, i2v.mini, i2v.defaults["num_frames"]) == ("must", "may", False, 9)
    assert {"guidance_scale_2", "boundary_ratio", "switch_step"} <= {each.name for each in i2v.fields}
    t2v = takes_of(open_model("mini-t2v"), {})
    assert (t2v.image, t2v.last_image, t2v.mini) == ("no", "no", True)
    toy = takes_of(ToySpec(), {})
    assert (toy.width_step, toy.frames_step, toy.fields, toy.mini) == (1, 1, [], False)


def test_a_job_s_settings_make_it_once_more(keyed: httpx.Client) -> None:
    keyed.headers["Authorization"] = f"Bearer {KEY}"
    given = {"prompt": "a dog", "num_frames": 9, "size": "64x32", "negative_prompt": "a cat", "flow_shift": 4.0}
    first = create(keyed, **given, seed="random")
    settings = keyed.get(f"/v1/videos/{first['id']}/settings").json()
    assert settings["images"] == [] and settings["fields"]["flow_shift"] == 4.0
    assert settings["fields"]["seed"] == first["seed"]
    second = create(keyed, **settings["fields"])
    both = [wait_done(keyed, job["id"]) for job in (first, second)]
    assert [job["status"] for job in both] == ["completed"] * 2
    contents = [keyed.get(f"/v1/videos/{job['id']}/content").content for job in both]
    assert contents[0] == contents[1]
    assert keyed.get("/v1/videos/video_0/settings").status_code == 404
