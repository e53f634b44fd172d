"""The service over HTTP: OpenAI's client unmodified, the engine's bits, and every refusal in one shape."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from oracle import Checkpoint
from PIL import Image
from served import LIMIT_S, NAME, create, get, serving, small_model, wait_done

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.server.fields import listed, typed
from cineline.server.refusal import Refusal

KEY = "a key of sixteen or more"


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of a service that all tests share which leave no job behind."""
    data = tmp_path_factory.mktemp("served") / "data"
    with serving(model, data, aliases=("sora-2",)) as client:
        yield client


@pytest.fixture
def stock(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEY, max_retries=0)


def picture(size: tuple[int, int] = (40, 32), form: str = "PNG") -> bytes:
    written = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(written, form)
    return written.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def generated(model: Path | Engine, folder: Path, requests: list[VideoRequest]) -> list[bytes]:
    """The files of an engine without a service, which is closed then."""
    found = []
    with model if isinstance(model, Engine) else Engine(model, ParallelConfig(pp=2), device="cpu") as engine:
        for number, handle in enumerate([engine.submit(request) for request in requests]):
            handle.result(LIMIT_S).save(folder / f"{number}.mp4")
            found.append((folder / f"{number}.mp4").read_bytes())
    return found


# OpenAI's client.


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_stock_client_makes_videos(stock: openai.OpenAI, model: Path, tmp_path: Path) -> None:
    made = stock.videos.create(prompt="a cat", model="sora-2", seconds="1", size="64x32")  # type: ignore[arg-type]
    assert (made.object, made.model, made.status, made.seconds, made.size) == (
        "video",
        "sora-2",
        "queued",
        "1",
        "64x32",
    )
    done = stock.videos.create_and_poll(prompt="a dog", extra_body={"seed": 3, "num_frames": 9})
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at is not None and done.expires_at is not None
    assert stock.videos.poll(made.id).status == "completed"
    assert [video.id for video in stock.videos.list(limit=1)] == [done.id, made.id]  # two pages
    assert stock.videos.list(order="asc").data[0].id == made.id
    assert stock.videos.retrieve(made.id).prompt == "a cat"
    requests = [
        VideoRequest(prompt="a cat", num_frames=9, width=64, height=32),
        VideoRequest(prompt="a dog", seed=3, num_frames=9),
    ]
    for video, content in zip((made, done), generated(model, tmp_path, requests), strict=True):
        assert stock.videos.download_content(video.id).read() == content
        frame = Image.open(io.BytesIO(stock.videos.download_content(video.id, variant="thumbnail").read()))
        assert frame.format == "WEBP" and f"{frame.width}x{frame.height}" == video.size
    for video in (made, done):
        assert stock.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            stock.videos.retrieve(video.id)
    assert stock.videos.list().data == []


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_stock_client_gives_a_first_frame(stock: openai.OpenAI, model: Path, tmp_path: Path) -> None:
    content = picture()
    path = tmp_path / "first.png"
    path.write_bytes(content)
    in_json = {"input_reference": {"image_url": data_url(content)}}  # which the client itself takes for a file
    ways: list[tuple[Any, dict[str, Any]]] = [(path, {}), (("x.png", content, "image/png"), {}), (openai.omit, in_json)]
    found = []
    for reference, fields in ways:
        video = stock.videos.create_and_poll(
            prompt="it turns", input_reference=reference, extra_body={"seed": 7, **fields}
        )
        found.append(stock.videos.download_content(video.id).read())
        stock.videos.delete(video.id)
    (wanted,) = generated(model, tmp_path, [VideoRequest(prompt="it turns", image=path, seed=7)])
    assert found == [wanted] * 3


def test_a_last_frame_comes_in_other_services_words(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = small_model(checkpoint(RandomConfig("i2v", seed=3)), tmp_path)
    first, last = tmp_path / "first.png", tmp_path / "last.png"
    first.write_bytes(picture())
    last.write_bytes(picture((32, 64)))
    fields = {"prompt": "", "fit": "crop"}
    with serving(model, tmp_path / "data") as client:
        pictures = {"image": data_url(first.read_bytes()), "last_frame": data_url(last.read_bytes())}
        form = {"input_reference": first.read_bytes(), "last_image": last.read_bytes()}
        jobs = [create(client, **fields, **pictures)["id"]]
        jobs.append(client.post("/v1/videos", data=fields, files=form).raise_for_status().json()["id"])
        for job in jobs:
            assert wait_done(client, job)["status"] == "completed"
        found = [client.get(f"/v1/videos/{job}/content").content for job in jobs]
    requests = [
        VideoRequest(prompt="", fit="crop", image=first, last_image=last),
        VideoRequest(prompt="", fit="crop", image=first),
    ]
    wanted = generated(model, tmp_path, requests)
    assert found == [wanted[0]] * 2 and wanted[0] != wanted[1]


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_stock_client_understands_every_refusal(stock: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        stock.videos.create(prompt="a cat", model="sora-3")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="remix is not supported"):
        stock.videos.remix("video_123", prompt="more")
    with pytest.raises(openai.BadRequestError, match="edits is not supported"):
        stock.videos.edit(prompt="more", video=b"none")
    with pytest.raises(openai.BadRequestError, match="extensions is not supported"):
        stock.videos.extend(prompt="more", seconds="4", video=b"none")
    with pytest.raises(openai.BadRequestError, match="characters is not supported"):
        stock.videos.create_character(name="me", video=b"none")
    with pytest.raises(openai.BadRequestError, match="characters is not supported"):
        stock.videos.get_character("char_1")
    assert [each.id for each in stock.models.list()] == [NAME, "sora-2"]
    assert stock.models.retrieve("sora-2").id == "sora-2"


def test_eight_clients_at_once_get_the_bits_of_an_engine(client: httpx.Client, model: Path, tmp_path: Path) -> None:
    fields = [
        {"prompt": f"cat {n}", "seed": n, "num_frames": 5 + 4 * (n % 3), "width": 32 + 32 * (n % 2)} for n in range(8)
    ]

    def one(given: dict[str, Any]) -> bytes:
        job = create(client, **given)["id"]
        assert wait_done(client, job)["status"] == "completed"
        content = client.get(f"/v1/videos/{job}/content").content
        assert client.delete(f"/v1/videos/{job}").status_code == 200
        return content

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, fields))
    assert found == generated(model, tmp_path, [VideoRequest(**given) for given in fields])


# What is asked for.


def asked(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A job as it is answered, which is gone then."""
    made = create(client, **fields)
    assert client.delete(f"/v1/videos/{made['id']}").json() == {
        "id": made["id"],
        "deleted": True,
        "object": "video.deleted",
    }
    return made


@pytest.mark.parametrize("seconds", ["1", 1, 1.0, "1.0"])
def test_seconds_are_text_or_a_number(client: httpx.Client, seconds: Any) -> None:
    assert (made := asked(client, seconds=seconds))["num_frames"] == 9
    assert made["seconds"] == "1"
    assert asked(client, seconds=seconds, fps=16)["num_frames"] == 17
    assert asked(client, seconds=seconds, num_frames=9)["num_frames"] == 9


def test_a_form_says_the_same_as_json(client: httpx.Client) -> None:
    fields = {"prompt": "a cat", "seed": 5, "guidance_scale": 2.5, "size": "64x32", "seconds": "0.5", "user": "me"}
    form = client.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()})
    assert form.status_code == 200, form.text
    told = [{**made, "id": "", "created_at": 0} for made in (form.json(), asked(client, **fields))]
    assert told[0] == told[1]
    assert told[0]["guidance_scale"] == 2.5 and told[0]["user"] == "me"
    client.delete(f"/v1/videos/{form.json()['id']}")


def test_every_field_of_a_request_reaches_the_engine(client: httpx.Client, model: Path, tmp_path: Path) -> None:
    """The same bits, whether they come as JSON or in a form; and other bits than without each of them."""
    ways: list[dict[str, Any]] = [
        {"solver": "euler"},
        {"sigmas": [1, 0.75, 0.5, 0.25], "num_inference_steps": 4},
        {"preset": "lightning", "guidance_scale": 1.0, "skip_guidance_at_one": True},
        {"flow_shift": 3.0, "negative_prompt": "a dog"},
    ]
    asks = [{"prompt": "a cat", **way} for way in ways]
    found: list[list[bytes]] = [[], []]
    for fields in asks:
        parts = [(name, (None, text)) for name, value in fields.items() for text in texts_of_form(value)]
        answers = client.post("/v1/videos", json=fields), client.post("/v1/videos", files=parts)
        for answer, contents in zip(answers, found, strict=True):
            assert answer.status_code == 200, answer.text
            assert wait_done(client, answer.json()["id"])["status"] == "completed"
            contents.append(client.get(f"/v1/videos/{answer.json()['id']}/content").content)
            client.delete(f"/v1/videos/{answer.json()['id']}")
    wanted = generated(model, tmp_path, [VideoRequest(**fields) for fields in [*asks, {"prompt": "a cat"}]])
    assert found == [wanted[:-1]] * 2
    assert len(set(wanted)) == len(wanted)


def texts_of_form(value: Any) -> list[str]:
    """As clients write a field's value."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def test_forms_say_lists_in_every_clients_way() -> None:
    assert typed({}, {"sigmas": ["1,0.5"]}) == {"sigmas": "1,0.5"}
    assert typed({}, {"sigmas": ["1", "0.5"], "loras": ["a"]}) == {"sigmas": [1.0, 0.5], "loras": ["a"]}
    assert [listed(name) for name in ("loras", "loras[]", "seed[]", "seed")] == ["loras", "loras", None, None]
    assert typed({"skip_guidance_at_one": "false", "seed": "3", "fps": "8", "flow_shift": "2.5"}, {}) == {
        "skip_guidance_at_one": False,
        "seed": 3,
        "fps": 8,
        "flow_shift": 2.5,
    }
    for name, text in (("skip_guidance_at_one", "yes"), ("seed", "x"), ("flow_shift", "nan"), ("fps", "2.5")):
        with pytest.raises(Refusal, match=f"{name}='{text}' is no"):
            typed({name: text}, {})
    with pytest.raises(Refusal, match="sigmas='x' is no number"):
        typed({}, {"sigmas": ["1", "x"]})


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "has no 'prompt'"),
    ({"prompt": " "}, "prompt", "is empty"),
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": 3}, "prompt", "cannot be used"),
    ({"prompt": "a\0b"}, "prompt", "a zero"),
    ({"prompt": "x" * 20_001}, "prompt", "20001 characters"),
    ({"promt": "a"}, "promt", "nearest known one is 'prompt'"),
    ({"steps": 3}, "steps", "nearest known one is"),
    ({"decode": False}, "decode", "Unknown field"),
    ({"model": "sora-3"}, "model", "use small or sora-2"),
    ({"model": "../small"}, "model", "is not served here"),
    ({"size": "100x32"}, "size", "the nearest is 96x32"),
    ({"size": "32X32"}, "size", "WIDTHxHEIGHT"),
    ({"size": "1920x1080"}, "size", "the nearest is 1920x1088"),
    ({"size": 3}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x32", "width": 32}, "width", "differ"),
    ({"height": 33}, "height", "use 32 or 64"),
    ({"height": 0}, "height", "use 32 or 64"),
    ({"height": 32.5}, "height", "cannot be used"),
    ({"height": 2**60}, "height", "tokens"),
    ({"num_frames": 6}, "num_frames", "use 5 or 9"),
    ({"num_frames": 10**9 + 1}, "num_frames", "tokens"),
    ({"seconds": "1.1"}, "seconds", "use 1 or 1.5 seconds"),
    ({"seconds": "four"}, "seconds", "is no length"),
    ({"seconds": -1}, "seconds", "is no length"),
    ({"seconds": True}, "seconds", "is no length"),
    ({"seconds": 1, "num_frames": 5}, "seconds", "give one"),
    ({"num_inference_steps": 10_001}, "num_inference_steps", "above 10000"),
    ({"seed": -1}, "seed", "out of range"),
    ({"seed": 2**70}, "seed", "out of range"),
    ({"fps": 0}, "fps", "below 1"),
    ({"guidance_scale": "3"}, "guidance_scale", "it is no number"),
    ({"guidance_scale_2": 3}, "guidance_scale_2", "two experts"),
    ({"timeout_s": 0}, "timeout_s", "above 0"),
    ({"solver": "heun"}, "solver", "use 'unipc', 'euler', 'dpm++' or 'lcm'"),
    ({"sigmas": [0.5, 1.0], "num_inference_steps": 2}, "sigmas", "fall"),
    ({"sigmas": [1.0, "x"]}, "sigmas", "cannot be used"),
    ({"preset": "fast"}, "preset", "use 'lightning'"),
    ({"switch_step": 2}, "switch_step", "two experts"),
    ({"skip_guidance_at_one": "yes"}, "skip_guidance_at_one", "cannot be used"),
    ({"loras": ["a"]}, "loras", "lora_mode='runtime'"),
    ({"loras": "a"}, "loras", "cannot be used"),
    ({"num_videos": 2}, "num_videos", "send a request for each"),
    ({"preview": 0}, "preview", "not from 1"),
    ({"fit": "squeeze"}, "fit", "use 'stretch', 'crop' or 'pad'"),
    ({"seed": "four"}, "seed", "give one, or random"),
    ({"last_image": data_url(picture())}, None, "image"),
    ({"last_frame": "x", "last_image": "y"}, "last_frame", "mean the same"),
    ({"lora": {"name": "a"}}, "lora", "the nearest known one is 'loras'"),
    ({"priority": "urgent"}, "priority", "use low, normal, high"),
    ({"user": "u" * 257}, "user", "256"),
    ({"input_reference": "../../etc/passwd"}, "input_reference", "is no image"),
    ({"input_reference": 3}, "input_reference", "is no image"),
    ({"input_reference": {"file_id": "file-1"}}, "input_reference", "file_id is not supported"),
    ({"input_reference": {"image_url": 3}}, "input_reference", "is no image"),
    ({"input_reference": "https://example.org/a.png"}, "input_reference", "nothing is fetched"),
    ({"input_reference": "data:image/png;base64,!!!!"}, "input_reference", "cannot be read"),
    ({"input_reference": "data:image/png,abc"}, "input_reference", "not in base64"),
    ({"input_reference": data_url(b"no image")}, "input_reference", "cannot be read"),
    ({"input_reference": data_url(b""), "image": "x"}, "image", "mean the same"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_made_is_refused_with_what_would_work(
    client: httpx.Client, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = client.post("/v1/videos", json={"prompt": "a cat", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    assert client.get("/v1/videos").json()["data"] == []


def test_sizes_may_be_fitted(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", fit_sizes=True) as client:
        made = asked(client, size="70x33")
        assert (made["size"], made["requested_size"]) == ("64x32", "70x33")
        made = asked(client, height=50)
        assert (made["size"], made["requested_size"]) == ("32x64", "x50")
        assert asked(client, size="64x32")["requested_size"] is None


@pytest.mark.parametrize("path", ["video_1", "..%2f..%2fetc", "video_" + "0" * 32, "a" * 3000, "%00", "é"])
def test_what_is_not_there_is_404(client: httpx.Client, path: str) -> None:
    for answer in (
        client.get(f"/v1/videos/{path}"),
        client.delete(f"/v1/videos/{path}"),
        client.get(f"/v1/videos/{path}/content"),
        client.get(f"/v1/videos/{path}/events"),
        client.get("/v1/videos", params={"after": path}),
    ):
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["message"]


def test_other_paths_and_methods_and_parameters(client: httpx.Client) -> None:
    for answer, status in (
        (client.get("/v2/videos"), 404),
        (client.put("/v1/videos"), 405),
        (client.get("/v1/videos", params={"limit": 0}), 400),
        (client.get("/v1/videos", params={"limit": "x"}), 400),
        (client.get("/v1/videos", params={"order": "up"}), 400),
        (client.get("/v1/models/none"), 404),
        (client.post("/v1/videos", content="x", headers={"content-type": "text/plain"}), 415),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


# A job's life.


def test_progress_is_true_and_only_known_states_are_seen(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", step_s=0.05) as client:
        job = create(client, num_inference_steps=10)["id"]
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["status"] not in ("completed", "failed"):
            seen.append(get(client, job))
            assert client.get(f"/v1/videos/{job}/content").status_code in (200, 404)
        assert [each["progress"] for each in seen] == sorted(each["progress"] for each in seen)
        assert len({each["step"] for each in seen}) > 5
        order = ["waiting", "encoding", "denoising", "decoding", "done"]
        phases = [order.index(each["phase"]) for each in seen]
        assert phases == sorted(phases) and {2, 4} < set(phases)
        for each in seen:
            assert each["status"] in ("queued", "in_progress", "completed")
            assert (each["phase"] == "waiting") == (each["status"] == "queued")
            assert (each["progress"] == 100) == (each["status"] == "completed")
        assert seen[-1]["step"] == 10 and seen[-1]["inference_time_s"] > 0.5


def test_a_deleted_job_stops_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(model, data, step_s=0.05, in_flight=1) as client:
        jobs = [create(client, num_inference_steps=steps)["id"] for steps in (10_000, 10_000, 6, 5, 10_000)]
        while get(client, jobs[0])["step"] < 2:
            time.sleep(0.01)
        for number in (0, 1, 4):  # in the line, next to it, in the queue
            assert client.delete(f"/v1/videos/{jobs[number]}").json()["deleted"]
        for number in (2, 3):
            assert wait_done(client, jobs[number])["status"] == "completed"
        assert [each["id"] for each in client.get("/v1/videos").json()["data"]] == [jobs[3], jobs[2]]
        deadline = time.monotonic() + LIMIT_S
        while list((data / "snapshots").glob("0*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert sorted(path.stem for path in (data / "videos").iterdir()) == sorted(jobs[2:4])


def test_a_failed_job_says_why_with_200(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", step_s=0.05) as client:
        done = wait_done(client, create(client, timeout_s=0.3, num_inference_steps=1000)["id"])
        assert (done["status"], done["error"]["code"]) == ("failed", "timed_out")
        assert "timeout_s=0.3" in done["error"]["message"]
        answer = client.get(f"/v1/videos/{done['id']}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "timed_out")


def test_parts_of_a_file_can_be_had(client: httpx.Client) -> None:
    job = create(client)["id"]
    wait_done(client, job)
    whole = client.get(f"/v1/videos/{job}/content")
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
    with av.open(io.BytesIO(whole.content), "r") as container:
        assert len(list(container.decode(video=0))) == 5
    part = client.get(f"/v1/videos/{job}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert client.get(f"/v1/videos/{job}/content", headers={"Range": "bytes=999999999-"}).status_code == 416
    refused = client.get(f"/v1/videos/{job}/content", params={"variant": "spritesheet"})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "not_supported"
    client.delete(f"/v1/videos/{job}")


def test_a_video_can_be_waited_for(client: httpx.Client, model: Path, tmp_path: Path) -> None:
    answer = client.post("/v1/videos/sync", json={"prompt": "a cat", "seed": 1})
    assert answer.status_code == 200 and answer.headers["x-model"] == NAME
    assert [answer.content] == generated(model, tmp_path, [VideoRequest(prompt="a cat", seed=1)])
    client.delete(f"/v1/videos/{answer.headers['x-request-id']}")
    refused = client.post("/v1/videos/sync", json={"prompt": "a cat", "num_frames": 3})
    assert refused.json()["error"]["param"] == "num_frames"


def test_who_hangs_up_cancels_what_was_waited_for(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data", step_s=0.05) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/videos/sync", json={"prompt": "a cat", "num_inference_steps": 10_000}, timeout=1.0)
        deadline = time.monotonic() + LIMIT_S
        while client.get("/v1/videos").json()["data"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_who_hangs_up_cancels_nothing_that_another_has_asked_for(client: httpx.Client) -> None:
    headers, fields = {"Idempotency-Key": "shared"}, {"prompt": "a cat", "num_inference_steps": 2000}
    job = client.post("/v1/videos", json=fields, headers=headers).json()["id"]
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/videos/sync", json=fields, headers=headers, timeout=0.5)
    time.sleep(0.5)
    assert get(client, job)["id"] == job
    client.delete(f"/v1/videos/{job}")


def test_an_idempotency_key_makes_one_job(client: httpx.Client) -> None:
    def ask(key: str, **fields: Any) -> httpx.Response:
        return client.post("/v1/videos", json={"prompt": "a cat", **fields}, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ask("one").json()["id"], range(8)))
    assert len(set(found)) == 1
    assert ask("two").json()["id"] != found[0]
    conflict = ask("one", seed=1)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    for bad in ("", "x" * 256):
        assert ask(bad).status_code == 400
    for video in client.get("/v1/videos").json()["data"]:
        client.delete(f"/v1/videos/{video['id']}")


# Events and metrics.


Told = list[tuple[str, Any]]


def events_of(client: httpx.Client, path: str, is_enough: Callable[[Told], bool] = lambda found: False) -> Told:
    found: Told = []
    with client.stream("GET", path) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                found.append((name, json.loads(line[5:])))
            if is_enough(found):
                break
    return found


def test_events_tell_all_without_polling(model: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool, serving(model, tmp_path / "data", step_s=0.1) as client:
        last: Told = []
        everything = pool.submit(events_of, client, "/v1/events", lambda found: last != [] and last[0] in found)
        job = create(client, num_inference_steps=8)["id"]
        found = events_of(client, f"/v1/videos/{job}/events")
        assert {name for name, _ in found} == {"video"}
        assert [each["step"] for _, each in found] == sorted(each["step"] for _, each in found)
        assert len(found) > 5 and found[-1][1]["status"] == "completed"
        other = create(client, num_inference_steps=1000)["id"]
        listening = pool.submit(events_of, client, f"/v1/videos/{other}/events")
        while get(client, other)["step"] < 3:
            time.sleep(0.05)
        client.delete(f"/v1/videos/{other}")
        assert listening.result(LIMIT_S)[-1] == ("deleted", {"id": other})
        last.append(("deleted", {"id": other}))
        told = everything.result(LIMIT_S)
        assert ("deleted", {"id": other}) in told
        completed = [each["id"] for name, each in told if name == "video" and each["status"] == "completed"]
        assert completed[0] == job
        ranks = [each for name, line in told if name == "line" for each in line]
        assert {each["rank"] for each in ranks} == {0, 1}
        assert any(each["video"] == job and each["item"].startswith("denoise") for each in ranks)
        assert client.get("/v1/videos/video_1/events").status_code == 404


def test_events_show_what_is_coming(client: httpx.Client) -> None:
    job = create(client, num_inference_steps=40, preview=5)["id"]
    found = events_of(client, f"/v1/videos/{job}/events")
    assert found[-1][1]["status"] == "completed"
    previews = [each for name, each in found if name == "preview"]
    assert previews and [each["step"] for each in previews] == sorted({each["step"] for each in previews})
    for each in previews:
        head, _, content = each["image"].partition(",")
        assert (each["id"], head) == (job, "data:image/webp;base64")
        with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
            assert (shown.format, shown.n_frames) == ("WEBP", 2)  # type: ignore[attr-defined]
    client.delete(f"/v1/videos/{job}")


def test_a_seed_may_be_drawn_and_is_told(client: httpx.Client) -> None:
    seeds = [asked(client, seed="random")["seed"] for _ in range(3)]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)
    assert asked(client, seed=2**64 - 1)["seed"] == 2**64 - 1
    form = client.post("/v1/videos", files={"prompt": (None, "a cat"), "seed": (None, "random")})
    assert form.status_code == 200, form.text
    client.delete(f"/v1/videos/{form.json()['id']}")


def test_metrics_count_what_happens(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "data") as client:
        for _ in range(2):
            wait_done(client, create(client)["id"])
        time.sleep(0.6)  # a beat of the ranks
        text = client.get("/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert lines["cineline_steps_total"] == "8.0"
        assert lines['cineline_jobs_total{outcome="completed"}'] == "2.0"
        assert lines["cineline_queued_jobs"] == "0.0" and lines["cineline_ready"] == "1.0"
        assert lines["cineline_job_seconds_count"] == "2.0"
        assert float(lines['cineline_rank_busy_seconds_total{rank="1"}']) > 0
        assert float(lines['cineline_http_seconds_count{route="/v1/videos",status="200"}']) == 2.0


# Keys and limits.


def test_keys_open_their_own_jobs_alone(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[keys.a]\nkey = "{KEY} a"\nopen_jobs = 2\npriority = "normal"\n[keys.b]\nkey = "{KEY} b"\n')
    with serving(model, tmp_path / "data", api_keys=file, queue_limit=4, step_s=0.05) as client:
        for wrong in (None, "x", KEY, f"{KEY} c", "Bearer", f"{KEY} a{KEY} b"):
            headers = {} if wrong is None else {"Authorization": f"Bearer {wrong}"}
            answer = client.get("/v1/videos", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/ready").status_code == 200
        a, b = ({"Authorization": f"Bearer {KEY} {name}"} for name in "ab")

        def ask(headers: dict[str, str], **fields: Any) -> httpx.Response:
            body = {"prompt": "a cat", "num_inference_steps": 500, **fields}
            return client.post("/v1/videos", json=body, headers=headers)

        assert ask(a, priority="high").status_code == 403
        own = [ask(a, priority="low"), ask(a)]
        assert [each.status_code for each in own] == [200, 200]
        refused = ask(a)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_jobs")
        assert int(refused.headers["retry-after"]) >= 1
        job = own[0].json()["id"]
        for path in (f"/v1/videos/{job}", f"/v1/videos/{job}/content", f"/v1/videos/{job}/events"):
            assert client.get(path, headers=b).status_code == 404
        assert client.delete(f"/v1/videos/{job}", headers=b).status_code == 404
        assert client.get("/v1/videos", headers=b).json()["data"] == []
        assert len(client.get("/v1/videos", headers=a).json()["data"]) == 2
        assert [ask(b, priority="high").status_code for _ in range(2)] == [200, 200]
        full = ask(b)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert client.delete(f"/v1/videos/{job}", headers=a).status_code == 200
        assert ask(a).status_code == 200
