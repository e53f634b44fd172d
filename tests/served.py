"""A service to ask: in this process, or as one of its own that may be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from forked_ranks import start_forked

from cineline import Engine, ParallelConfig
from cineline.core.faults import VARIABLE
from cineline.engine import launch
from cineline.engine.hub import open_model
from cineline.server.run import Served, Server, opened
from cineline.server.settings import ServeConfig

LIMIT_S = 60.0
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "fps": 8, "guidance_scale": 3.0}
NAME = "small"


def small_model(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose videos are small."""
    model = folder / NAME
    shutil.copytree(checkpoint, model)
    (model / "cineline.json").write_text(json.dumps(SMALL))
    return model


def delay(seconds: float) -> str:
    """What `VARIABLE` says for steps that take so long."""
    fault = {"do": "delay", "rank": 0, "at": "before", "kind": "denoise", "seconds": seconds, "times": 1_000_000}
    return json.dumps([fault])


def served(
    model: Path,
    pp: int,
    names: Sequence[str] = (),
    in_flight: int | None = None,
    restarts: int | None = None,
    trace: Path | None = None,
) -> Served:
    """The model on so many stages."""
    spec, parallel = open_model(model), ParallelConfig(pp=pp)
    own: dict[str, Any] = {"in_flight": in_flight, "restarts": restarts, "trace": trace}

    def make_engine(snapshots: Path) -> Engine:
        return Engine(spec, parallel, device="cpu", snapshot_dir=snapshots, live=True, **own)

    return Served(spec, [NAME, *names], parallel, in_flight, make_engine)


@contextmanager
def serving(
    model: Path,
    data: Path,
    *,
    step_s: float = 0.0,
    pp: int = 2,
    in_flight: int | None = None,
    trace: Path | None = None,
    port: int = 0,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A service in this process, its engine ready; a client of it."""
    config = ServeConfig(port=port, data_dir=data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start_ranks", start_forked)
        if step_s:
            patch.setenv(VARIABLE, delay(step_s))
        with (
            opened(served(model, pp, config.aliases, in_flight, trace=trace), config) as server,
            answering(server) as client,
        ):
            yield client


@contextmanager
def answering(server: Server) -> Iterator[httpx.Client]:
    thread = threading.Thread(target=server.answer)
    thread.start()
    try:
        with httpx.Client(base_url=server.address, timeout=LIMIT_S) as client:
            wait_ready(client)
            yield client
    finally:
        server.leave()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def wait_ready(client: httpx.Client) -> None:
    """Until it takes jobs and has an engine."""
    deadline = time.monotonic() + LIMIT_S
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def create(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A new job."""
    answer = client.post("/v1/videos", json={"prompt": "a cat", **fields})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def get(client: httpx.Client, job: str) -> dict[str, Any]:
    """It as it is now."""
    answer = client.get(f"/v1/videos/{job}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait_done(client: httpx.Client, job: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Until it is completed or has failed."""
    deadline = time.monotonic() + limit_s
    while (now := get(client, job))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


class ServerProcess:
    """`cineline serve` as a process that leads a group of its own.

    Attributes:
        client: of it.
    """

    def __init__(self, model: Path, data: Path, *options: str, step_s: float = 0.0) -> None:
        environment = dict(os.environ) | ({VARIABLE: delay(step_s)} if step_s else {})
        command = [sys.executable, "-m", "cineline", "serve", "--model", str(model), "--data-dir", str(data)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        assert self.said.startswith("Serving "), self.said + self.process.stderr.read()
        self.client = httpx.Client(base_url=self.said.split()[3].rstrip(","), timeout=LIMIT_S)

    def kill(self) -> None:
        """Its whole group, at once."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        os.killpg(self.process.pid, signal.SIGKILL)
        self._gone(tree)

    def terminate(self) -> int:
        """Its exit code after SIGTERM."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        self._gone(tree)
        return self.process.returncode

    def _gone(self, tree: list[psutil.Process]) -> None:
        self.process.communicate(timeout=LIMIT_S)
        self.client.close()
        assert not psutil.wait_procs(tree, timeout=10)[1]
