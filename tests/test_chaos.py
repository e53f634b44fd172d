"""Faults at random moments on many lines: each request has the bits of diffusers, or fails alone with the right error.

A hundred seeded runs, of which `make test` runs ten, by the commit; all of them by `make test-chaos`.
"""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import forked_ranks
import numpy as np
import psutil
import pytest
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image

from cineline import CinelineError, Engine, NotFinite, OutOfMemory, ParallelConfig, RequestHandle, VideoRequest
from cineline.core.faults import VARIABLE, Fault
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind

RUNS = 100
LIMIT_S = 120.0
"""For a run; one takes seconds, and 15 where a rank is stopped twice."""

IN_FLIGHT = 3

SPLIT = {"expert_placement": "split"}


class Line(NamedTuple):
    """What is run: a kind of model on a line, with images or not."""

    kind: WanKind
    axes: dict[str, Any]
    image: bool = False


LINES = [
    Line("ti2v", {"pp": 2}),
    Line("ti2v", {"pp": 3}, image=True),
    Line("ti2v", {"pp": 2, "cfg": 2}, image=True),
    Line("t2v", {"pp": 3}),
    Line("t2v", {"pp": 2, **SPLIT}),
    Line("t2v", {"pp": 3, "cfg": 2}),
    Line("i2v", {"pp": 2}, image=True),
    Line("i2v", {"pp": 3, **SPLIT}, image=True),
]

ERRORS: dict[str, type[CinelineError]] = {"nan": NotFinite, "inf": NotFinite, "memory": OutOfMemory}
"""Of faults that are a request's own."""

DEEDS = ["kill", "kill", "exit", "raise", "hang_up", "cut", "stop", "memory", "nan", "inf", "delay"]
MOMENTS = {"take": 0.15, "before": 0.3, "after": 0.3, "finish": 0.05, "give": 0.15, "answer": 0.05}


def wanted(line: Line) -> list[VideoRequest]:
    side = 64 if line.kind == "ti2v" else 32
    pixels = np.random.default_rng(5).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return [
        VideoRequest(
            prompt=f"cat {seed}",
            image=Image.fromarray(pixels) if line.image else None,
            height=side,
            width=side + 32 * (seed == 1),
            num_frames=5 if seed else 9,
            num_inference_steps=4 + seed,
            guidance_scale=1.0 if seed == 2 else 3.0,
            seed=seed,
        )
        for seed in range(IN_FLIGHT)
    ]


def drawn(seed: int) -> tuple[Line, list[dict[str, Any]]]:
    """A line, and the faults of its first starts; where one is never met the run is undisturbed."""
    draw = random.Random(seed)
    line = LINES[seed % len(LINES)]
    ranks = ParallelConfig(**line.axes).ranks
    faults = [fault(draw, ranks, start) for start in range(1 + (draw.random() < 0.4))]
    if len(faults) > 1 and draw.random() < 0.4:
        faults.append({"do": draw.choice(["kill", "raise"]), "rank": draw.randrange(ranks), "at": "load", "start": 2})
    return line, faults


def fault(draw: random.Random, ranks: int, start: int) -> dict[str, Any]:
    do = draw.choice(DEEDS)
    moment = "after" if do in ("nan", "inf") else draw.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    kind = draw.choices(["text", "encode", "denoise", "decode"], [1, 1, 5, 2])[0]
    if moment == "finish":
        kind = "denoise"
    made = {"do": do, "rank": draw.randrange(ranks), "at": moment, "kind": kind, "start": start}
    if kind == "denoise":
        made["number"] = draw.randrange(4)
    if draw.random() < 0.7:
        made["request"] = draw.randrange(IN_FLIGHT)
    if do == "delay":
        made["seconds"] = 0.5
    Fault.model_validate(made)  # none that is refused
    return made


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(RUNS))
def test_each_request_has_its_bits_or_fails_alone(
    seed: int, checkpoint: Checkpoint, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line, faults = drawn(seed)
    options: dict[str, Any] = {"in_flight": IN_FLIGHT, "snapshot_dir": tmp_path / "snapshots" if seed % 2 else None}
    monkeypatch.setenv(VARIABLE, json.dumps(faults))
    folder, requests = checkpoint(RandomConfig(line.kind)), wanted(line)
    expected = [oracle.run(folder, "float32", one) for one in requests]
    forked_ranks._start_server()
    before = set(psutil.Process().children(recursive=True))
    threads, deadline = threading.active_count(), time.monotonic() + LIMIT_S
    with Engine(folder, ParallelConfig(**line.axes), device="cpu", **options) as engine:
        handles = [engine.submit(one) for one in requests]
        failed = [number for number, handle in enumerate(handles) if failure_of(handle, deadline) is not None]
        for number, handle in enumerate(handles):
            if number not in failed:
                assert_equal(handle.result(0), expected[number])
        own = [one for one in faults if one["do"] in ERRORS]
        assert len(failed) <= len(own)
        for number in failed:
            assert any(is_by(one, number, failure_of(handles[number], deadline)) for one in own), failed
        assert all(handle.restarts <= len(faults) for handle in handles)
        again = engine.submit(requests[0])  # the line is as it was
        try:
            assert_equal(again.result(deadline - time.monotonic()), expected[0])
        except (NotFinite, OutOfMemory) as error:  # what was never met before
            assert any(is_by(one, 3, error) for one in own)
    assert threading.active_count() <= threads
    assert not left_behind(before)


def left_behind(before: set[psutil.Process]) -> list[psutil.Process]:
    """Processes that are new, but for those that wait for a parent to look."""
    return [one for one in psutil.Process().children(recursive=True) if one not in before and lives(one)]


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def failure_of(handle: RequestHandle, deadline: float) -> CinelineError | None:
    try:
        handle.result(max(0.0, deadline - time.monotonic()))
    except (NotFinite, OutOfMemory) as error:
        return error
    return None


def is_by(one: dict[str, Any], number: int, error: CinelineError | None) -> bool:
    """Whether a fault is this request's own, and it says so."""
    own = one.get("request", number) == number and isinstance(error, ERRORS[one["do"]])
    return own and cast(Any, error).request == number
