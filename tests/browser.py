"""Debian's Chromium, driven by Playwright, and what a page of it must not do."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import httpx
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="The page's tests need Playwright.")
Browser, Page = sync_api.Browser, sync_api.Page

LIMIT_MS = 60_000
LOOK_EVERY_MS = 50

NOT_ANSWERED = "Failed to load resource"
"""What Chromium itself says of answers of 4xx, and of a service that is gone."""


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; the tests are skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("The page's tests need Chromium: apt install chromium.")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Seen:
    """A page, and what has come of it.

    Attributes:
        wrong: errors of its scripts, and what its policy has refused. hosts: that it has asked.
    """

    page: Any
    wrong: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def console(self, message: Any) -> None:
        """What the browser says of the page."""
        if message.type == "error":
            self.wrong.append(message.text)

    def modules(self, script: str, *given: Any) -> Any:
        """What a function of the page's modules gives: (main, timeline, line, colours, given) => ..."""
        names = ("main", "timeline", "line", "colours")
        loading = ", ".join(f"import('/page/{name}.js')" for name in names)
        return self.page.evaluate(f"async (given) => ({script})(...await Promise.all([{loading}]), ...given)", given)

    def wait(self, script: str) -> None:
        """Until it is so. (Playwright's own way evaluates texts in the page, which its policy refuses.)"""
        deadline = time.monotonic() + LIMIT_MS / 1000
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(LOOK_EVERY_MS)


@contextmanager
def opened_page(browser: Any, client: httpx.Client, **options: Any) -> Iterator[Seen]:
    """The service's page; it asks no other host, and nothing goes wrong in it."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    seen = Seen(page)
    page.on("pageerror", lambda error: seen.wrong.append(str(error)))
    page.on("console", seen.console)
    page.on("request", lambda request: seen.hosts.add(request.url.partition("://")[2].partition("/")[0]))
    try:
        page.goto(f"{client.base_url}/")
        yield seen
        own = {client.base_url.netloc.decode()}
        assert seen.hosts - {""} == own  # of data: URLs there is none
        assert not [words for words in seen.wrong if NOT_ANSWERED not in words]
    finally:
        context.close()


def serious(page: Any) -> list[str]:
    """What axe-core finds that keeps people out."""
    axe = resources.files("axe_playwright_python") / "axe.min.js"
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']}: {json.dumps([node['html'][:200] for node in each['nodes']])}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
