"""The service against the engine alone: the same requests as a batch and from clients, and how soon it answers."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.bench.measure import Run, Summary, interleave, others, ratios
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.sink import Sink
from cineline.errors import CinelineError

COLUMNS = ("arm", "s a request", "throughput", "get, ms", "list, ms", "others' CPU")

BATCH, CLIENTS, ASKED = "a batch", "clients", "clients, while somebody asks"
POLL_S = 0.1
ASKS_A_SECOND = 50
GET, LIST = "get", "list"


@dataclass(frozen=True)
class ServeCase:
    """What is timed: each arm once in each of the rounds.

    Attributes:
        model: by name. pp: stages. clients: at once, each with one request. steps: solver steps of it.
        rounds: runs of each arm. most_asks: of get and of list, in a run.
    """

    model: str
    pp: int
    clients: int
    steps: int
    rounds: int
    most_asks: int

    def fields(self) -> list[dict[str, Any]]:
        """Of each request."""
        prompt = "a red square moving left on a blue background"
        return [{"prompt": prompt, "seed": n, "num_inference_steps": self.steps} for n in range(self.clients)]


@dataclass
class Asked:
    """Seconds that answers took while the line was full, by what was asked."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {GET: [], LIST: []})

    def cell(self, what: str) -> str:
        """Median and 99th percentile."""
        found = sorted(self.seconds[what])
        if len(found) < 2:
            return ""
        return f"{1000 * statistics.median(found):.1f}, 99 %: {1000 * found[int(0.99 * (len(found) - 1))]:.1f}"


def time_serve(
    case: ServeCase, config: DeviceConfig, tell: Callable[[str], None]
) -> tuple[dict[str, list[Run]], Asked]:
    """Runs by arm, and how soon the service answered during its own."""
    asked = Asked()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (
            Engine(case.model, ParallelConfig(pp=case.pp), device=config.device, dtype=config.dtype) as engine,
            _service(case, config, folder / "data") as client,
        ):
            arms = {
                BATCH: partial(_time_batch, engine, case, folder),
                CLIENTS: partial(_time_clients, client, case, None),
                ASKED: partial(_time_clients, client, case, asked),
            }
            for arm in arms.values():
                arm()
            for found in asked.seconds.values():
                found.clear()
            return interleave(arms, case.rounds, tell), asked


def rows(case: ServeCase, results: Mapping[str, Sequence[Run]], asked: Asked) -> list[list[str]]:
    """A row of `COLUMNS` for each arm."""
    found = []
    for name, own in results.items():
        ratio = ratios(results[BATCH], own)
        share = f"{ratio.median:.1%} ({ratio.low:.1%} to {ratio.high:.1%})"
        per_request = str(Summary.of([run.seconds / case.clients for run in own]))
        cells = [asked.cell(GET), asked.cell(LIST)] if name == ASKED else ["", ""]
        found.append([name, per_request, share, *cells, others(own)])
    return found


@contextmanager
def _service(case: ServeCase, config: DeviceConfig, data: Path) -> Iterator[httpx.Client]:
    """`cineline serve` beside us, ready."""
    command = [sys.executable, "-m", "cineline", "serve", "--model", case.model, "--pp", str(case.pp), "--port", "0"]
    command += ["--data-dir", str(data), "--device", config.device, "--dtype", config.dtype]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        if not said.startswith("Serving "):
            raise CinelineError(f"The service does not begin: {said}{process.stderr.read()}")
        with httpx.Client(base_url=said.split()[3].rstrip(","), timeout=60.0) as client:
            while client.get("/ready").status_code != 200:
                if process.poll() is not None:
                    raise CinelineError(f"The service ended: {process.stderr.read()}")
                time.sleep(POLL_S)
            yield client
    finally:
        process.terminate()
        process.communicate()


def _time_batch(engine: Engine, case: ServeCase, folder: Path) -> float:
    """Seconds from the first submit to the last file, as `cineline generate --requests` writes them."""
    started = time.monotonic()
    handles = [engine.submit(VideoRequest(**fields)) for fields in case.fields()]
    sinks = [Sink(handle, folder / f"{number}.mp4", None) for number, handle in enumerate(handles)]
    while sinks:
        time.sleep(POLL_S)
        for sink in list(sinks):
            done = sink.handle.done
            sink.update()
            if done:
                sink.finish()
                sinks.remove(sink)
    return time.monotonic() - started


def _time_clients(client: httpx.Client, case: ServeCase, asked: Asked | None) -> float:
    """Seconds from the first request to the last completed job; where it is to be known how soon the service answers,
    somebody asks again and again meanwhile."""
    over = threading.Event()
    started = time.monotonic()
    with ThreadPoolExecutor(case.clients + 1) as pool:
        made = [pool.submit(_one, client, fields) for fields in case.fields()]
        asking = [] if asked is None else [pool.submit(_ask, client, case.most_asks, asked, over)]
        jobs = [job.result(WAIT_LIMIT_S) for job in made]
        seconds = time.monotonic() - started
        over.set()
        for each in asking:
            each.result(WAIT_LIMIT_S)
    for job in jobs:
        client.delete(f"/v1/videos/{job}")
    return seconds


def _one(client: httpx.Client, fields: Mapping[str, Any]) -> str:
    """One client's video, to its last byte."""
    answer = client.post("/v1/videos/sync", json=dict(fields), timeout=WAIT_LIMIT_S).raise_for_status()
    return answer.headers["X-Request-Id"]


def _ask(client: httpx.Client, most: int, asked: Asked, over: threading.Event) -> None:
    count = 0
    while count < most and not over.wait(1 / ASKS_A_SECOND):
        began = time.perf_counter()
        found = client.get("/v1/videos").raise_for_status().json()["data"]
        asked.seconds[LIST].append(time.perf_counter() - began)
        if found:
            began = time.perf_counter()
            client.get(f"/v1/videos/{found[0]['id']}").raise_for_status()
            asked.seconds[GET].append(time.perf_counter() - began)
        count += 1
