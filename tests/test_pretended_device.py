"""Every way to divide a model, run by the ranks' own code for accelerators on a device that is pretended: results are
the CPU's, no two streams use the same memory unordered, nothing of the host gets in, and the host stops where it is
known to. What is planted is found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_line import LocalLine
from oracle import Checkpoint
from PIL import Image
from pretended_ranks import BETWEEN, Pretence, Report, reports_in

from cineline import Engine, NotFinite, ParallelConfig, RankFailed, RequestCancelled, Video, VideoRequest
from cineline.core.config import DeviceConfig
from cineline.core.faults import VARIABLE
from cineline.core.request import Solver
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages

STEPS = 3
LIMIT_S = 60


@dataclass(frozen=True)
class Case:
    """A way to divide a model, and what it is given.

    Attributes:
        axes: of `ParallelConfig`. options: of `Engine`. pretence: of `Pretence`.
        image: whether there is a first frame. guided: whether there are two branches.
        stops: where they are not those of `STOPS`. solver: of the requests, instead of the model's.
    """

    name: str
    kind: WanKind
    axes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    pretence: dict[str, Any] = field(default_factory=dict)
    image: bool = False
    guided: bool = True
    frames: int = 5
    stops: dict[str, tuple[int, ...]] = field(default_factory=dict)
    solver: Solver | None = None

    def requests(self, count: int = 2) -> list[VideoRequest]:
        side = 64 if self.kind == "ti2v" else 32
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        return [
            VideoRequest(
                prompt=f"cat {seed}",
                negative_prompt="bad",
                image=Image.fromarray(pixels) if self.image else None,
                height=side,
                width=side,
                num_frames=self.frames,
                num_inference_steps=STEPS,
                guidance_scale=3 if self.guided else 1,
                guidance_scale_2=None if self.kind == "ti2v" else 2 if self.guided else 1,
                seed=seed,
                solver=self.solver,
            )
            for seed in range(count)
        ]


STAGED = {"way": "staged"}
SNAPSHOTS = {"snapshot_every": 1}
REHEARSED = {"rehearses": True}
SPLIT = {"expert_placement": "split"}

CASES = [
    Case("alone", "ti2v"),
    Case("two stages", "ti2v", {"pp": 2}, pretence=REHEARSED),
    Case("with an image", "ti2v", {"pp": 2}, image=True, stops={"ENCODE first": (7,)}),
    Case("three stages", "ti2v", {"pp": 3}),
    Case("without guidance", "ti2v", {"pp": 2}, guided=False),
    Case("both branches", "ti2v", {"cfg": 2, "pp": 2}),
    Case("two experts", "t2v", {"pp": 2}),
    Case("split experts", "t2v", {"pp": 2, **SPLIT}, pretence=REHEARSED),
    Case("image and experts", "i2v", {"pp": 2}, image=True),
    Case("image and split experts", "i2v", {"pp": 3, **SPLIT}, image=True),
    Case("ulysses", "ti2v", {"ulysses": 2}),
    Case("ring", "ti2v", {"ring": 2}),
    Case("tensor parallel", "i2v", {"tp": 2}, image=True, stops={"ENCODE only": (0, 1)}),
    Case("by rows", "t2v", {"pp": 2, "vae_decode": "rows"}, pretence=REHEARSED),
    Case("decoded by the tail", "t2v", {"pp": 2, "vae_decode": "tail"}),
    Case("tiled", "ti2v", {"pp": 2, "vae_decode": "tiled"}),
    Case(
        "text read anew",
        "t2v",
        {"pp": 2},
        {"text_encoder": "reload"},
        stops={"TEXT first": (3, 4), "TEXT last": (1, 22)},
    ),
    Case("text on the host", "t2v", {"pp": 2}, {"text_encoder": "cpu"}, stops={"TEXT first": (2,), "TEXT last": (3,)}),
    Case("bfloat16", "ti2v", {"pp": 2}, {"dtype": "bfloat16"}, image=True, stops={"ENCODE first": (7,)}),
    Case("bfloat16 in a ring", "t2v", {"ring": 2}, {"dtype": "bfloat16", "vae_dtype": "bfloat16"}),
    Case("staged", "ti2v", {"pp": 3}, pretence=STAGED | REHEARSED, frames=9),
    Case("staged and split", "t2v", {"pp": 2, **SPLIT}, pretence=STAGED, stops={"SEND history": (8,)}),
    Case("snapshots", "ti2v", {"pp": 2}, pretence=SNAPSHOTS | REHEARSED),
    Case("snapshots of two lines", "ti2v", {"cfg": 2}, pretence=SNAPSHOTS | STAGED),
    Case("snapshots with split experts", "t2v", {"pp": 2, **SPLIT}, pretence=SNAPSHOTS),
    # numbers for the device come with UniPC; here the noise
    Case("noise by name", "ti2v", {"pp": 2}, stops={"FINISH": (1,)}, solver="lcm"),
    Case("staged branches", "i2v", {"pp": 2, "cfg": 2}, pretence=STAGED, image=True),
]

Stops = dict[str, tuple[int, ...]]

OF_STAGES: Stops = {
    # timesteps and noise
    **dict.fromkeys(("ADMIT only", "ADMIT first", "ADMIT last"), (2,)),
    "ADMIT middle": (1,),
    # tokens and mask, and transformers' look at the mask
    **dict.fromkeys(("TEXT only", "TEXT first"), (3,)),
    "TEXT last": (1,),
    # UniPC's first step, the second, and those with its order of 2: numbers for the device, and a solution's check
    "FINISH": (2, 5, 6),
    # a solver's tensors through a file in memory
    "SEND history": (7,),
    "RECEIVE history": (8,),
}

TWO_EXPERTS: Stops = OF_STAGES | {
    # and timesteps that are compared with the boundary
    **dict.fromkeys(("ADMIT only", "ADMIT first", "ADMIT middle", "ADMIT last"), (3,)),
}

STOPS: dict[WanKind, Stops] = {
    "ti2v": {
        **OF_STAGES,
        # a step's distinct time embeddings
        **dict.fromkeys(("ENCODE only", "ENCODE first"), (3,)),
        # once a request and expert, whether all tokens have the same
        **dict.fromkeys(("DENOISE only", "DENOISE first", "DENOISE middle", "DENOISE last"), (0, 1)),
    },
    "t2v": TWO_EXPERTS,
    # an image
    "i2v": TWO_EXPERTS | dict.fromkeys(("ENCODE only", "ENCODE first"), (1,)),
}
"""How often the host stops for all that the device has to do, for each kind of item on each kind of stage; each number
that there may be, and none where nothing is said. FINISH ends a step."""

SENDS = {"nccl": (0,), "staged": (1,)}
"""The same for each message: the copy to the host must be there before gloo sends it."""

RECEIVES = {"nccl": (1,), "staged": (2,)}
"""How often the host waits for a message and nothing else: for it, and staged for its copy to the device."""

PACE = "wait for a mark at rank/pace.py:_settle_oldest"
"""Where the host stops between items."""

EXACT = ("pp", "cfg", "expert_placement")
"""Axes that leave the CPU's bits as they are, whatever the sizes: a single rank's are what they are compared with."""


Pretend = Callable[..., Pretence]
"""What the fixture `pretending` (conftest.py) is."""


def run(folder: Path, axes: dict[str, Any], requests: Sequence[VideoRequest], **options: Any) -> list[Video]:
    options = {"dtype": "float32", "in_flight": 2, **options}
    with Engine(folder, ParallelConfig(**axes), allow_untested_device=True, **options) as engine:
        handles = [engine.submit(request) for request in requests]
        return [handle.result(LIMIT_S) for handle in handles]


_known: dict[str, list[Video]] = {}


def expected(folder: Path, case: Case) -> list[Video]:
    """The CPU's videos, made once for all cases that are to be alike."""
    together = case.axes.get("vae_decode") == "rows"
    axes = {name: value for name, value in case.axes.items() if together or name not in EXACT}
    key = repr((folder, axes, case.options, case.image, case.guided, case.frames, case.solver))
    if key not in _known:
        _known[key] = run(folder, axes, case.requests(), device="cpu", **case.options)
    return _known[key]


def counted(reports: Sequence[Report], which: int) -> Stops:
    """By what the host was at: each number of stops (0) or waits for messages (1) that there was."""
    found: dict[str, set[int]] = {}
    for report in reports:
        for label, counts in report.counts.items():
            found.setdefault(label, set()).update(count[which] for count in counts)
    return {label: tuple(sorted(counts)) for label, counts in found.items()}


def assert_synchronisations(case: Case, way: str, reports: Sequence[Report]) -> None:
    """Exactly those of the tables."""
    stops, waits = counted(reports, 0), counted(reports, 1)
    of_items = STOPS[case.kind] | case.stops
    sends = {label: SENDS[way] for label in stops if label.startswith("SEND")}
    receives = {label: RECEIVES[way] for label in stops if label.startswith("RECEIVE")}
    places = sorted(f"{label}: {place}" for report in reports for label, place in report.stops)
    assert stops == {label: (sends | of_items).get(label, (0,)) for label in stops}, places
    assert waits == {label: receives.get(label, (0,)) for label in waits}
    assert {place for report in reports for label, place in report.stops if label == BETWEEN} <= {PACE}


def assert_as_on_the_cpu(videos: Sequence[Video], wanted: Sequence[Video]) -> None:
    for video, other in zip(videos, wanted, strict=True):
        assert torch.equal(video.latents, other.latents)
        assert video.frames is not None and other.frames is not None
        assert np.array_equal(video.frames, other.frames)


def no_races(reports: Sequence[Report]) -> bool:
    return not any(report.races for report in reports)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_a_device_does_what_the_cpu_does_in_good_order(case: Case, checkpoint: Checkpoint, pretending: Pretend) -> None:
    folder = checkpoint(RandomConfig(case.kind, heads=4))
    wanted = expected(folder, case)
    pretence = pretending(**case.pretence)
    videos = run(folder, case.axes, case.requests(), device="pretend", **case.options)
    reports = reports_in(pretence.folder)
    assert len(reports) == ParallelConfig(**case.axes).ranks
    assert_as_on_the_cpu(videos, wanted)
    assert no_races(reports), [report.races for report in reports]
    assert_synchronisations(case, pretence.way, reports)


@pytest.mark.parametrize("way", ["nccl", "staged"])
def test_a_cancel_leaves_the_others_alone(way: str, checkpoint: Checkpoint, pretending: Pretend) -> None:
    case = CASES[3]
    folder = checkpoint(RandomConfig(case.kind, heads=4))
    wanted = expected(folder, case)
    pretence = pretending(way=way)
    options: dict[str, Any] = {"device": "pretend", "dtype": "float32", "allow_untested_device": True}
    with Engine(folder, ParallelConfig(**case.axes), in_flight=3, **options) as engine:
        cancelled, *kept = [engine.submit(request) for request in (case.requests()[0], *case.requests())]
        while cancelled.progress[0] < 1:
            time.sleep(0.001)
        cancelled.cancel()
        videos = [handle.result(LIMIT_S) for handle in kept]
    with pytest.raises(RequestCancelled):
        cancelled.result(0)
    reports = reports_in(pretence.folder)
    assert_as_on_the_cpu(videos, wanted)
    assert len(reports) == 3 and no_races(reports), [report.races for report in reports]


@pytest.mark.parametrize("case", [each for each in CASES if "snapshots" in each.name], ids=lambda case: str(case.name))
def test_what_a_device_has_begun_another_goes_on_with(case: Case, checkpoint: Checkpoint, pretending: Pretend) -> None:
    folder = checkpoint(RandomConfig(case.kind, heads=4))
    wanted = expected(folder, case)
    pretence = pretending(**case.pretence)
    run(folder, case.axes, case.requests(), device="pretend", **case.options)
    taken = [each for report in reports_in(pretence.folder) for each in report.snapshots]
    assert sorted((each.request, each.step) for each in taken) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    spec = WanSpec.open(folder)
    line = LocalLine(
        spec, spec.place(ParallelConfig()), None, stages_class=WanStages, config=DeviceConfig(dtype="float32")
    )
    again = line.run([case.requests()[each.request] for each in taken], resumed=dict(enumerate(taken)))
    for number, each in enumerate(taken):
        (latents, frames), other = again[number], wanted[each.request]
        assert torch.equal(latents, other.latents)
        assert frames is not None and other.frames is not None and np.array_equal(frames, other.frames)


@pytest.mark.parametrize("way", ["nccl", "staged"])
@pytest.mark.parametrize("rank", range(3))
def test_what_is_not_finite_fails_its_request_alone(
    rank: int, way: str, checkpoint: Checkpoint, pretending: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[3]
    folder = checkpoint(RandomConfig(case.kind, heads=4))
    wanted = expected(folder, case)
    pretence = pretending(way=way)
    fault = {"do": "inf", "rank": rank, "at": "after", "kind": "denoise", "number": 1, "request": 0}
    monkeypatch.setenv(VARIABLE, json.dumps([fault]))
    options: dict[str, Any] = {"device": "pretend", "dtype": "float32", "allow_untested_device": True}
    with Engine(folder, ParallelConfig(**case.axes), in_flight=3, **options) as engine:
        spoiled, *kept = [engine.submit(request) for request in (case.requests()[0], *case.requests())]
        with pytest.raises(NotFinite, match=f"stage {rank} computed denoise 1"):
            spoiled.result(LIMIT_S)
        videos = [handle.result(LIMIT_S) for handle in kept]
    reports = reports_in(pretence.folder)
    assert_as_on_the_cpu(videos, wanted)
    assert len(reports) == 3 and no_races(reports), [report.races for report in reports]


# Traces.


@pytest.mark.parametrize(("kernel_ms", "message_ms"), [(10, 3), (31_000, 2_000)])
def test_a_trace_has_the_device_s_times(
    kernel_ms: int, message_ms: int, checkpoint: Checkpoint, pretending: Pretend, tmp_path: Path
) -> None:
    """Each stage's blocks have four kernels of attention, which alone take time; a request alone goes to and fro."""
    case = Case("", "ti2v", {"pp": 2}, guided=False)
    pretending(kernel_ns=0, attention_ns=kernel_ms * 10**6, message_ns=message_ms * 10**6)
    trace = tmp_path / "trace.json"
    run(checkpoint(RandomConfig("ti2v", heads=4)), case.axes, case.requests(1), device="pretend", trace=trace)
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "denoise"]
    assert [event["tid"] for event in events] == [0, 1] * STEPS
    assert {event["dur"] for event in events} == {4 * kernel_ms * 1000}
    starts = [event["ts"] for event in events]
    assert {after - before for before, after in pairwise(starts)} == {(4 * kernel_ms + message_ms) * 1000}
    waits = {event["args"]["waited_ms"] for event in events[2:]}
    assert waits == {4 * kernel_ms + 2 * message_ms}


# Faults that are planted must be found.


def with_fault(fault: str, way: str, checkpoint: Checkpoint, pretending: Pretend) -> list[Report]:
    case = Case(fault, "ti2v", {"pp": 2})
    pretence = pretending(fault=fault, way=way, **SNAPSHOTS)
    run(checkpoint(RandomConfig("ti2v", heads=4)), case.axes, case.requests(), device="pretend")
    reports = reports_in(pretence.folder)
    assert len(reports) == 2
    return reports


@pytest.mark.parametrize(
    ("fault", "way", "found"),
    [
        ("no join on wait", "nccl", "reads what communicator"),
        ("one receive buffer", "nccl", "reads what communicator"),
        ("memory freed early", "staged", "still uses what is freed"),
        ("host memory used again early", "staged", "recv on communicator"),
        ("host memory sent early", "staged", "send on communicator"),
        ("host memory reported early", "nccl", "numpy on host reads"),
        ("host memory reported early", "nccl", "snapshot on host reads"),
    ],
)
def test_a_race_is_found(fault: str, way: str, found: str, checkpoint: Checkpoint, pretending: Pretend) -> None:
    reports = with_fault(fault, way, checkpoint, pretending)
    races = [race for report in reports for race in report.races]
    assert any(found in race for race in races), races


@pytest.mark.parametrize(
    ("fault", "found"),
    [("host read in a forward", "DENOISE"), ("device-wide synchronisation", "device-wide synchronisation at")],
)
def test_a_stop_is_found(fault: str, found: str, checkpoint: Checkpoint, pretending: Pretend) -> None:
    reports = with_fault(fault, "nccl", checkpoint, pretending)
    with pytest.raises(AssertionError, match=found):
        assert_synchronisations(Case("", "ti2v"), "nccl", reports)


def test_a_tensor_of_the_host_is_refused(checkpoint: Checkpoint, pretending: Pretend) -> None:
    with pytest.raises(RankFailed, match="Expected all tensors to be on the same device"):
        with_fault("tensor of the host in a block", "nccl", checkpoint, pretending)
