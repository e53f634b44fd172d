"""Answers over HTTP by a service that is a stub."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cineline.server.app import Parts, make_app
from cineline.server.images import Images
from cineline.server.keys import Keys
from cineline.server.metrics import Metrics, Now

CONTENT = "/v1/videos/a/content"


def asked(tmp_path: Path, ask: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> tuple[httpx.Response, str]:
    """The answer, and the metrics behind it."""
    file = tmp_path / "a.mp4"
    file.write_bytes(b"0123456789")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    service: Any = SimpleNamespace(finished=lambda *_: SimpleNamespace(id="a"), get=fail, names=["m"])
    folder: Any = SimpleNamespace(video=lambda job: file)
    metrics = Metrics(lambda: Now(0, 0, 0, True, False, []))
    app = make_app(Parts(service, folder, Keys(), Images(), metrics))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await ask(client)

    return asyncio.run(run()), metrics.text().decode()


def test_what_fails_is_in_the_metrics(tmp_path: Path) -> None:
    answer, metrics = asked(tmp_path, lambda client: client.get("/v1/videos/a"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert 'cineline_http_seconds_count{route="/v1/videos/{video_id}",status="500"} 1.0' in metrics


@pytest.mark.parametrize("given", ["bytes=abc", "bytes=5-2", "bytes=0-1,4-5", "items=0-3", "bytes=-", ""])
def test_ranges_that_are_none_or_several_give_the_whole(given: str, tmp_path: Path) -> None:
    answer, _ = asked(tmp_path, lambda client: client.get(CONTENT, headers={"Range": given}))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.content == b"0123456789"


@pytest.mark.parametrize(("given", "content"), [("bytes=2-4", b"234"), ("bytes=-3", b"789"), ("bytes=7-", b"789")])
def test_one_range_gives_a_part(given: str, content: bytes, tmp_path: Path) -> None:
    answer, _ = asked(tmp_path, lambda client: client.get(CONTENT, headers={"Range": given}))
    assert (answer.status_code, answer.content) == (206, content)


def test_a_head_says_how_long_it_is(tmp_path: Path) -> None:
    answer, _ = asked(tmp_path, lambda client: client.head(CONTENT))
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "10", b"")
