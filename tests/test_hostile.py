"""Whatever is sent to the service: it answers 4xx, lives on, and leaves other jobs alone."""

from __future__ import annotations

import base64
import gc
import io
import json
import socket
import string
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from oracle import Checkpoint
from PIL import Image
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import LIMIT_S, create, get, serving, small_model, wait_done
from test_served_parts import png
from test_server import data_url, generated, picture

from cineline import VideoRequest
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.server import body, protocol
from cineline.server.orders import KNOWN

JSON = {"content-type": "application/json"}
Sent = tuple[bytes, dict[str, str]]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(checkpoint(RandomConfig("ti2v", seed=3)), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(model, tmp_path_factory.mktemp("served") / "data", step_s=0.02, queue_limit=10_000) as client:
        yield client


def form(*parts: tuple[str, str, bytes], boundary: str = "x", end: str = "--\r\n") -> Sent:
    """Name, further words of the head, content."""
    lines = []
    for name, words, content in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{words}\r\n\r\n'
        lines.append(head.encode() + content + b"\r\n")
    whole = b"".join(lines) + f"--{boundary}{end}".encode()
    return whole, {"content-type": f"multipart/form-data; boundary={boundary}"}


def not_json() -> Iterator[Sent]:
    texts = [
        "",
        "{",
        "[",
        "nul",
        "{'prompt': 'a'}",
        '{"prompt": "a"',
        '{"prompt": "a",}',
        '{"prompt": "a"}}',
        "\ufeff{}",
    ]
    texts += [
        "[]",
        "3",
        '"a"',
        "null",
        "true",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"prompt": "\\ud8"}',
        "\0",
        "{}",
        "{}\0",
    ]
    texts += [
        '{"prompt": "a", "seed": ' + value + "}" for value in ("NaN", "Infinity", "-Infinity", "1e", "0x10", "+1")
    ]
    for text in texts:
        yield text.encode(), JSON
    for raw in (b"\xff\xfe{}", b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', bytes(range(256)), b"\x80" * 1000):
        yield raw, JSON
    for encoding in ("utf-16", "utf-32"):
        yield '{"prompt": "a"}'.encode(encoding), JSON


def strange_values() -> Iterator[Sent]:
    numbers = [
        -1,
        0,
        2**31,
        2**63,
        2**64,
        10**30,
        1e308,
        -1e308,
        1e-320,
        0.5,
        "NaN",
        "1e999",
        "",
        [],
        {},
        [1],
        {"a": 1},
    ]
    for name in ("height", "width", "num_frames", "num_inference_steps", "fps", "seed"):
        for value in numbers:
            if not (name == "seed" and value in (0, 2**31, 2**63)):
                yield json.dumps({"prompt": "a", name: value}).encode(), JSON
    for name in ("guidance_scale", "flow_shift", "timeout_s"):
        for value in ("1e999", "x", [], {}, True):
            yield json.dumps({"prompt": "a", name: value}).encode(), JSON
    for digits in (400, 5000, 1_000_000):
        yield f'{{"prompt": "a", "seed": {"9" * digits}}}'.encode(), JSON
        yield f'{{"prompt": "a", "guidance_scale": 1e{"9" * digits}}}'.encode(), JSON
    for text in ("\ud800", "\udfff\ud800", "a\0", "\ud83d"):
        for name in ("prompt", "negative_prompt", "user", "model", "size", text):
            yield json.dumps({"prompt": "a", name: text}).encode(), JSON
        yield json.dumps({"prompt": "a", "loras": [text]}).encode(), JSON
    for depth in (1, 100, 900):
        for name in ("loras", "sigmas", "prompt", "seed"):
            yield f'{{"prompt": "a", "{name}": {"[" * depth}"x"{"]" * depth}}}'.encode(), JSON
    yield json.dumps({"prompt": "a", "sigmas": [1e-9] * 100_000}).encode(), JSON
    yield json.dumps({"prompt": "a", "loras": ["../../x"] * 100_000}).encode(), JSON


def strange_texts() -> Iterator[Sent]:
    """Nothing that a client says becomes a path; of prompts and users, which may be anything, see below."""
    for path in ("../../../etc/passwd", "/etc/passwd", "..\\..\\x", "file:///etc/passwd", "%2e%2e%2f", "a/../../b"):
        for name in ("model", "size", "seconds", "priority", "input_reference", "image", "image_reference", path):
            yield json.dumps({"prompt": "a", name: path}).encode(), JSON
        yield form(("prompt", "", b"a"), (path, "", b"x"))
        yield form(("prompt", "", b"a"), ("input_reference", f'; filename="{path}"', b"none"))
    yield json.dumps({"prompt": "a" * 1_000_000}).encode(), JSON
    yield json.dumps({"prompt": "a", "x" * 1_000_000: 1}).encode(), JSON
    yield json.dumps({"prompt": "a", **{f"f{number}": 1 for number in range(10_000)}}).encode(), JSON


def strange_forms() -> Iterator[Sent]:
    whole, headers = form(("prompt", "", b"a"), ("input_reference", '; filename="a.png"', picture()))
    for length in (0, 1, 10, 40, 60, 80, 150, len(whole) // 2, len(whole) - 10, len(whole) - 4):
        yield whole[:length], headers
    for words in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=y"):
        yield whole, {"content-type": words}
    yield whole, {"content-type": f"multipart/form-data; boundary={'b' * 5000}"}
    yield form(("prompt", "", b"a"), ("prompt", "", b"b"))
    yield form(("prompt", "", b"\xff\xfe\0"))
    yield form(("prompt", '; filename="a"', b"a"))
    yield form(*[(f"f{number}", "", b"x") for number in range(1000)])
    yield form(*[(f"f{number}", '; filename="a"', b"x") for number in range(100)])
    yield form(("prompt", "", b"a"), ("seed", "", b"1e999"))
    yield form(("prompt", "", b"a"), ("seed", "", b"9" * 10_000))
    yield form(("prompt", "", b"a"), ("height", "", b"nan"))
    yield form(("prompt", "", b"a"), ("input_reference[image_url]", "", b"http://127.0.0.1/a"))
    yield form(("prompt", "", b"a"), ("input_reference[other]", "", b"x"))
    yield b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}
    yield b'{"prompt": "a"}', {}


def strange_images() -> Iterator[Sent]:
    gif, webp = io.BytesIO(), io.BytesIO()
    Image.new("P", (9, 9)).save(gif, "GIF")
    Image.new("RGB", (9, 9)).save(webp, "WEBP")
    whole = picture()
    contents = [png(50_000, 50_000), png(16_000, 16_000), png(2**31 - 1, 1), gif.getvalue(), whole[:100], whole[:-50]]
    contents += [webp.getvalue()[:20], b"", b"\x89PNG\r\n\x1a\n", zlib.compress(b"\0" * 10**7), b"\xff\xd8\xff" * 1000]
    for content in contents:
        yield json.dumps({"prompt": "a", "input_reference": data_url(content)}).encode(), JSON
        yield form(("prompt", "", b"a"), ("input_reference", '; filename="a.png"', content))
    for address in (
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:;base64,a",
        "data:image/png;base64," + "A" * 10**6,
    ):
        yield json.dumps({"prompt": "a", "input_reference": address}).encode(), JSON
        yield json.dumps({"prompt": "a", "input_reference": {"image_url": {"url": address}}}).encode(), JSON
    yield (
        json.dumps(
            {"prompt": "a", "input_reference": {"image_url": "data:" + base64.b64encode(whole).decode()}}
        ).encode(),
        JSON,
    )
    yield b"\0" * (body.BODY_LIMIT + 1), JSON


KINDS: list[Callable[[], Iterator[Sent]]] = [not_json, strange_values, strange_texts, strange_forms, strange_images]


def test_at_least_two_hundred_hostile_bodies_are_refused(client: httpx.Client, model: Path, tmp_path: Path) -> None:
    bystander = create(client, num_inference_steps=100, seed=3)["id"]
    bodies = [sent for kind in KINDS for sent in kind()]
    assert len(bodies) >= 200
    process, memory = psutil.Process(), []
    for _ in range(2):
        for content, headers in bodies:
            answer = client.post("/v1/videos", content=content, headers=headers)
            assert 400 <= answer.status_code < 500, (answer.status_code, answer.text, content[:200], headers)
            assert answer.json()["error"]["message"]
        gc.collect()
        memory.append(process.memory_info().rss)
    assert memory[1] - memory[0] < 100e6
    assert client.get("/ready").status_code == 200
    assert [video["id"] for video in client.get("/v1/videos").json()["data"]] == [bystander]
    assert wait_done(client, bystander)["status"] == "completed"
    wanted = generated(model, tmp_path, [VideoRequest(prompt="a cat", num_inference_steps=100, seed=3)])
    assert [client.get(f"/v1/videos/{bystander}/content").content] == wanted
    client.delete(f"/v1/videos/{bystander}")


def test_prompts_and_users_may_be_any_text(client: httpx.Client) -> None:
    for text in ("../../x", "'; DROP TABLE jobs; --", "\u202e\U0001f600\n\t", "<script>", string.printable):
        made = create(client, prompt=text, user=text, negative_prompt=text)
        assert get(client, made["id"])["prompt"] == text and made["user"] == text
        client.delete(f"/v1/videos/{made['id']}")


def raw(client: httpx.Client) -> socket.socket:
    url = client.base_url
    return socket.create_connection((url.host, url.port or 80), timeout=LIMIT_S)


def answered(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_floods_of_headers_and_nonsense_are_refused(client: httpx.Client) -> None:
    heads = [
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100_000,
        b"GET / HTTP/1.1\r\nX: " + b"y" * 1_000_000,
        b"GET /" + b"a" * 1_000_000,
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01" + b"\0" * 100,
        b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ]
    for head in heads:
        connection = raw(client)
        try:
            connection.sendall(head)
            assert answered(connection)[:12].startswith(b"HTTP/1.1 4"), head[:60]
        except (ConnectionResetError, BrokenPipeError):  # it was refused before all of it was sent
            connection.close()
    assert client.get("/health").status_code == 200


def test_slow_clients_are_let_go(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_LIMIT_S", 0.5)
    with raw(client) as silent, raw(client) as slow:
        slow.sendall(b"GET /health HT")
        for connection in (silent, slow):
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
            assert connection.recv(1000) == b""
    with raw(client) as kept:
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += kept.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.8)  # nothing is asked, which is no offence
        kept.sendall(b"GET /health HT")
        assert kept.recv(1000).startswith(b"HTTP/1.1 408")
    head = b"POST /v1/videos HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with raw(client) as cut:
        cut.sendall(head + b'{"prompt"')
    monkeypatch.setattr(body, "TIME_LIMIT_S", 0.5)
    with raw(client) as late:
        late.sendall(head + b'{"prompt"')
        assert late.recv(1000).startswith(b"HTTP/1.1 408")
    assert client.get("/health").status_code == 200


def test_many_at_once_are_all_answered(client: httpx.Client) -> None:
    def ask(number: int) -> int:
        if number % 2:
            return client.get("/v1/videos").status_code
        return client.post("/v1/videos", content=b"{" * number, headers=JSON).status_code

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(ask, range(400))) == {200, 400}


CHECKS = (status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.serve)])
def test_the_document_is_true(client: httpx.Client, examples: int) -> None:
    """What it allows is answered as it says, what it does not is refused, and nothing is answered by 5xx."""
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    document: dict[str, Any] = client.get("/openapi.json").json()
    body_of = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body_of["properties"]) == set(KNOWN)
    for found in schema.exclude(path_regex="events|sync").get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            answer = case.call(base_url=str(client.base_url), timeout=LIMIT_S)
            assert answer.status_code < 500, answer.text
            case.validate_response(answer, checks=CHECKS)
            if case.method == "POST" and answer.status_code == 200:
                client.delete(f"/v1/videos/{answer.json()['id']}")

        ask()
