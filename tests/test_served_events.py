"""Streams of events without an engine: what they ask of the store, and that they tell every end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cineline.server import events
from cineline.server.events import Events
from cineline.server.files import new_id
from cineline.server.keys import Client
from cineline.server.line import LineView
from cineline.server.service import Service
from cineline.server.store import NewJob, Store

SAID = {"model": "m", "prompt": "a", "size": "32x32", "seconds": "1", "num_frames": 5, "fps": 8}
SAID |= {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1, "priority": "normal"}
ME = Client("me")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "jobs.sqlite3")
    yield made
    made.close()


@pytest.fixture
def service(store: Store) -> Service:
    made = Service.__new__(Service)
    made.stopping, made._store, made._open = False, store, {}
    made._dispatcher = SimpleNamespace(running={}, engine=None)  # type: ignore[assignment]
    made.line = LineView(made._dispatcher)
    return made


def add(store: Store, owner: str = "me") -> str:
    job = new_id()
    store.add(NewJob(job, owner, "normal", 1.0, {"prompt": "a"}, [], SAID))
    return job


def test_looks_at_jobs_that_do_not_change_read_no_rows(
    store: Store, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [add(store) for _ in range(3)]
    for _ in range(3):
        add(store, "other")
    read: list[int] = []
    ask = store._ask

    def counted(question: str, values: Sequence[Any] = ()) -> Any:
        rows = ask(question, values)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(store, "_ask", counted)
    seen = [service.open_jobs(ME) for _ in range(5)]
    assert all([video.id for video in each] == jobs for each in seen)
    assert read == [3]  # one look, of the client's own
    store.start(jobs[0])
    store.complete(jobs[0], 1, 60.0)
    assert [video.id for video in service.open_jobs(ME)] == jobs[1:]


def test_a_look_asks_for_no_previews_of_jobs_that_wait(
    store: Store, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    monkeypatch.setattr(service, "preview", lambda *_: pytest.fail("It waits."))
    told = listen(service, [lambda: None] * 3)
    assert [name for name, _ in told] == ["video", "line"]


def listen(service: Service, happening: Sequence[Callable[[], object]]) -> list[tuple[str, Any]]:
    """What a stream tells where these things happen, one before each look."""
    told: list[tuple[str, Any]] = []

    async def run() -> None:
        stream: AsyncIterator[Any] = Events(service)._all(ME)
        async for event in stream:
            told.append((event.event, json.loads(event.data)))

    left = iter(happening)

    async def sleep(seconds: float) -> None:
        following = next(left, None)
        if following is None:
            service.stopping = True
        else:
            following()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        asyncio.run(run())
    return told


def test_every_end_is_told_once_also_of_a_job_that_no_look_has_seen(store: Store, service: Service) -> None:
    def finished() -> str:
        job = add(store)
        store.start(job)
        store.complete(job, 1, 60.0)
        return job

    finished()  # before anybody listens
    jobs: list[str] = []
    open_job, deleted = add(store), add(store)

    def end() -> None:
        store.start(open_job)
        store.fail(open_job, "x", "y", 60.0)

    happening: list[Callable[[], object]] = [
        lambda: jobs.append(finished()),
        lambda: None,
        lambda: jobs.append(finished()),
        end,
        lambda: None,
    ]
    happening += [end, lambda: None, lambda: store.remove(deleted), lambda: None]
    told = listen(service, happening)
    ends = [(each["id"], each["status"]) for name, each in told if name == "video" and each["status"] in events.ENDS]
    assert ends == [(jobs[0], "completed"), (jobs[1], "completed"), (open_job, "failed")]
    assert [each["id"] for name, each in told if name == "deleted"] == [deleted]
