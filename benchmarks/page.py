"""The service's page under load, in headless Chromium: how long its frames take while its list is scrolled.

The service is one that only tells: its HTTP, its events and its page are the real ones, its jobs and its line are made
up, so that nothing else needs the machine's cores.
"""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import uvicorn

from cineline.core.extras import need
from cineline.core.request import Branch, Kind, WorkItem
from cineline.core.trace import Slice
from cineline.engine.ranks import RankState
from cineline.engine.recent import Recent
from cineline.errors import InvalidConfig
from cineline.server.app import Parts, make_app
from cineline.server.images import Images
from cineline.server.keys import Client, Keys
from cineline.server.line import LineView
from cineline.server.metrics import Metrics, Now
from cineline.server.refusal import Refusal
from cineline.server.schemas import ModelField, Takes, VideoObject, VideoPage

COLUMNS = ("arm", "frames", "median, ms", "99 %, ms", "longest, ms", "over 33 ms")

RUNNING = 10
STEPS = 50
ITEM_S = 0.04
"""Of a slice: 25 a second on each rank."""

TOLD_EVERY_S = 0.5
LATE_MS = 33.4
"""Two frames at 60 a second."""

SCREENS = {"1280 px": (1280, 900), "390 px": (390, 844)}
WHEEL = 120
"""Pixels of a notch; it turns 30 times a second."""

TAKES = Takes(
    defaults={"height": 704, "width": 1280, "num_frames": 121, "fps": 24, "num_inference_steps": STEPS}
    | {"guidance_scale": 5.0, "negative_prompt": ""},
    width_step=32,
    height_step=32,
    frames_step=4,
    length=True,
    image="may",
    last_image="no",
    fields=[ModelField(name="flow_shift", description="The solver's time shift", values=[{"type": "number"}])],
    mini=False,
)

SCRIPT = "FireAnimationFrame"
LEAST_MS = 0.2
"""What is less is the callback that counts frames, or a frame in which the page had nothing to draw."""

CATEGORIES = ["devtools.timeline", "devtools.timeline.frame", "disabled-by-default-devtools.timeline.frame"]

WATCH = """() => {
    window.frames_ms = [];
    let before = performance.now();
    const frame = (now) => { window.frames_ms.push(now - before); before = now; requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
}"""


@dataclass(frozen=True)
class PageCase:
    """What is shown: so many jobs, of which ten run, and ranks; and for how many seconds it is scrolled."""

    jobs: int
    ranks: int
    seconds: float


@dataclass(frozen=True)
class Frames:
    """What came of it.

    Attributes:
        ms: from each frame to the next, by the page's clock. drawn_ms: from each that was drawn to the next, in
            Chromium's trace. script_ms: what the page's own script took of each, of a core, in that trace.
    """

    ms: list[float]
    drawn_ms: list[float]
    script_ms: list[float]


class Told:
    """A service's jobs and line, made up: ten jobs run for ever, the others are done."""

    names: Sequence[str] = ("told",)
    takes = TAKES
    stopping = False

    def __init__(self, case: PageCase) -> None:
        self._case, self._began = case, time.time()
        self._jobs = [_job(number, number >= RUNNING) for number in range(case.jobs)]
        self.engine, self.owners = self, self
        self.recent = Recent()
        self.line = LineView(self)  # type: ignore[arg-type]

    @property
    def changes(self) -> int:
        """Of states, there are none."""
        return 0

    @property
    def ranks(self) -> list[RankState]:
        """All are busy."""
        number = int((time.time() - self._began) / ITEM_S)
        since_ns = time.time_ns() - 10**7
        ranks = range(self._case.ranks)
        return [
            RankState(rank, f"denoise {number % STEPS}", (number + rank) % RUNNING, 1.0, since_ns) for rank in ranks
        ]

    def job(self, request: int, client: Client) -> str:
        """Whose a request is."""
        return self._jobs[request].id

    def open_jobs(self, client: Client) -> list[VideoObject]:
        """Those that run, each a step further every second."""
        step = int(time.time() - self._began) % STEPS
        return [job.model_copy(update={"step": step, "progress": 2 * step}) for job in self._jobs[:RUNNING]]

    def ended_since(self, client: Client, moment: float) -> list[VideoObject]:
        """None does."""
        return []

    def preview(self, client: Client, job: str, behind: int) -> None:
        """There are none."""

    def finished(self, client: Client, job: str) -> NoReturn:
        """No job has a file."""
        raise Refusal(404, "There are no videos here.", "video_not_found")

    def page(self, client: Client, after: str | None, limit: int, order: str) -> VideoPage:
        """Of all jobs."""
        names = [job.id for job in self._jobs]
        start = 0 if after is None else names.index(after) + 1
        data = self._jobs[start : start + limit]
        more = start + limit < len(names)
        return VideoPage(data=data, first_id=data[0].id, last_id=data[-1].id, has_more=more)

    def compute(self, over: threading.Event) -> None:
        """Have slices come, as ranks tell of them, until it is over."""
        done = time.time()
        for number in itertools.count():
            if over.wait(TOLD_EVERY_S):
                return
            count = round(TOLD_EVERY_S / ITEM_S)
            for rank, item in itertools.product(range(self._case.ranks), range(count)):
                start_ns = int((done + ITEM_S * item) * 1e9)
                step = WorkItem(Kind.DENOISE, (number * count + item + rank) % RUNNING, item, Branch(item % 2))
                self.recent.add([Slice(rank, step, start_ns, start_ns + int(0.95 * ITEM_S * 1e9), 0)])
            done += TOLD_EVERY_S


def _job(number: int, is_done: bool) -> VideoObject:
    return VideoObject(
        id=f"video_{number:032x}",
        model="told",
        status="completed" if is_done else "in_progress",
        progress=100 if is_done else 0,
        created_at=2_000_000_000 - number,
        seconds="5",
        size="1280x704",
        prompt=f"a cat surfing at sunset, the camera close to the water, number {number}",
        phase="done" if is_done else "denoising",
        step=STEPS if is_done else 0,
        num_inference_steps=STEPS,
        decoded=0,
        restarts=0,
        num_frames=121,
        fps=24,
        guidance_scale=5.0,
        seed=number,
        priority="normal",
        inference_time_s=61.5 if is_done else None,
    )


def measure(case: PageCase, tell: Callable[[str], None]) -> tuple[str, dict[str, Frames]]:
    """Chromium's version, and what came of each screen.

    Raises:
        InvalidConfig: there is no Chromium, or no Playwright.
    """
    need("fastapi")
    path = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        path = None
    if path is None:
        raise InvalidConfig("There is no Chromium with Playwright: apt install chromium, pip install playwright.")
    found = {}
    with _telling(case) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (width, height) in SCREENS.items():
            tell(name)
            found[name] = _scrolled(browser, address, case, {"width": width, "height": height})
        version = browser.version
        browser.close()
    return version, found


@contextmanager
def _telling(case: PageCase) -> Iterator[str]:
    """The address of a service that tells."""
    told: Any = Told(case)
    no_files: Any = SimpleNamespace(video=str)
    app = make_app(Parts(told, no_files, Keys(), Images(), Metrics(lambda: Now(0, 0, 0, True, False, []))))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        deeds = partial(server.run, sockets=[listening]), partial(told.compute, over)
        threads = [threading.Thread(target=deed) for deed in deeds]
        for thread in threads:
            thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            told.stopping = server.should_exit = True
            over.set()
            for thread in threads:
                thread.join()


def _scrolled(browser: Any, address: str, case: PageCase, screen: Mapping[str, int]) -> Frames:
    context = browser.new_context(viewport=screen)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#connection[data-state=live]")
    while page.locator("#older").is_visible():
        before = page.locator(".card").count()
        page.locator("#older").click()
        while page.locator(".card").count() == before:
            page.wait_for_timeout(20)
    page.mouse.move(screen["width"] * 3 // 4, screen["height"] // 2)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(2000)
    browser.start_tracing(page=page, categories=CATEGORIES)
    page.evaluate(WATCH)
    ends = time.monotonic() + case.seconds
    for turn in itertools.count():
        if time.monotonic() >= ends:
            break
        page.mouse.wheel(0, WHEEL if turn % 100 < 50 else -WHEEL)  # past the picture, and back to it
        page.wait_for_timeout(1000 / 30)
    frames = page.evaluate("window.frames_ms.slice(1)")
    events = json.loads(browser.stop_tracing())["traceEvents"]
    context.close()
    drawn = sorted(each["ts"] / 1000 for each in events if each["name"] == "DrawFrame")
    return Frames(frames, [after - before for before, after in itertools.pairwise(drawn)], list(_script_ms(events)))


def _script_ms(events: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Of each frame in which the page drew."""
    for each in events:
        if each["name"] == SCRIPT and each.get("tdur", 0) / 1000 > LEAST_MS:
            yield each["tdur"] / 1000


def rows(found: Mapping[str, Frames]) -> list[list[str]]:
    """Rows of `COLUMNS`: for each screen by the page's own clock, by Chromium's trace, and the script alone."""
    made = []
    for name, arm in found.items():
        clocks = {"by the page": arm.ms, "drawn, by the trace": arm.drawn_ms, "its script": arm.script_ms}
        made += [[f"{name}, {clock}", *_cells(times)] for clock, times in clocks.items()]
    return made


def _cells(ms: Sequence[float]) -> list[str]:
    times = sorted(ms)
    if not times:
        return ["0", "", "", "", ""]
    spread = statistics.median(times), times[int(0.99 * (len(times) - 1))], times[-1]
    return [f"{len(times)}", *(f"{each:.1f}" for each in spread), f"{sum(each > LATE_MS for each in times)}"]
