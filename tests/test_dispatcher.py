"""The dispatcher by itself, with an engine that does what a test says: what goes wrong of one job is its own alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from served import LIMIT_S

from cineline import ParallelConfig, VideoRequest
from cineline.errors import CinelineError, RankFailed, RequestCancelled
from cineline.server import dispatcher, files
from cineline.server.dispatcher import Dispatcher
from cineline.server.files import DataFolder, new_id
from cineline.server.metrics import Metrics, Now
from cineline.server.outcomes import Outcomes
from cineline.server.settings import ServeConfig
from cineline.server.store import NewJob, Store

ROOM = 1 + dispatcher.SPARE


class Handle:
    """A request's; `end` ends it."""

    def __init__(self, video: Path, number: int = 0) -> None:
        self.outputs, self.job = {"video": video}, SimpleNamespace(id=number)
        self.done = self.cancelled = False
        self.failed: BaseException | None = None
        self.before_its_end: Callable[[], None] = lambda: None
        self.after_its_file: Callable[[], None] = lambda: None
        self.progress, self.decoded, self.restarts, self.running_phase = (0, 4), (0, 1), 0, "waiting"

    @property
    def phase(self) -> str:
        return "done" if self.done else self.running_phase

    def end(self, failed: BaseException | None = None) -> None:
        self.failed = failed
        self.done = True

    def cancel(self) -> bool:
        self.cancelled = True
        self.end(RequestCancelled("It was cancelled."))
        return True

    def take_previews(self) -> list[Any]:
        return []

    def park(self) -> bool:
        return True

    def delivered(self) -> None:
        pass


class Sink:
    """Writes a file at once."""

    failed = None

    def __init__(self, handle: Handle, video: Path, latents: None) -> None:
        self._handle, self._video = handle, video

    def update(self) -> None:
        pass

    def finish(self) -> None:
        self._handle.before_its_end()
        if self._handle.failed is not None:
            raise self._handle.failed
        self._video.write_bytes(b"0123456789")
        self._handle.after_its_file()

    def give_up(self, error: BaseException) -> None:
        pass


@dataclass
class StubEngine:
    """Takes all.

    Attributes:
        handles: by job. kept: what is resumed. refusal: what `submit` raises.
    """

    kept: list[Handle] = field(default_factory=list)
    handles: dict[str, Handle] = field(default_factory=dict)
    failure: CinelineError | None = None
    refusal: Callable[[str], Exception | None] = lambda job: None
    ranks: tuple[()] = ()

    def resume(self, folder: Path) -> list[Handle]:
        return self.kept

    def submit(self, request: VideoRequest, outputs: dict[str, Path]) -> Handle:
        job = outputs["video"].stem
        refusal = self.failure or self.refusal(job)
        if refusal is not None:
            raise refusal
        self.handles[job] = Handle(outputs["video"], len(self.handles))
        return self.handles[job]

    def close(self, limit_s: float) -> None:
        pass


class Bench:
    """A dispatcher's surroundings."""

    def __init__(self, data: Path) -> None:
        self.folder = DataFolder(data)
        self.store = Store(self.folder.jobs)
        metrics = Metrics(lambda: Now(0, 0, 0, True, False, []))
        self.outcomes = Outcomes(self.store, self.folder, ServeConfig(data_dir=data), metrics)
        self.dispatcher: Dispatcher | None = None

    def start(self, engine: StubEngine, loaded: Callable[[], object] = lambda: None) -> Dispatcher:
        def make() -> Any:
            loaded()
            return engine

        self.dispatcher = Dispatcher(self.outcomes, make, ParallelConfig(), 1, lambda: None)
        self.dispatcher.start()
        return self.dispatcher

    def add(self, count: int) -> list[str]:
        jobs = [new_id() for _ in range(count)]
        said = {"num_frames": 5, "num_inference_steps": 4}
        for job in jobs:
            self.store.add(NewJob(job, "", "normal", 1.0, {"prompt": "a"}, [], said))
        return jobs

    def state(self, job: str) -> str | None:
        found = self.store.get(job)
        return None if found is None else found.state

    def setbacks(self, job: str) -> int:
        found = self.store.get(job)
        assert found is not None
        return found.setbacks

    def close(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.stop(LIMIT_S)
        self.store.close()
        self.folder.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(dispatcher, "Sink", Sink)
    monkeypatch.setattr(dispatcher, "TIDY_EVERY_S", 0.1)
    made = Bench(tmp_path / "data")
    yield made
    made.close()


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_delete_between_the_files_name_and_its_seal_stops_nobody_else(bench: Bench) -> None:
    jobs, engine = bench.add(4), StubEngine()
    running = bench.start(engine)
    until(lambda: len(running.running) == ROOM)

    def delete() -> None:
        bench.store.remove(jobs[0])
        bench.folder.remove(jobs[0])

    engine.handles[jobs[0]].after_its_file = delete
    for job in jobs[:2]:
        engine.handles[job].end()
    until(lambda: bench.state(jobs[1]) == "completed" and len(engine.handles) == 4)
    assert bench.state(jobs[0]) is None and jobs[0] not in running.running


def test_a_file_that_goes_is_made_again(bench: Bench) -> None:
    (job,), engine = bench.add(1), StubEngine()
    bench.start(engine)
    until(lambda: job in engine.handles)
    first = engine.handles[job]
    first.after_its_file = lambda: bench.folder.video(job).unlink()
    first.end()
    until(lambda: engine.handles[job] is not first)
    engine.handles[job].end()
    until(lambda: bench.state(job) == "completed")


def test_a_file_that_can_never_be_sealed_holds_nobody_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, engine, seal = bench.add(2), StubEngine(), DataFolder.seal_video

    def refuse(folder: DataFolder, job: str) -> int:
        if job == jobs[0]:
            raise OSError(5, "Input/output error")
        return seal(folder, job)

    monkeypatch.setattr(DataFolder, "seal_video", refuse)
    monkeypatch.setattr(dispatcher, "MOST_TRIES", 2)
    bench.start(engine)
    until(lambda: len(engine.handles) == 2)

    def end_all() -> bool:
        for handle in engine.handles.values():
            handle.end()
        return bench.state(jobs[1]) == "completed" and bench.state(jobs[0]) == "failed"

    until(end_all)
    failed = bench.store.get(jobs[0])
    assert failed is not None and failed.error_code == "storage_failed"


def ended(bench: Bench, engine: StubEngine, failure: RankFailed, begun: int = ROOM) -> CinelineError | None:
    """What a service ends by whose engine ends when it has begun so many of those that it has."""
    running = bench.start(engine)
    until(lambda: len(running.running) == ROOM)
    handles = [*engine.kept, *engine.handles.values()]
    for handle in handles[:begun]:
        handle.running_phase = "denoising"
    until(lambda: sum(each.begun for each in running.running.values()) == begun)
    engine.failure = failure
    for handle in handles:
        handle.end(engine.failure)
    running._thread.join(LIMIT_S)
    return running.failure


def test_a_job_that_ends_the_engine_fails_at_the_third_time_while_others_wait(bench: Bench) -> None:
    jobs = bench.add(ROOM + 3)
    for start in range(3):
        kept = [Handle(bench.folder.video(job.id)) for job in bench.store.in_state("in_progress")]
        assert isinstance(ended(bench, StubEngine(kept), RankFailed(1, "It is gone.")), RankFailed)
        assert [bench.state(job) for job in jobs[ROOM:]] == ["queued"] * 3, start
    assert [bench.state(job) for job in jobs[:ROOM]] == ["failed"] * ROOM


@pytest.mark.parametrize(("turn", "begun", "blamed"), [(1, 3, [0, 1, 0]), (None, 1, [1, 0, 0]), (None, 0, [1, 1, 1])])
def test_who_is_blamed_is_whose_turn_it_was_or_who_had_begun(
    turn: int | None, begun: int, blamed: list[int], bench: Bench
) -> None:
    jobs = bench.add(ROOM)
    ended(bench, StubEngine(), RankFailed(1, "It is gone.", turn), begun)
    assert [bench.setbacks(job) for job in jobs] == blamed


def test_an_engine_that_ends_as_it_is_given_a_job_keeps_that_one_waiting(bench: Bench) -> None:
    (job,) = bench.add(1)
    running = bench.start(StubEngine(refusal=lambda job: RankFailed(1, "It is gone.")))
    running._thread.join(LIMIT_S)
    assert isinstance(running.failure, RankFailed)
    assert (bench.state(job), bench.setbacks(job)) == ("queued", 0)


def begun(bench: Bench, count: int) -> list[str]:
    """Jobs that an engine had which is gone."""
    jobs = bench.add(count)
    for job in jobs:
        bench.store.start(job)
    return jobs


def test_a_delete_while_the_model_loads_cancels(bench: Bench) -> None:
    jobs, loading, load = begun(bench, 2), threading.Event(), threading.Event()
    kept = [Handle(bench.folder.video(job)) for job in jobs]

    def loaded() -> None:
        loading.set()
        load.wait(LIMIT_S)

    running = bench.start(StubEngine(kept), loaded)
    assert loading.wait(LIMIT_S)
    bench.store.remove(jobs[0])
    bench.folder.remove(jobs[0])
    running.cancel(jobs[0])
    load.set()
    until(lambda: jobs[1] in running.running)
    assert kept[0].cancelled and not kept[1].cancelled and jobs[0] not in running.running


def test_what_is_resumed_for_another_place_begins_anew(bench: Bench, tmp_path: Path) -> None:
    (job,) = begun(bench, 1)
    engine = StubEngine([Handle(tmp_path / "elsewhere" / f"{job}.mp4")])
    bench.start(engine)
    until(lambda: job in engine.handles)
    assert engine.kept[0].cancelled and bench.state(job) == "in_progress"


def test_snapshots_are_of_jobs_that_are_open_and_of_the_folder_where_it_is(bench: Bench, tmp_path: Path) -> None:
    job, gone = begun(bench, 1)[0], new_id()
    written = {"request": {"prompt": "\udcff"}, "settings": {}, "outputs": {}, "before": {}}
    for number, name in enumerate((job, gone)):
        entry = bench.folder.snapshots / f"{number + 1:04}"
        entry.mkdir(parents=True)
        written["outputs"] = {"video": str(tmp_path / "before" / "videos" / f"{name}.mp4")}
        (entry / "request.json").write_bytes(json.dumps(written).encode())
    bench.start(StubEngine())
    (file,) = bench.folder.snapshots.glob("*/*")
    assert json.loads(file.read_bytes().decode("utf-8", "surrogatepass")) == written | {
        "outputs": {"video": str(bench.folder.video(job))}
    }


def test_images_that_come_while_the_service_begins_are_kept(bench: Bench) -> None:
    """A job's images are written before its row is."""
    loading = threading.Event()
    bench.store.start(bench.add(1)[0])
    lost = bench.folder.image(new_id(), "image")
    lost.write_bytes(b"x")
    running = bench.start(StubEngine(), lambda: loading.wait(LIMIT_S))
    assert not lost.exists()
    image = bench.folder.image(new_id(), "image")
    image.write_bytes(b"x")
    loading.set()
    until(lambda: len(running.running) == 1)
    assert image.exists()


def test_a_job_that_is_with_nobody_begins_anew(bench: Bench) -> None:
    engine = StubEngine()
    running = bench.start(engine)
    until(lambda: running.engine is not None)
    (job,) = begun(bench, 1)
    until(lambda: job in engine.handles)


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError(), OSError(28, "No space left on device")])
def test_what_nobody_foresaw_of_one_job_fails_that_one_at_the_third_time(bench: Bench, error: Exception) -> None:
    jobs = bench.add(3)

    def refusal(job: str) -> Exception | None:
        return error if job == jobs[0] else None

    engine = StubEngine(refusal=refusal)
    running = bench.start(engine)
    until(lambda: bench.state(jobs[0]) == "failed" and jobs[1] in engine.handles)
    seen: set[int] = set()

    def end() -> bool:
        handle = engine.handles[jobs[1]]
        if id(handle) not in seen:
            seen.add(id(handle))
            kept.append(handle)
            handle.end(MemoryError())
        return bench.state(jobs[1]) == "failed"

    kept: list[Handle] = []
    until(end)
    assert len(kept) == 3 and bench.state(jobs[2]) == "in_progress" and running.failure is None


def test_on_a_full_disk_those_that_wait_go_one_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each has given, and the old ones that go meanwhile, give room back; with hardly any they wait on."""
    free = files.RESERVE // 4
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    jobs, engine = bench.add(3), StubEngine()
    running = bench.start(engine)
    time.sleep(3 * dispatcher.POLL_S)
    assert not engine.handles
    free = 3 * files.RESERVE // 4
    for number, job in enumerate(jobs):
        until(lambda: job in engine.handles)  # noqa: B023
        time.sleep(3 * dispatcher.POLL_S)
        assert len(engine.handles) == number + 1
        engine.handles[job].end()
    until(lambda: not running.running)
    assert {bench.state(job) for job in jobs} == {"completed"}


@pytest.mark.parametrize("request_", ['{"prompt": "a", "of_another_version": 1}', "{"])
def test_a_snapshot_that_this_version_refuses_goes_and_its_job_begins_anew(bench: Bench, request_: str) -> None:
    (job,), engine = bench.add(1), StubEngine()
    assert bench.store.start(job)
    outputs = f'{{"video": "{bench.folder.video(job)}"}}'
    entry = bench.folder.snapshots / "0000"
    entry.mkdir(parents=True)
    content = f'{{"request": {request_}, "settings": {{}}, "outputs": {outputs}, "before": {{}}}}'
    (entry / "request.json").write_text(content)
    bench.start(engine)
    assert not entry.exists()
    until(lambda: job in engine.handles)
