"""Bodies of requests and what follows from them, without a service: none holds up the others, or takes the memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request

from cineline.server.body import JSON_LIMIT, Body, BodyReader
from cineline.server.orders import LIST_LIMIT, _check_text
from cineline.server.refusal import Refusal


def sent(content: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)


def read(content: bytes) -> Body:
    async def read() -> Body:
        async with BodyReader().reading(sent(content)) as given:
            return given

    return asyncio.run(read())


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b"[]," * 400_000 + b"0]",
        b'{"prompt": "a", "sigmas": [' + b"[]," * 400_000 + b"0]}",
        b'{"prompt": "a", "sigmas": [' + b'"data:",' * 200_000 + b"0]}",
    ],
    ids=range(3),
)
def test_json_beside_images_is_refused_before_it_is_parsed(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("It was parsed."))
    with pytest.raises(Refusal) as refused:
        read(content)
    assert refused.value.status == 413


@pytest.mark.parametrize("slash", ["/", "\\/"])
def test_images_in_json_may_be_large(slash: str) -> None:
    text = "data:image/png;base64," + "A/" * JSON_LIMIT
    content = json.dumps({"prompt": "a", "image": text}).replace("/", slash).encode()
    assert read(content).references == {"image": text}


def test_what_is_no_object_is_not_shown_whole() -> None:
    with pytest.raises(Refusal, match="is 'list', no JSON object"):
        read(b"[" + b"1," * 1000 + b"0]")


def test_a_body_is_held_until_it_has_been_used() -> None:
    async def held() -> tuple[int, int]:
        reader = BodyReader()
        async with reader.reading(sent(b'{"prompt": "a"}')):
            within = reader._held
        return within, reader._held

    assert asyncio.run(held()) == (15, 0)


def test_json_is_parsed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: Callable[..., Any] = json.loads

    def parse(*given: Any, **options: Any) -> Any:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return loads(*given, **options)

    monkeypatch.setattr(json, "loads", parse)
    assert read(b'{"prompt": "a"}').fields == {"prompt": "a"}


@pytest.mark.parametrize("name", ["sigmas", "loras"])
def test_lists_have_a_limit(name: str) -> None:
    """Pydantic makes an error of each item that is none."""
    with pytest.raises(Refusal, match=f"has {LIST_LIMIT + 1} items"):
        _check_text(name, [[]] * (LIST_LIMIT + 1))
    _check_text(name, ["a"] * LIST_LIMIT)
