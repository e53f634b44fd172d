"""A request that begins again from any of its snapshots, on any number of stages, gives the bits of the run that was
never interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_line import LocalLine
from oracle import Checkpoint
from PIL import Image
from test_line import SplitToyStages, parallels, requests
from toy_family import ToySpec
from toy_reference import toy_reference

from cineline import ParallelConfig, VideoRequest
from cineline.core.control import Snapshot
from cineline.core.request import Kind
from cineline.families import snapshot
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import SOLVERS, WanSpec
from cineline.families.wan.stages import WanStages

Results = Mapping[int, tuple[torch.Tensor, np.ndarray | None]]


def assert_alike(found: tuple[torch.Tensor, np.ndarray | None], wanted: tuple[torch.Tensor, np.ndarray | None]) -> None:
    assert torch.equal(found[0], wanted[0])
    if wanted[1] is None:
        assert found[1] is None
    else:
        assert found[1] is not None and np.array_equal(found[1], wanted[1])


def begun(line: LocalLine, number: int) -> int:
    """The first step that a request was sent."""
    return next(each.number for each in line.emitted if each.kind is Kind.DENOISE and each.request == number)


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=4),
    before=parallels,
    after=parallels,
    every=st.integers(1, 3),
    in_flight=st.one_of(st.none(), st.integers(1, 4)),
    draw=st.randoms(use_true_random=False),
)
def test_any_snapshot_goes_on_on_any_line(
    wanted: list[VideoRequest],
    before: ParallelConfig,
    after: ParallelConfig,
    every: int,
    in_flight: int | None,
    draw: Any,
) -> None:
    """The toy says which expert a step is on every line, so that one may be split and the other not."""
    line = LocalLine(ToySpec(), before, in_flight, stages_class=SplitToyStages, snapshot_every=every)
    line.run(wanted)
    for number, request in enumerate(wanted):
        steps = range(every, request.num_inference_steps or 0, every)
        assert [each.step for each in line.snapshots(number)] == list(steps)
    taken = {number: draw.choice(each) for number in range(len(wanted)) if (each := line.snapshots(number))}
    again = LocalLine(ToySpec(), after, in_flight, stages_class=SplitToyStages, snapshot_every=every)
    results = again.run(wanted, resumed=taken)
    for number, request in enumerate(wanted):
        assert_alike(results[number], toy_reference(ToySpec(), request))
        first = taken[number].step if number in taken else 0
        assert begun(again, number) == first
        later = [each for each in line.snapshots(number) if each.step > first]
        assert again.snapshots(number) == later, "snapshots are others now"
    assert all(not loop._requests for loop in again.loops), "a stage kept a request"


# Wan.

STEPS = 5


def wan_request(kind: WanKind, seed: int, image: bool, guided: bool = True) -> VideoRequest:
    side = 64 if kind == "ti2v" else 32
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return VideoRequest(
        prompt=f"cat {seed}",
        image=Image.fromarray(pixels) if image else None,
        height=side,
        width=side,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=3 if guided else 1,
        flow_shift=1.0,  # so that both experts have several steps
        boundary_ratio=None if kind == "ti2v" else 0.5,
        seed=seed,
    )


def run_wan(
    spec: WanSpec, axes: dict[str, Any], wanted: Sequence[VideoRequest], resumed: Mapping[int, Snapshot] | None = None
) -> tuple[Results, LocalLine]:
    parallel = spec.place(ParallelConfig(**axes))
    line = LocalLine(spec, parallel, None, stages_class=WanStages, snapshot_every=1)
    return line.run(wanted, resumed=resumed), line


SPLIT = {"expert_placement": "split"}


@pytest.mark.parametrize(
    ("kind", "image", "guided", "before", "after"),
    [
        ("ti2v", False, True, {"pp": 2}, [{}, {"pp": 3}]),
        ("ti2v", True, True, {"pp": 3}, [{"pp": 3}, {"pp": 2, "cfg": 2}]),
        ("ti2v", True, False, {}, [{"pp": 2}]),
        ("t2v", False, True, {"pp": 2, "cfg": 2}, [{"pp": 2, "cfg": 2}, {"pp": 3, **SPLIT}]),
        ("t2v", False, True, {"pp": 2, **SPLIT}, [{"pp": 2, **SPLIT}, {}]),
        ("i2v", True, True, {"pp": 3, **SPLIT}, [{"pp": 2, "cfg": 2, **SPLIT}, {"pp": 2, "vae_decode": "tail"}]),
    ],
)
def test_wan_goes_on_from_each_step_on_any_line(
    kind: WanKind,
    image: bool,
    guided: bool,
    before: dict[str, Any],
    after: list[dict[str, Any]],
    checkpoint: Checkpoint,
) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig(kind)))
    request = wan_request(kind, 0, image, guided)
    wanted, line = run_wan(spec, before, [request])
    taken = line.snapshots(0)
    assert [each.step for each in taken] == list(range(1, STEPS))
    assert {each.expert for each in taken} == ({0} if kind == "ti2v" else {0, 1})
    for axes in after:
        results, again = run_wan(spec, axes, [request] * len(taken), dict(enumerate(taken)))
        for number, each in enumerate(taken):
            assert begun(again, number) == each.step
            assert_alike(results[number], wanted[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_goes_on(solver: str, checkpoint: Checkpoint) -> None:
    spec = replace(WanSpec.open(checkpoint(RandomConfig("t2v"))), scheduler_class=solver)
    request = wan_request("t2v", 7, image=False)
    wanted, line = run_wan(spec, {}, [request])
    taken = line.snapshots(0)
    results, _ = run_wan(spec, {"pp": 2, **SPLIT}, [request] * len(taken), dict(enumerate(taken)))
    for result in results.values():
        assert_alike(result, wanted[0])


def test_a_state_survives_its_file() -> None:
    exported = {
        "numbers": {"whole": 3, "real": 0.1, "numpy": np.float64(0.1), "none": None, "yes": True},
        "list": [torch.arange(3), None, [torch.tensor(2.5, dtype=torch.bfloat16)], "text"],
        "column": torch.arange(6).view(2, 3)[:, 1],
    }
    content = snapshot.write(exported)
    found = snapshot.read(content)
    assert found["numbers"] == exported["numbers"]
    assert torch.equal(found["list"][0], torch.arange(3)) and found["list"][1] is None
    assert found["list"][2][0].dtype == torch.bfloat16 and found["list"][2][0] == 2.5
    assert found["list"][3] == "text" and torch.equal(found["column"], torch.tensor([1, 4]))
    length = int.from_bytes(content[:8], "little")
    assert "__metadata__" in json.loads(content[8 : 8 + length])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sigma": np.float32(0.1)}, "state['sigma'] is of type numpy.float32: a snapshot holds tensors, Python's"),
        ({"solver": [0, {"order": np.int64(2)}]}, "state['solver'][1]['order'] is of type numpy.int64: "),
        ({"yes": np.bool_(True)}, "state['yes'] is of type numpy.bool"),
        ({"sigmas": np.zeros(2)}, "state['sigmas'] is of type numpy.ndarray: "),
        ({"pair": (1, np.int64(2))}, "state['pair'][1] is of type numpy.int64: "),
        ({"caches": {"tuple": [1]}}, "The only key of state['caches'] is 'tuple', by which a snapshot finds what"),
        ({"dtype": torch.float32}, "state['dtype'] is of type torch.dtype: "),
        ({"noise": torch.Generator()}, "state['noise'] is of type torch._C.Generator: "),
        ({"caches": {3: None}}, "The key 3 of state['caches'] is of type builtins.int: a snapshot's are texts."),
        ({"caches": {"tensor": "0"}}, "The only key of state['caches'] is 'tensor', by which a snapshot finds what"),
    ],
)
def test_what_would_not_come_back_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as refused:
        snapshot.write({"latents": torch.zeros(2), **given})
    assert str(refused.value).startswith(words)


def test_tuples_come_back_as_tuples() -> None:
    """As a solver keeps a size."""
    nested = [(1, (torch.ones(2), None)), ()]
    found = snapshot.read(snapshot.write({"size": torch.zeros(2, 3).size(), "nested": nested}))
    assert found["size"] == (2, 3) and isinstance(found["size"], tuple)
    ((one, (ones, none)), empty) = found["nested"]
    assert (one, none, empty) == (1, None, ()) and torch.equal(ones, torch.ones(2))


def test_numbers_come_back_to_the_bit() -> None:
    numbers = {"tenth": 0.1, "least": 5e-324, "less": -0.0, "none": math.nan, "all": -math.inf, "large": 2**70}
    found = snapshot.read(snapshot.write(numbers | {"generator": torch.Generator().manual_seed(7).get_state()}))
    assert torch.equal(found.pop("generator"), torch.Generator().manual_seed(7).get_state())
    assert repr(found) == repr(numbers)
