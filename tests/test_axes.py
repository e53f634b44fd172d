"""Every axis and their products against diffusers: bits where that is promised, else a bound.

The table of docs/parallelism.md names these cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image

from cineline import Engine, InvalidConfig, ParallelConfig, Video, VideoRequest
from cineline.core.config import AXES
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.schedule.rule import edges_of

Case = tuple[WanKind, dict[str, Any]]


def product(kind: WanKind, **axes: Any) -> ParameterSet:
    """A case of so many ranks that it runs only when asked for."""
    return pytest.param(kind, axes, marks=pytest.mark.products)


EXACT: list[Case | ParameterSet] = [
    ("ti2v", {"cfg": 2}),
    ("ti2v", {"ulysses": 2}),
    ("t2v", {"pp": 2, "expert_placement": "split"}),
    ("i2v", {"pp": 3, "expert_placement": "split", "high_stages": 2}),
    ("ti2v", {"pp": 2, "cfg": 2, "ulysses": 2}),
    product("i2v", pp=2, cfg=2),
    product("t2v", pp=2, ulysses=2),
    product("t2v", pp=2, cfg=2, expert_placement="split"),
    product("i2v", pp=2, ulysses=2, expert_placement="split"),
]

CLOSE: list[Case | ParameterSet] = [
    ("ti2v", {"ulysses": 2}),
    ("ti2v", {"ring": 2}),
    ("i2v", {"tp": 2}),
    product("t2v", pp=2, ring=2),
    product("ti2v", pp=2, tp=2),
    product("ti2v", ring=2, ulysses=2, tp=2),
    product("t2v", cfg=2, ring=2, tp=2),
    product("i2v", pp=2, ring=2, tp=2, expert_placement="split"),
]

BOUND = 1e-5
"""Largest difference of two latents, as a share of the largest latent."""


def name_of(case: object) -> str:
    return str(ParallelConfig(**case)) if isinstance(case, dict) else str(case)


FEW = ((5, 9), (3, 9), (1, 1))
MANY = ((17, 9), (19, 9), (53, 1))
"""Width and frames of requests whose tokens ranks cannot share out evenly: 15, 9 and a single one, or 51, 57 and 53. Of
those, two ranks' shares and the last of attention's blocks of 32 have 16 rows or more: MKL's products of fewer have
other bits on Intel's CPUs."""


def requests_of(kind: WanKind, sizes: Sequence[tuple[int, int]] = FEW) -> list[VideoRequest]:
    """Three of different sizes."""
    grid = 32 if kind == "ti2v" else 16
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    common = {"num_inference_steps": 5, "guidance_scale": 3} | ({} if kind == "ti2v" else {"guidance_scale_2": 2.5})
    given = {"i2v": (picture, picture, picture), "ti2v": (None, picture, None), "t2v": (None, None, None)}[kind]
    return [
        VideoRequest(
            prompt=f"cat {number}",
            negative_prompt="bad" * number,
            image=image,
            **{"height": grid, "width": width * grid, "num_frames": frames, "seed": number, **common},
        )
        for number, (image, (width, frames)) in enumerate(zip(given, sizes, strict=True))
    ]


def beside_diffusers(
    kind: WanKind, case: dict[str, Any], checkpoint: Checkpoint, oracle: Oracle, sizes: Sequence[tuple[int, int]] = FEW
) -> Iterator[tuple[Video, tuple[torch.Tensor, np.ndarray]]]:
    """Each request's video with two in flight, and what diffusers makes of it."""
    folder = checkpoint(RandomConfig(kind, heads=4))
    wanted = requests_of(kind, sizes)
    with Engine(folder, ParallelConfig(**case), device="cpu", in_flight=2) as engine:
        handles = [engine.submit(request) for request in wanted]
        for handle, request in zip(handles, wanted, strict=True):
            yield handle.result(120), oracle.run(folder, "float32", request)


@pytest.mark.parametrize(("kind", "case"), EXACT, ids=name_of)
def test_bits_equal_diffusers(kind: WanKind, case: dict[str, Any], checkpoint: Checkpoint, oracle: Oracle) -> None:
    sizes = MANY if "ulysses" in case else FEW
    for video, expected in beside_diffusers(kind, case, checkpoint, oracle, sizes):
        assert_equal(video, expected)


@pytest.mark.parametrize(("kind", "case"), CLOSE, ids=name_of)
def test_close_to_diffusers(kind: WanKind, case: dict[str, Any], checkpoint: Checkpoint, oracle: Oracle) -> None:
    for video, (expected, frames) in beside_diffusers(kind, case, checkpoint, oracle):
        assert (video.latents - expected).abs().max() <= BOUND * expected.abs().max()
        assert video.frames is not None
        assert np.abs(video.frames.astype(int) - frames).max() <= 1


def test_requests_without_guidance_or_with_one_expert_pass_through(checkpoint: Checkpoint, oracle: Oracle) -> None:
    """CFG parallel and split experts at once: the second line has nothing to do for the first request, the second
    one has no high-noise step, the third no low-noise step; one is dropped while others go on."""
    folder = checkpoint(RandomConfig("t2v", heads=4))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
    wanted = [
        VideoRequest(prompt="a", guidance_scale=1, **size),
        VideoRequest(prompt="b", guidance_scale=3, boundary_ratio=1.0, **size),
        VideoRequest(prompt="c", guidance_scale=3, boundary_ratio=0.0, **size),
        VideoRequest(prompt="d", guidance_scale=3, **size),
        VideoRequest(prompt="e", guidance_scale=3, seed=5, **size),
    ]
    with Engine(folder, ParallelConfig(pp=2, cfg=2, expert_placement="split"), device="cpu", in_flight=3) as engine:
        handles = [engine.submit(request) for request in wanted]
        handles[3].cancel()
        videos = [handle.result(120) for number, handle in enumerate(handles) if number != 3]
    for video, request in zip(videos, [*wanted[:3], wanted[4]], strict=True):
        boundary = 0.875 if request.boundary_ratio is None else request.boundary_ratio
        same_weights = checkpoint(RandomConfig("t2v", heads=4, boundary_ratio=boundary))
        assert_equal(video, oracle.run(same_weights, "float32", request))


def test_a_tensor_parallel_rank_reads_its_share_alone(checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig("t2v", heads=4))
    size = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1, "guidance_scale": 1}
    with Engine(folder, device="cpu") as engine:
        whole = engine.bytes_read[0]
    with Engine(folder, ParallelConfig(tp=2), device="cpu") as engine:
        engine.submit(VideoRequest(prompt="a", **size)).result(60)
        first, second = engine.bytes_read
    spec = WanSpec.open(folder)
    width = spec.transformer["num_attention_heads"] * spec.transformer["attention_head_dim"]
    inner, layers = spec.transformer["ffn_dim"], spec.layers * len(spec.experts)
    # By hand: of a block's tensors these are shared out; what is left is on both ranks.
    shared = 8 * width * width + 2 * width * inner + 4 * width + 6 * width + inner
    assert second < first < whole
    assert whole - first == layers * shared // 2 * 4
    assert engine.traffic[0]["tp"] > 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"cfg": 3}, "guidance has 2 branches"),
        ({"ulysses": 0}, "at least 1"),
        ({"tp": 3}, "does not divide the model's 4 attention heads: use a product among 1, 2, 4"),
        ({"tp": 2, "ulysses": 4}, "tp=2 x ulysses=4 does not divide"),
        ({"expert_placement": "split"}, "needs a stage for each expert"),
        ({"pp": 2, "expert_placement": "half"}, "use shared or split"),
        ({"pp": 3, "expert_placement": "split", "split": [3, 3, 4]}, "must add up to the 4 blocks"),
        ({"pp": 2, "expert_placement": "split", "high_stages": 2}, "use 1 to 1"),
    ],
)
def test_what_cannot_work_is_refused_before_any_rank_starts(
    options: dict[str, Any], rule: str, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(RandomConfig("t2v", heads=4))
    with pytest.raises(InvalidConfig, match=rule):
        Engine(folder, ParallelConfig(**options), device="cpu")


def test_split_experts_need_two(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidConfig, match="has one"):
        Engine(checkpoint(RandomConfig("ti2v")), ParallelConfig(pp=2, expert_placement="split"), device="cpu")


def test_stages_go_to_the_expert_with_more_steps() -> None:
    parallel = ParallelConfig(pp=8, expert_placement="split")
    assert [len(group) for group in parallel.placed(40, 26 / 40).groups] == [5, 3]  # Wan 2.2 T2V, WAN's table
    assert [len(group) for group in ParallelConfig(pp=2, expert_placement="split").placed(40, 0.9).groups] == [1, 1]
    given = ParallelConfig(pp=3, split=[3, 5, 8], expert_placement="split").placed(8, 0.5)
    assert [cut.blocks for cut in given.cut(8)] == [range(3), range(3, 8), range(8)]


def test_ranks_and_coordinates_are_each_others_inverse() -> None:
    parallel = ParallelConfig(pp=3, cfg=2, ulysses=2, ring=2, tp=2)
    assert [parallel.rank(parallel.place(rank)) for rank in range(parallel.ranks)] == list(range(48))
    assert parallel.sizes == tuple(getattr(parallel, axis) for axis in AXES)
    assert all(edge.source != edge.target for edge in edges_of(parallel))


def test_an_untested_device_wants_to_be_asked_for() -> None:
    with pytest.raises(InvalidConfig, match="--allow-untested-device"):
        Engine(None, device="xpu")
    with pytest.raises(InvalidConfig, match="finds none here"):
        Engine(None, device="xpu", allow_untested_device=True)


def test_latents_of_many_ranks_are_the_first_ones(checkpoint: Checkpoint) -> None:
    """Each rank of the last stage steps the solver by itself: all of them must have the same latents."""
    folder = checkpoint(RandomConfig("ti2v", heads=4))
    request = requests_of("ti2v")[0].model_copy(update={"decode": False})
    with Engine(folder, ParallelConfig(ulysses=2, pp=2), device="cpu") as engine:
        first = engine.submit(request).result(60).latents
        again = engine.submit(request).result(60).latents
    assert torch.equal(first, again)
