"""The line, in one process: any requests, any cancels, any number of stages give what the model in one piece gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_line import LocalLine
from toy_arithmetic import DECODER_UNITS, TEXT_LAYERS
from toy_family import ToySpec, ToyStages, ToyState
from toy_reference import toy_reference

from cineline import ParallelConfig, VideoRequest
from cineline.core.request import Group, Kind

SPEC = ToySpec()


class SplitToyStages(ToyStages):
    """The toy with two experts of the same blocks; a request's seed says how many steps are the first one's. The steps
    of the second have no second forward where the request skips it, whatever its scale."""

    def expert(self, state: ToyState, step: int) -> int:
        return int(step >= state.job.seed % (state.job.steps + 1))


decode_ways = st.sampled_from(["layers", "tail"])


def shares(count: int, stages: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Of so many units, by stage, many of them none; or None."""
    stops = st.lists(st.integers(0, count), min_size=stages - 1, max_size=stages - 1).map(sorted)
    split = stops.map(lambda ends: tuple(stop - start for start, stop in pairwise([0, *ends, count])))
    return st.none() | split


@st.composite
def uneven(draw: st.DrawFn) -> ParallelConfig:
    """Stages without a layer of the text encoder, or a unit of the decoder: their chains go past them."""
    stages = draw(st.integers(1, 6))
    text, decoder = draw(shares(TEXT_LAYERS, stages)), draw(shares(DECODER_UNITS, stages))
    return ParallelConfig(pp=stages, cfg=draw(st.integers(1, 2)), text_split=text, vae_split=decoder)


parallels = st.one_of(
    uneven(),
    st.builds(ParallelConfig, pp=st.integers(1, 8), cfg=st.integers(1, 2), vae_decode=decode_ways),
    st.integers(2, 6).flatmap(
        lambda pp: st.builds(
            ParallelConfig,
            pp=st.just(pp),
            cfg=st.integers(1, 2),
            vae_decode=decode_ways,
            expert_placement=st.just("split"),
            high_stages=st.integers(1, pp - 1),
        )
    ),
)

requests = st.builds(
    VideoRequest,
    prompt=st.sampled_from(["a", "b", "abc"]),
    negative_prompt=st.sampled_from(["", "not"]),
    num_frames=st.integers(1, 6),
    num_inference_steps=st.integers(1, 5),
    guidance_scale=st.sampled_from([1.0, 3.0]),
    skip_guidance_at_one=st.booleans(),
    seed=st.integers(0, 2**40),
    decode=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=6),
    parallel=parallels,
    in_flight=st.one_of(st.none(), st.integers(1, 4)),
    cancels=st.dictionaries(st.integers(0, 5), st.integers(0, 40), max_size=3),
    rendezvous=st.booleans(),
)
def test_any_company_gives_the_bits_of_the_model_in_one_piece(
    wanted: list[VideoRequest],
    parallel: ParallelConfig,
    in_flight: int | None,
    cancels: dict[int, int],
    rendezvous: bool,
) -> None:
    line = LocalLine(SPEC, parallel, in_flight, rendezvous, SplitToyStages)
    results = line.run(wanted, {number: after for number, after in cancels.items() if number < len(wanted)})
    for number, (latents, frames) in results.items():
        expected_latents, expected_frames = toy_reference(SPEC, wanted[number])
        assert torch.equal(latents, expected_latents)
        if frames is None or expected_frames is None:
            assert frames is expected_frames
        else:
            assert np.array_equal(frames, expected_frames)
    assert all(not loop._requests for loop in line.loops), "a stage kept a request"


def test_requests_take_turns() -> None:
    """Three requests of three steps: no two turns of one request follow each other while another could go."""
    line = LocalLine(SPEC, ParallelConfig(pp=2), in_flight=3)
    line.run([VideoRequest(prompt=p, num_inference_steps=3, guidance_scale=2, decode=False) for p in "abc"], {})
    order = [group.request for group in line.emitted if group.kind is Kind.DENOISE]
    assert order == [0, 1, 2] * 3


def test_a_group_survives_its_wire_format() -> None:
    for group in (Group(Kind.DENOISE, 2**40, 39, 2), Group(Kind.DROP, 0)):
        assert Group.unpack(group.pack()) == group
