"""Requests and their snapshots on disk: whole whenever their process is killed, of one process at a time, and a disk
that is full ends nothing."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from multiprocessing import Event, Value, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_output import NAMES
from test_streams import file_limit
from toy_family import ToySpec

from cineline import InvalidConfig, OutputError, VideoRequest, WrongProcess
from cineline.core.control import Snapshot
from cineline.core.image import load_image
from cineline.core.request import Job, drawn
from cineline.engine import keeper
from cineline.engine.folder import Kept, Run, SnapshotFolder, settings_of
from cineline.families import snapshot

LIMIT_S = 30.0

RUN = Run("/models/a", None, {}, "0123", {"device": "cpu", "dtype": "float32"}, {}, {"pp": 2, "split": (5, 3)}, {})

fork = get_context("fork")


def job_of(request: VideoRequest) -> Job:
    return ToySpec().resolve(request, 7)


def state(step: int, size: int = 100) -> bytes:
    return snapshot.write({"latents": torch.full((size,), float(step)), "step": step})


def taken(step: int, size: int = 100) -> Snapshot:
    return Snapshot(0, step, step % 2, state(step, size))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def add(folder: SnapshotFolder, request: VideoRequest, **outputs: Path) -> str:
    return folder.add(job_of(request), request, outputs)


@contextmanager
def opened(path: Path) -> Iterator[SnapshotFolder]:
    """All is written at its end."""
    folder = SnapshotFolder(path)
    try:
        yield folder
    finally:
        folder.close(LIMIT_S)
        assert not folder._keeper._thread.is_alive()


def reopened(path: Path) -> list[Kept]:
    with opened(path) as folder:
        return folder.unfinished()


def files(path: Path) -> set[str]:
    """All of them, but the lock."""
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {"lock"}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def same_pixels(found: object, wanted: Path | Image.Image | None) -> bool:
    if wanted is None:
        return found is None
    return isinstance(found, Image.Image) and np.array_equal(np.asarray(found), np.asarray(load_image(wanted)))


images = st.builds(
    lambda mode, seed: Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (seed % 5 + 1, 3, 4), dtype=np.uint8)
    ).convert(mode),
    st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]),
    st.integers(0, 99),
)
requests = st.builds(
    lambda **fields: VideoRequest(**{name: value for name, value in fields.items() if value is not None}),
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    negative_prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    image=st.none() | images,
    height=st.none() | st.integers(1, 999),
    num_frames=st.none() | st.integers(1, 9),
    guidance_scale=st.none() | st.floats(0, 9),
    flow_shift=st.none() | st.floats(0.1, 9),
    seed=st.none() | st.integers(0, 2**63 - 1),
    decode=st.none() | st.booleans(),
    timeout_s=st.none() | st.floats(0.001, 1e6),
)
outputs = st.dictionaries(st.sampled_from(["video", "latents"]), NAMES.filter(lambda name: name not in (".", "..")))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(requests, outputs, st.none() | st.integers(1, 70_000), st.booleans()), max_size=4))
def test_requests_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: list[tuple[VideoRequest, dict[str, str], int | None, bool]],
) -> None:
    path = tmp_path_factory.mktemp("folder")
    names = []
    files_of = []
    with opened(path / "kept") as folder:
        assert folder.run is None and folder.unfinished() == []
        folder.begin(RUN)
        for number, (request, outputs, step, there) in enumerate(wanted):
            (path / str(number)).mkdir()
            own = {kind: path / str(number) / name for kind, name in outputs.items()}
            for file in own.values() if there else ():
                file.write_text("made before")
            files_of.append(own)
            names.append(add(folder, request, **own))
            if step is not None:
                folder.put(names[-1], taken(step))
    assert names == [f"{number + 1:04}" for number in range(len(wanted))]
    with opened(path / "kept") as folder:
        assert folder.run == RUN and folder.run.line == {"pp": 2, "split": [5, 3]}
        found = folder.unfinished()
    assert [each.name for each in found] == names
    for each, own, (request, _, step, there) in zip(found, files_of, wanted, strict=True):
        assert same_pixels(each.request.image, request.image)
        assert each.request.model_copy(update={"image": request.image}) == request
        assert each.request.model_fields_set == request.model_fields_set
        assert each.settings == settings_of(job_of(request)) == settings_of(job_of(each.request))
        assert each.outputs == own
        assert each.before == {kind: file.stat().st_mtime_ns if there else None for kind, file in own.items()}
        assert each.snapshot == (None if step is None else replace(taken(step), request=-1))


def test_an_image_is_kept_whatever_its_file_said_of_it(tmp_path: Path) -> None:
    image = picture(0)
    image.info["transparency"] = 3
    with opened(tmp_path) as folder:
        add(folder, VideoRequest(prompt="x", image=image))
    (kept,) = reopened(tmp_path)
    assert same_pixels(kept.request.image, image)


def test_what_is_kept_can_be_read_by_a_person(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.begin(RUN)
        add(folder, VideoRequest(prompt="ein Fuß, 猫", image=picture(0), seed=3), video=Path("a.mp4"))
    assert files(tmp_path) == {"run.json", "0001/request.json", "0001/image.png"}
    text = (tmp_path / "0001" / "request.json").read_text(encoding="utf-8")
    assert '"prompt": "ein Fuß, 猫",\n' in text
    assert json.loads(text)["request"] == {"prompt": "ein Fuß, 猫", "seed": 3, "image": "image.png"}
    assert json.loads(text)["outputs"] == {"video": str(Path.cwd() / "a.mp4")}
    assert not {"id", "first_step", "first_expert"} & json.loads(text)["settings"].keys()
    assert "\n  " in (tmp_path / "run.json").read_text()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8))
@example([(2, True), (3, True), (1, True)])
def test_the_newest_two_stay_in_whichever_order_they_come(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    """Where the disk is slow others than the newest are not even written."""
    path = tmp_path_factory.mktemp("folder")
    with opened(path) as folder:
        folder.begin(RUN)
        name = add(folder, VideoRequest(prompt="x"))
        for step, waits in steps:
            folder.put(name, taken(step))
            if waits:
                until(lambda: not folder._keeper._todo)
    (kept,) = reopened(path)
    newest = max(step for step, _ in steps)
    assert kept.snapshot == replace(taken(newest), request=-1)
    assert len(files(path / "0001")) <= 3
    if all(waits for _, waits in steps):
        wanted = sorted({step for step, _ in steps})[-2:]
        assert {f"step-{step:05}-expert-{step % 2}.safetensors" for step in wanted} < files(path / "0001")


def test_a_request_that_is_done_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.begin(RUN)
        names = [add(folder, VideoRequest(prompt="x", image=picture(0))) for _ in range(3)]
        folder.put(names[0], taken(1))
        folder.remove(names[0])
        folder.put(names[0], taken(2))  # as with split experts a last snapshot may come late
        folder.remove(names[0])
        folder.remove(names[2])
        assert add(folder, VideoRequest(prompt="y")) == "0004"
    assert files(tmp_path) == {"run.json", "0002/request.json", "0002/image.png", "0004/request.json"}
    with opened(tmp_path) as folder:
        assert [each.name for each in folder.unfinished()] == ["0002", "0004"]
        for name in ("0002", "0004"):
            folder.remove(name)
    assert files(tmp_path) == {"run.json"} and {path.name for path in tmp_path.iterdir()} == {"run.json", "lock"}


def test_entries_are_in_order_of_submission_beyond_four_digits(tmp_path: Path) -> None:
    (tmp_path / "9999").mkdir()
    with opened(tmp_path) as folder:
        names = [add(folder, VideoRequest(prompt=str(number))) for number in range(2)]
    assert names == ["10000", "10001"]
    with opened(tmp_path) as folder:
        folder.begin(RUN)
        (tmp_path / "9999" / "request.json").write_bytes((tmp_path / "10000" / "request.json").read_bytes())
        assert [each.name for each in folder.unfinished()] == ["9999", *names]


def test_any_thread_may_add(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        names: list[str] = []

        def many(prompt: str) -> None:
            for _ in range(20):
                names.append(name := add(folder, VideoRequest(prompt=prompt)))
                folder.put(name, taken(1))

        threads = [threading.Thread(target=many, args=(str(number),)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = reopened(tmp_path)
    assert [each.name for each in found] == sorted(names) == [f"{number:04}" for number in range(1, 81)]
    assert all(each.snapshot for each in found)


def test_nobody_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the snapshots that come meanwhile the last is written."""
    goes, steps = threading.Event(), []

    def slow(path: Path, content: bytes) -> None:
        assert goes.wait(LIMIT_S)
        steps.append(path.name.split(".")[1])
        synced(path, content)

    synced = keeper.synced
    monkeypatch.setattr(keeper, "synced", slow)
    with opened(tmp_path) as folder:
        name = add(folder, VideoRequest(prompt="x"))
        for step in range(1, 6):
            folder.put(name, taken(step))
        done = add(folder, VideoRequest(prompt="y"))
        folder.remove(done)
        assert files(tmp_path) == set()
        goes.set()
    assert steps == ["request", "step-00005-expert-1"]
    assert files(tmp_path) == {"0001/request.json", "0001/step-00005-expert-1.safetensors"}


def test_closing_has_a_limit_and_the_folder_is_let_go_when_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes, begun = threading.Event(), threading.Event()

    def slow(path: Path, content: bytes) -> None:
        begun.set()
        assert goes.wait(LIMIT_S)

    monkeypatch.setattr(keeper, "synced", slow)
    folder = SnapshotFolder(tmp_path)
    for _ in range(2):
        add(folder, VideoRequest(prompt="x"))
    assert begun.wait(LIMIT_S)
    folder.close(0.01)
    with pytest.raises(InvalidConfig, match="in use"):
        SnapshotFolder(tmp_path)
    goes.set()
    folder.close(LIMIT_S)
    add(folder, VideoRequest(prompt="late"))
    assert reopened(tmp_path) == []


# Kills.


@dataclass(frozen=True)
class Act:
    """A change, and what is on the disk behind it: each entry's newest step."""

    does: Callable[[SnapshotFolder], object]
    leaves: Mapping[str, int | None]


def story() -> list[Act]:
    def puts(name: str, step: int) -> Callable[[SnapshotFolder], object]:
        return lambda folder: folder.put(name, taken(step))

    def adds(seed: int, image: bool) -> Callable[[SnapshotFolder], object]:
        request = VideoRequest(prompt="x", seed=seed, image=picture(seed) if image else None)
        return lambda folder: add(folder, request)

    return [
        Act(lambda folder: folder.begin(RUN), {}),
        Act(adds(1, True), {"0001": None}),
        *(Act(puts("0001", step), {"0001": step}) for step in range(1, 5)),
        Act(adds(2, False), {"0001": 4, "0002": None}),
        Act(puts("0002", 1), {"0001": 4, "0002": 1}),
        Act(lambda folder: folder.remove("0001"), {"0002": 1}),
        Act(adds(3, True), {"0002": 1, "0003": None}),
        Act(lambda folder: folder.remove("0003"), {"0002": 1}),
        Act(lambda folder: folder.remove("0002"), {}),
    ]


def settled(path: Path) -> dict[str, int | None] | None:
    """What is on the disk, where nothing is half done."""
    try:
        there = list(path.rglob("*"))
        if any(each.name.startswith(".") for each in there):
            return None
        found: dict[str, int | None] = {}
        for entry in path.glob("0*"):
            steps = [step for step, *_ in keeper.snapshots_of(entry)]
            if len(steps) > 2 or not (entry / "request.json").exists():
                return None
            found[entry.name] = max(steps, default=None)
    except FileNotFoundError:
        return None
    return found


def leaves(path: Path, act: Act) -> bool:
    return settled(path) == act.leaves


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Audit events of what changes a folder."""


def killed_at(number: int, path: Path, acted: Any) -> None:
    """The story, until so many changes of files have begun."""
    left = count(number, -1)
    reads = threading.local()

    def change(*_: object) -> None:
        if not getattr(reads, "own", False) and next(left) <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(stream: int) -> None:
        if next(left) <= 0:
            os.ftruncate(stream, os.fstat(stream).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = half  # type: ignore[assignment]
    sys.addaudithook(lambda event, _: change() if event in CHANGES else None)
    folder = SnapshotFolder(path)
    for act in story():
        act.does(folder)
        reads.own = True
        until(partial(leaves, path, act))
        reads.own = False
        acted.value += 1
    folder.close(LIMIT_S)


def check_whole(path: Path) -> dict[str, int | None]:
    """What another process finds; all of it as it was given."""
    with opened(path) as folder:
        assert not any(each.name.startswith(".") for each in path.rglob("*")), "left over"
        assert folder.run in (None, RUN)
        found = folder.unfinished()
        for each in found:
            assert each.request.image is None or same_pixels(each.request.image, picture(drawn(each.request.seed)))
            if each.snapshot is not None:
                assert each.snapshot == replace(taken(each.snapshot.step), request=-1)
        assert add(folder, VideoRequest(prompt="new")) not in {each.name for each in found}
    return {each.name: None if each.snapshot is None else each.snapshot.step for each in found}


def test_killed_at_any_change_of_a_file_it_is_whole(tmp_path: Path) -> None:
    """What was written before is still there, and the rest of one change at most."""
    acts: list[Mapping[str, int | None]] = [{}, *(act.leaves for act in story())]
    for number in count():
        path = tmp_path / str(number)
        acted = Value("i", 0)
        process = fork.Process(target=killed_at, args=(number, path, acted))
        process.start()
        process.join(LIMIT_S)
        assert process.exitcode in (0, -signal.SIGKILL)
        if path.exists():
            found = check_whole(path)
            assert found in acts[acted.value : acted.value + 2], f"killed at change {number}, after {acted.value} acts"
        if process.exitcode == 0:
            break
    assert number > 50 and acted.value == len(story())


def goes_on(path: Path, seed: int, begun: Any) -> None:
    draw = random.Random(seed)
    folder = SnapshotFolder(path)
    folder.begin(RUN)
    steps: dict[str, int] = {}
    begun.set()
    while True:
        if len(steps) < 3:
            request = VideoRequest(prompt="x", seed=(own := draw.randrange(99)), image=picture(own))
            steps[add(folder, request)] = 0
        name = draw.choice(list(steps))
        steps[name] += 1
        folder.put(name, taken(steps[name]))
        if draw.random() < 0.2:
            folder.remove(name)
            del steps[name]
        time.sleep(draw.random() / 1000)


def test_killed_at_any_moment_it_is_whole(tmp_path: Path) -> None:
    """And another process has it at once."""
    for seed in range(10):
        begun = Event()
        process = fork.Process(target=goes_on, args=(tmp_path, seed, begun))
        process.start()
        assert begun.wait(LIMIT_S)
        time.sleep(random.random() / 10)
        process.kill()
        process.join(LIMIT_S)
        check_whole(tmp_path)


# Several processes.


def test_a_folder_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    begun = Event()
    process = fork.Process(target=goes_on, args=(tmp_path, 0, begun))
    process.start()
    assert begun.wait(LIMIT_S)
    with pytest.raises(InvalidConfig) as refused:
        SnapshotFolder(tmp_path)
    assert str(refused.value) == (
        f"The folder {str(tmp_path)!r} is in use by another run, and is for one at a time: wait until that has ended, "
        "or give another."
    )
    process.kill()
    process.join(LIMIT_S)
    reopened(tmp_path)


def child(folder: SnapshotFolder, name: str, lives: Any, tells: Any) -> None:
    refused = 0
    request = VideoRequest(prompt="of the child")
    changes: list[Callable[[], object]] = [
        partial(folder.begin, replace(RUN, identity="of the child")),
        partial(add, folder, request),
        partial(folder.put, name, taken(9)),
        partial(folder.remove, name),
    ]
    for does in changes:
        try:
            does()
        except WrongProcess:
            refused += 1
    folder.close(LIMIT_S)
    folder._keeper.abandon()
    changes.clear()
    del folder, does
    gc.collect()
    tells.value = refused
    assert lives.wait(LIMIT_S)


@contextmanager
def held_by_another(lock: threading.Condition | threading.Lock) -> Iterator[None]:
    """As a thread may have it when another one forks."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_forked_child_changes_nothing(tmp_path: Path) -> None:
    """Nor does it keep the folder when its parent has let go."""
    lives, told = Event(), Value("i", -1)
    folder = SnapshotFolder(tmp_path)
    folder.begin(RUN)
    name = add(folder, VideoRequest(prompt="x"))
    with held_by_another(folder._keeper._changed), held_by_another(folder._lock):
        process = fork.Process(target=child, args=(folder, name, lives, told))
        process.start()
        until(lambda: told.value >= 0)
        assert told.value == 4
    try:
        with pytest.raises(InvalidConfig, match="in use"):
            SnapshotFolder(tmp_path)
        folder.put(name, taken(1))
        folder.close(LIMIT_S)
        (kept,) = reopened(tmp_path)
        assert kept.request.prompt == "x" and kept.snapshot is not None and kept.snapshot.step == 1
        assert process.is_alive()
    finally:
        lives.set()
        process.join(LIMIT_S)
    assert process.exitcode == 0


def test_a_folder_that_nobody_holds_is_let_go_with_all_it_held(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    image = picture(0)
    name = add(folder, VideoRequest(prompt="x", image=image))
    last = taken(1)
    folder.put(name, last)
    held: list[weakref.ref[Any]] = [weakref.ref(image), weakref.ref(last)]
    until(lambda: settled(tmp_path) == {"0001": 1})
    del image, last
    gc.collect()
    until(lambda: all(each() is None for each in held))
    thread = folder._keeper._thread
    del folder
    gc.collect()
    thread.join(LIMIT_S)
    assert len(reopened(tmp_path)) == 1


# Disks and files that are not as they should be.


def said(record: logging.LogRecord, path: Path) -> str:
    """What a warning says of the request, checking all else."""
    start = f"Snapshots cannot be written to {str(path)!r} (File too large): the run goes on; if it stops, request "
    end = ", and the same may happen to others."
    text = record.getMessage()
    assert record.levelno == logging.WARNING and text.startswith(start) and text.endswith(end)
    return text[len(start) : -len(end)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1500), st.booleans(), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_on_a_full_disk_all_is_whole_that_is_there(
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    room: int,
    image: bool,
    sizes: list[int],
) -> None:
    """And one warning is given where anything is not."""
    caplog.clear()
    path = tmp_path_factory.mktemp("full")
    request = VideoRequest(prompt="x", image=picture(1) if image else None)
    with opened(path) as folder:
        folder.begin(RUN)
        with file_limit(room):
            names = [add(folder, request) for _ in range(2)]
            for step, size in enumerate(sizes, 1):
                for name in names:
                    folder.put(name, taken(step, size))
            folder.close(LIMIT_S)
    found = reopened(path)
    assert all(same_pixels(each.request.image, request.image) for each in found)
    kept = {each.name: each.snapshot for each in found}
    for each in kept.values():
        assert each is None or each == replace(taken(each.step, sizes[each.step - 1]), request=-1)
    lost = [name for name in names if not (last := kept.get(name)) or last.step < len(sizes)]
    warned = [each for each in caplog.records if "cannot be written" in each.getMessage()]
    assert len(warned) <= 1 and (not lost or warned)
    assert not warned or said(warned[0], path)[:4] in names
    absent = ", ".join(name for name in names if name not in kept)
    words = [each.getMessage() for each in caplog.records if each not in warned]
    assert [each.partition(": ")[2] for each in words] == ([f"{absent} cannot be resumed."] if absent else [])


@pytest.mark.parametrize(
    ("room", "words", "step"), [(1000, "0001 begins again at step 2", 2), (100, "0001 cannot be resumed", None)]
)
def test_one_warning_says_what_is_lost(
    room: int, words: str, step: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When there is room again, what waits is written with the next snapshot."""
    with opened(tmp_path) as folder:
        folder.begin(RUN)
        with file_limit(room):
            name = add(folder, VideoRequest(prompt="x", image=picture(1)))
            folder.put(name, taken(2))
            until(lambda: settled(tmp_path) == {name: 2} or caplog.records)
            for later in (3, 4):
                folder.put(name, taken(later, 300))
                until(lambda: not folder._keeper._due and folder._keeper._todo)
            assert [said(record, tmp_path) for record in caplog.records] == [words]
            assert (tmp_path / name / "request.json").exists() == (step is not None)
            assert settled(tmp_path) == (None if step is None else {name: step})
        folder.put(name, taken(5, 300))
        until(lambda: settled(tmp_path) == {name: 5})
        (kept,) = folder.unfinished()
        assert same_pixels(kept.request.image, picture(1))
    assert len(caplog.records) == 1


def test_what_comes_while_a_write_fails_joins_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes, begun = threading.Event(), threading.Event()

    def fails(path: Path, content: bytes) -> None:
        begun.set()
        assert goes.wait(LIMIT_S)
        monkeypatch.setattr(keeper, "synced", synced)
        raise OSError(27, os.strerror(27))

    synced = keeper.synced
    monkeypatch.setattr(keeper, "synced", fails)
    with opened(tmp_path) as folder:
        name = add(folder, VideoRequest(prompt="x", image=picture(0)))
        assert begun.wait(LIMIT_S)
        folder.put(name, taken(1))
        goes.set()
    assert [said(record, tmp_path) for record in caplog.records] == ["0001 cannot be resumed"]
    (kept,) = reopened(tmp_path)
    assert same_pixels(kept.request.image, picture(0)) and kept.snapshot is not None


def test_an_entry_that_cannot_go_is_tried_again_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(27, os.strerror(27))

    with opened(tmp_path) as folder:
        folder.begin(RUN)
        name = add(folder, VideoRequest(prompt="x"))
        until(lambda: settled(tmp_path) == {name: None})
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", refuses)
            folder.remove(name)
            until(lambda: caplog.records)
        assert [said(record, tmp_path) for record in caplog.records] == ["0001 is made once more"]
    assert reopened(tmp_path) == []


def test_what_cannot_be_kept_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the error."""
    with opened(tmp_path) as folder:
        add(folder, VideoRequest(prompt="x", image=tmp_path / "gone.png"))
        other = add(folder, VideoRequest(prompt="y"))
    warned, lost = caplog.messages
    assert "gone.png" in warned and lost.endswith("lacks requests that are not done: 0001 cannot be resumed.")
    assert [each.name for each in reopened(tmp_path)] == [other]


def kept_with_steps(path: Path, *steps: int) -> Path:
    """Its entry."""
    with opened(path) as folder:
        folder.begin(RUN)
        name = add(folder, VideoRequest(prompt="x", image=picture(0)))
        for step in steps:
            folder.put(name, taken(step))
            until(lambda: settled(path) == {name: step})  # noqa: B023
    return path / name


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_snapshot_that_is_not_whole_is_passed_over(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("folder")
    entry = kept_with_steps(path, 1, 2)
    newest = entry / "step-00002-expert-0.safetensors"
    content = newest.read_bytes()
    if data.draw(st.booleans(), "cut"):
        newest.write_bytes(content[: data.draw(st.integers(0, len(content) - 1), "to")])
    else:
        newest.write_bytes(content + b"x")
    with opened(path) as folder:
        (kept,) = folder.unfinished()
        assert kept.snapshot == replace(taken(1), request=-1)
        folder.put(kept.name, taken(2))
    (kept,) = reopened(path)
    assert kept.snapshot == replace(taken(2), request=-1)


def test_broken_snapshots_do_not_count_among_the_newest(tmp_path: Path) -> None:
    entry = kept_with_steps(tmp_path, 8, 9)
    for file in entry.glob("step-*"):
        file.write_bytes(b"")
    with opened(tmp_path) as folder:
        (kept,) = folder.unfinished()
        assert kept.snapshot is None
        folder.put(kept.name, taken(1))
    (kept,) = reopened(tmp_path)
    assert kept.snapshot == replace(taken(1), request=-1)


BROKEN = ["", "{", "[]", "{}", "null", "[" * 100_000, '{"request": 1, "settings": {}, "outputs": {}, "before": {}}']


@pytest.mark.parametrize("text", BROKEN)
def test_json_that_is_none_is_refused_and_the_folder_let_go(text: str, tmp_path: Path) -> None:
    entry = kept_with_steps(tmp_path, 1)
    wanted = (entry / "request.json").read_text()
    (entry / "request.json").write_text(text)
    with pytest.raises(InvalidConfig) as refused:
        reopened(tmp_path)
    assert str(refused.value).startswith(f"{str(entry / 'request.json')!r} cannot be read (")
    assert str(refused.value).endswith(f": remove {str(entry)!r} to go on without that request.")
    (entry / "request.json").write_text(wanted)
    (tmp_path / "run.json").write_text(text)
    for _ in range(2):
        with pytest.raises(InvalidConfig) as refused:
            SnapshotFolder(tmp_path)
        assert str(refused.value).startswith(f"{str(tmp_path / 'run.json')!r} cannot be read (")
        assert str(refused.value).endswith("): give another folder, or remove that file.")
        assert "\n" not in str(refused.value)


def test_a_request_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    entry = kept_with_steps(tmp_path)
    (entry / "image.png").write_bytes(b"no image")
    with pytest.raises(InvalidConfig, match=r"0001' cannot be resumed: image=.* cannot be read"):
        reopened(tmp_path)
    stored = json.loads((entry / "request.json").read_text())
    stored["request"] = {"prompt": "x", "widht": 3}
    (entry / "request.json").write_text(json.dumps(stored))
    with pytest.raises(InvalidConfig, match=r"0001' cannot be resumed: Unknown request field 'widht'"):
        reopened(tmp_path)


def test_an_entry_that_was_being_made_goes(tmp_path: Path) -> None:
    entry = kept_with_steps(tmp_path, 1)
    entry.rename(tmp_path / ".0001.new")
    assert reopened(tmp_path) == []
    assert files(tmp_path) == {"run.json"}


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    foreign = {"2024/image.png", "2024/a.png", "2025/request.txt", "notes.txt", ".cache/x", "0001x/image.png"}
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with opened(tmp_path) as folder:
        folder.begin(RUN)
        name = add(folder, VideoRequest(prompt="x"))
        assert name == "2026"
    assert files(tmp_path) == foreign | {"run.json", "2026/request.json"}
    with opened(tmp_path) as folder:
        folder.remove(name)
    assert files(tmp_path) == foreign | {"run.json"}
    assert len(reopened(tmp_path)) == 0


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist: make it first"):
        SnapshotFolder(tmp_path / "no" / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        SnapshotFolder(tmp_path / "file")
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        SnapshotFolder(tmp_path / "locked")
    with pytest.raises(OutputError, match="cannot be"):
        SnapshotFolder(tmp_path / ("x" * 300))
    with opened(tmp_path / "full") as folder, file_limit(10), pytest.raises(OutputError, match=r"run\.json.*too large"):
        folder.begin(RUN)
    assert files(tmp_path / "full") == set() and folder.run is None
