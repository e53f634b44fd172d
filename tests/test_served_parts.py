"""The service's parts by themselves: whose turn it is, the jobs' store, images, settings, keys, pace."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cineline.errors import InvalidConfig
from cineline.server.fair import FairQueue, Waiting
from cineline.server.files import DataFolder, new_id
from cineline.server.images import Images
from cineline.server.keys import Client, Keys
from cineline.server.metrics import Metrics, Now
from cineline.server.outcomes import Outcomes
from cineline.server.pace import LONGEST_S, UNKNOWN_S, Pace
from cineline.server.refusal import Refusal
from cineline.server.service import Service
from cineline.server.settings import ServeConfig
from cineline.server.store import NewJob, Store
from cineline.server.waiters import Waiters

# Whose turn it is.


def served(waiting: Sequence[Waiting], count: int, queue: FairQueue | None = None) -> list[Waiting]:
    """The first so many, where each that is served is followed by another like it."""
    queue, waiting, order = queue or FairQueue(), list(waiting), []
    for number in range(count):
        chosen = queue.choose(waiting)
        assert chosen is not None
        order.append(chosen)
        waiting.remove(chosen)
        waiting.append(chosen._replace(id=f"{number} {chosen.id}"))
    return order


def work_by(order: Sequence[Waiting], key: Callable[[Waiting], Any]) -> dict[Any, float]:
    found: Counter[Any] = Counter()
    for job in order:
        found[key(job)] += job.work  # type: ignore[assignment]
    return dict(found)


def test_jobs_alike_go_in_order() -> None:
    waiting = [Waiting(str(number), "", "normal", 10.0) for number in range(20)]
    queue = FairQueue()
    order = []
    while (chosen := queue.choose(waiting)) is not None:
        order.append(chosen)
        waiting.remove(chosen)
    assert [job.id for job in order] == [str(number) for number in range(20)]


def test_short_and_long_jobs_get_the_same_work() -> None:
    waiting = [Waiting("long", "", "normal", 1000.0), *(Waiting(f"short {n}", "", "normal", 10.0) for n in range(5))]
    order = served(waiting, 1000)
    work = work_by(order, lambda job: job.work)
    assert 0.8 < work[1000.0] / work[10.0] < 1.25
    assert {job.work for job in order[:2]} == {10.0, 1000.0}  # neither waits for many of the others


def test_owners_get_the_same_work_however_many_jobs_they_have() -> None:
    many = [Waiting(f"a {number}", "a", "normal", 50.0) for number in range(50)]
    work = work_by(served([*many, Waiting("b", "b", "normal", 20.0)], 700), lambda job: job.owner)
    assert 0.9 < work["a"] / work["b"] < 1.1


def test_priorities_share_by_weight_and_the_lowest_is_served() -> None:
    waiting = [Waiting(priority, "", priority, 1.0) for priority in ("low", "normal", "high")]
    work = work_by(served(waiting, 2100), lambda job: job.priority)
    assert 15 < work["high"] / work["low"] < 17
    assert 3.5 < work["normal"] / work["low"] < 4.5


def test_who_comes_late_has_saved_no_turns() -> None:
    queue = FairQueue()
    served([Waiting("a", "a", "normal", 10.0)], 1000, queue)
    order = served([Waiting("a", "a", "normal", 10.0), Waiting("b", "b", "normal", 10.0)], 100, queue)
    assert 45 <= sum(job.owner == "b" for job in order) <= 55
    assert len(queue._next) < 20


@given(
    st.lists(
        st.builds(
            Waiting,
            st.uuids().map(str),
            st.sampled_from("abc"),
            st.sampled_from(["low", "normal", "high"]),
            st.floats(0.001, 1e6),
        ),
        max_size=30,
    )
)
def test_all_are_served_once(waiting: list[Waiting]) -> None:
    queue, left, order = FairQueue(), list(waiting), []
    while (chosen := queue.choose(left)) is not None:
        left.remove(chosen)
        order.append(chosen)
    assert sorted(order) == sorted(waiting)


# The store.


def stored(store: Store, owner: str = "", key: str | None = None) -> str:
    job = new_id()
    store.add(NewJob(job, owner, "normal", 1.0, {"prompt": "a"}, [], {"num_frames": 5}, key, "f" if key else None))
    return job


def test_of_two_who_race_one_wins(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    job = stored(store)
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(store.start(job))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(won) == [False] * 7 + [True]
    assert store.complete(job, 10, 60.0) and not store.complete(job, 10, 60.0)
    assert not store.fail(job, "x", "y", 60.0) and not store.queue_again(job)
    assert store.remove(job) and not store.remove(job)
    store.close()


def test_another_process_finds_what_was_committed(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    jobs = [stored(store, "a", "k" if number == 3 else None) for number in range(5)]
    with pytest.raises(sqlite3.IntegrityError):
        stored(store, "a", "k")
    stored(store, "b", "k")
    other = Store(tmp_path / "jobs.sqlite3")
    assert [job.id for job in other.page("a", None, 10, True)] == jobs
    assert [job.id for job in other.page("a", 4, 2, False)] == [jobs[2], jobs[1]]
    found = other.by_key("a", "k")
    assert found is not None and found.id == jobs[3]
    assert other.counts("a")["queued"] == 5 and other.counts()["queued"] == 6
    store.close()
    other.close()


def test_what_is_old_or_too_much_goes_the_oldest_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    jobs = [stored(store) for _ in range(4)]
    for job in jobs[:3]:
        store.start(job)
        store.complete(job, 100, 60.0)
        time.sleep(0.002)
    assert store.expired(1000.0) == []
    assert store.expired(250.0) == [jobs[0]]
    assert store.expired(10.0) == [jobs[1], jobs[0]]  # the newest stays, however large
    store.fail(jobs[3], "x", "y", -1.0)
    assert store.expired(1000.0) == [jobs[3]]
    store.close()


def test_a_folder_is_of_one_model_while_jobs_wait(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    store.of_model("a")
    store.of_model("b")
    job = stored(store)
    with pytest.raises(InvalidConfig, match="1 jobs are not done that were taken for 'b': serve that"):
        store.of_model("a")
    store.remove(job)
    store.of_model("a")
    store.close()


def test_only_files_of_no_job_are_tidied_away(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    kept, lost = new_id(), new_id()
    others = [folder.videos / "mine.mp4", folder.inputs / f"{lost}.txt"]
    for path in (
        folder.video(kept),
        folder.video(lost),
        folder.videos / f".{kept}.1.mp4",
        folder.image(lost, "image"),
        *others,
    ):
        path.write_bytes(b"x")
    folder.tidy({kept})
    assert sorted([*folder.videos.iterdir(), *folder.inputs.iterdir()]) == sorted([folder.video(kept), *others])
    with pytest.raises(InvalidConfig, match="is in use by another service"):
        DataFolder(tmp_path / "data")
    folder.close()
    DataFolder(tmp_path / "data").close()


# Images.


def png(width: int, height: int) -> bytes:
    """A file that says it is so large, with hardly any bytes."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    data = b"IDAT" + zlib.compress(b"\0" * min(width * 3 * height, 3_000_000), 9)
    parts = [head, data, b"IEND"]
    chunks = [(len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def small(form: str = "PNG") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(written, form)
    return written.getvalue()


def load(images: Images, reference: Any) -> Image.Image:
    return asyncio.run(images.load(reference))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_taken(form: str) -> None:
    image = load(Images(), small(form))
    assert (image.size, image.mode) == ((8, 6), "RGB")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (png(30_000, 30_000), 413),
        (png(20_000, 1), 413),
        (png(8000, 8000), 413),
        (png(2**31 - 1, 2**31 - 1), 413),
        (b"\0" * (20 * 2**20 + 1), 413),
        (png(100, 100)[:-30], 400),
        (small()[:40], 400),
        (small("GIF"), 400),
        (small("TIFF"), 400),
        (b"", 400),
        (b"<svg/>", 400),
        (b"%PDF-1.4", 400),
    ],
    ids=range(12),
)
def test_bombs_and_other_files_are_refused_before_they_are_decoded(content: bytes, status: int) -> None:
    with pytest.raises(Refusal) as refused:
        load(Images(), content)
    assert refused.value.status == status and refused.value.param == "input_reference"


def web(answers: dict[str, httpx.Response], seen: list[httpx.Request]) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answers[f"{request.headers['host']}{request.url.path}"]

    return httpx.MockTransport(answer)


ADDRESSES = {
    "ok.example": ["93.184.216.34"],
    "cdn.example": ["2606:2800:220:1::1"],
    "mixed.example": ["8.8.8.8", "10.0.0.1"],
}
PRIVATE = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1", "100.64.0.1", "0.0.0.0"]
PRIVATE += ["64:ff9b::a00:1", "64:ff9b::7f00:1", "::7f00:1", "fec0::1", "::ffff:0:7f00:1", "2002:7f00:1::", "ff02::1"]


def looked_up(addresses: dict[str, list[str]], host: str, port: int) -> list[str]:
    return addresses[host]


def test_an_address_of_an_allowed_host_is_fetched_from_where_it_was_looked_up() -> None:
    seen: list[httpx.Request] = []
    answers = {
        "ok.example/a": httpx.Response(302, headers={"location": "https://cdn.example/b"}),
        "cdn.example/b": httpx.Response(200, stream=httpx.ByteStream(small())),
    }
    images = Images(["ok.example", "cdn.example"], partial(looked_up, ADDRESSES), web(answers, seen))
    assert load(images, {"image_url": "http://ok.example/a"}).size == (8, 6)
    assert [request.url.host for request in seen] == ["93.184.216.34", "2606:2800:220:1::1"]
    assert seen[1].extensions["sni_hostname"] == "cdn.example"


@pytest.mark.parametrize(
    "address",
    [
        "http://other.example/a",
        "http://ok.example:8080/a",
        "ftp://ok.example/a",
        "file:///etc/passwd",
        "http://ok.example@other.example/a",
        "http://127.0.0.1/a",
        "http://mixed.example/a",
        "http://ok.example/to-other",
        "http://ok.example/to-file",
        "http://ok.example/round",
        "http://ok.example/missing",
        "http://ok.example/large",
        "http://[::1/a",
        "http://",
        "http://private.example/a",
    ],
)
def test_other_addresses_are_not(address: str) -> None:
    answers = {
        "ok.example/to-other": httpx.Response(302, headers={"location": "http://other.example/a"}),
        "ok.example/to-file": httpx.Response(302, headers={"location": "file:///etc/passwd"}),
        "ok.example/round": httpx.Response(302, headers={"location": "/round"}),
        "ok.example/missing": httpx.Response(404),
        "ok.example/large": httpx.Response(200, stream=httpx.ByteStream(b"\0" * (20 * 2**20 + 1))),
    }
    seen: list[httpx.Request] = []
    for private in PRIVATE if "private" in address else ["8.8.8.8"]:
        addresses = {**ADDRESSES, "private.example": [private]}
        images = Images(list(addresses), partial(looked_up, addresses), web(answers, seen))
        with pytest.raises(Refusal) as refused:
            load(images, {"image_url": address})
        assert refused.value.status == 400
    assert all(request.headers["host"] == "ok.example" for request in seen)


def test_what_is_packed_is_not_unpacked() -> None:
    packed = gzip.compress(gzip.compress(bytes(10_000_000)))
    answer = httpx.Response(200, headers={"content-encoding": "gzip, gzip"}, stream=httpx.ByteStream(packed))
    seen: list[httpx.Request] = []
    images = Images(["ok.example"], partial(looked_up, ADDRESSES), web({"ok.example/a": answer}, seen))
    with pytest.raises(Refusal, match="it is encoded as 'gzip, gzip'"):
        load(images, {"image_url": "http://ok.example/a"})
    assert seen[0].headers["accept-encoding"] == "identity"


def test_a_public_address_of_nat64_is_fetched_from() -> None:
    answers = {"six.example/a": httpx.Response(200, stream=httpx.ByteStream(small()))}
    images = Images(["six.example"], lambda *_: ["64:ff9b::808:808"], web(answers, []))
    assert load(images, {"image_url": "http://six.example/a"}).size == (8, 6)


@pytest.mark.parametrize("reference", [b"none", "data:,", {"image_url": 3}, "http://ok.example/a", "none"])
def test_a_refusal_names_the_field(reference: Any) -> None:
    with pytest.raises(Refusal) as refused:
        asyncio.run(Images().load(reference, "last_image"))
    assert refused.value.param == "last_image" and "input_reference" not in refused.value.message


def test_a_data_url_may_be_in_capitals() -> None:
    assert load(Images(), f"DATA:IMAGE/PNG;BASE64,{base64.b64encode(small()).decode()}").size == (8, 6)


# Settings, keys, pace.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_for": "7"}, "keep_for='7' is no amount above 0: give a number and s, m, h, d, w, such as 7d"),
        ({"keep_for": "-1d"}, "no amount"),
        ({"keep_bytes": "50 gigs"}, "no amount"),
        ({"grace": "0s"}, "no amount above 0"),
        ({"port": 70000}, "port=70000 is out of range"),
        ({"queue_limit": 0}, "out of range"),
        ({"aliases": ("a b",)}, "alias='a b' is no name"),
        ({"image_hosts": ("http://a",)}, "is no host's name"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words.split(":")[0]):
        ServeConfig(**given)


def test_amounts_have_units() -> None:
    config = ServeConfig(keep_for="1.5h", keep_bytes="50 gb", grace="30S")
    assert (config.keep_for_s, config.keep_for_bytes, config.grace_s) == (5400.0, 50e9, 30.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no keys alone"),
        ("[keys.a]\nkey = 'short'\n", "keys.a.key cannot be used"),
        ("[keys.a]\nkey = 'sixteen or more..'\nrole = 1\n", "keys.a.role"),
        ("[keys.a]\nkey = 'sixteen or more..'\n[keys.b]\nkey = 'sixteen or more..'\n", "the same key twice"),
        ("[keys.a]\nkey = 'sixteen or more.é'\n", "keys.a.key cannot be used"),
        ("[keys.a]\nkey = 'sixteen or more.. '\n", "keys.a.key cannot be used"),
        ("[others.a]\nkey = 'sixteen or more..'\n", "no keys alone"),
        ("keys", "cannot be read"),
    ],
)
def test_files_of_keys_are_checked(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=words) as refused:
        Keys.of(file)
    assert "sixteen" not in str(refused.value)
    with pytest.raises(InvalidConfig, match="cannot be read"):
        Keys.of(tmp_path / "none.toml")


def test_the_pace_is_of_what_was_done_last() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.seconds_for(10.0) == UNKNOWN_S
    for _ in range(60):
        now += 2.0
        pace.done(10.0)
    assert pace.seconds_for(10.0) == 2
    assert pace.seconds_for(0.001) == 1
    assert pace.seconds_for(1e9) == LONGEST_S


def test_time_in_which_nothing_is_done_is_not_in_the_pace() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    now = 36_000.0
    pace.idle()
    now += 2.0
    pace.done(10.0)
    assert pace.seconds_for(10.0) == 2


def test_a_full_disk_has_room_for_a_deletion_once_the_video_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = DataFolder(tmp_path / "data")
    store = Store(folder.jobs)
    settings = ServeConfig(data_dir=folder.path)
    outcomes = Outcomes(store, folder, settings, Metrics(lambda: Now(0, 0, 0, True, False, [])))
    jobs = [stored(store) for _ in range(2)]
    remove, full = store.remove, {folder.video(jobs[0])}

    def refuse(job: str) -> bool:
        if any(path.exists() for path in full):
            raise sqlite3.OperationalError("database or disk is full")
        return remove(job)

    monkeypatch.setattr(store, "remove", refuse)
    for job in jobs:
        store.start(job)
        folder.video(job).write_bytes(b"x")
        store.complete(job, 1, -1.0)
    outcomes.expire()
    assert store.expired(1e9) == [] and not list(folder.videos.iterdir())
    full.add(tmp_path)
    client = Client()
    service = Service.__new__(Service)
    service._store, service._outcomes = store, outcomes
    with pytest.raises(Refusal, match="cannot be deleted") as refused:
        service.delete(client, stored(store))
    assert refused.value.status == 507
    store.close()
    folder.close()


# Who waits.


@pytest.mark.parametrize(("others", "kept", "wanted"), [(0, False, True), (1, False, False), (0, True, False)])
def test_a_job_goes_with_the_last_who_waits_and_only_if_these_made_it(others: int, kept: bool, wanted: bool) -> None:
    waiters = Waiters()
    with waiters.waiting("a", True), ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(waiters.waiting("a", False))
        if kept:
            waiters.keep("a")
        assert waiters.is_for_one("a") == wanted
        stack.close()
        assert waiters.is_for_one("a") != kept
    with waiters.waiting("a", False):
        assert not waiters.is_for_one("a")
