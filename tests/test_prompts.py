"""Prompts that come again are not encoded again, and nothing changes by it but the time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import Checkpoint, Oracle, assert_equal
from plans import job
from test_simulator import Costs

from cineline import Engine, InvalidConfig, ParallelConfig, VideoRequest
from cineline.core.config import TextEncoder
from cineline.core.request import Group, Job, Kind, PromptKey
from cineline.engine.prompts import prompts_in
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.schedule.prompts import PromptCache, keys_of
from cineline.schedule.scheduler import Scheduler
from cineline.schedule.simulator import simulate


def prompted(number: int, prompt: str, negative: str = "") -> Job:
    return replace(job(number, steps=1, texts=True), prompt=prompt, negative_prompt=negative)


def run_all(scheduler: Scheduler, jobs: list[Job]) -> list[Group]:
    """What is emitted, where all that is emitted is done at once, one after another."""
    for one in jobs:
        scheduler.submit(one)
    emitted, coming = [], scheduler.pump()
    while coming:
        group = coming.pop(0)
        emitted.append(group)
        if group.kind is not Kind.ENCODE:
            scheduler.begun(group)
            coming += scheduler.pump()
            scheduler.complete(group)
            coming += scheduler.pump()
    return emitted


def texts(groups: list[Group]) -> list[tuple[int, int, int]]:
    """Request, first branch and number of branches of each that encodes prompts."""
    return [(group.request, group.number, group.size) for group in groups if group.kind is Kind.TEXT]


def scheduler(prompts: int, admitted: list[Job] | None = None, cfg: int = 1) -> Scheduler:
    kept = admitted if admitted is not None else []
    return Scheduler(ParallelConfig(pp=2, cfg=cfg), None, kept.append, prompts)


def test_one_negative_prompt_is_encoded_once() -> None:
    jobs = [prompted(number, f"prompt {number}", "blurred") for number in range(4)]
    assert texts(run_all(scheduler(9), jobs)) == [(0, 0, 2), (1, 0, 1), (2, 0, 1), (3, 0, 1)]
    assert texts(run_all(scheduler(0), jobs)) == [(number, 0, 2) for number in range(4)]


def test_requests_alike_encode_nothing_and_the_second_branch_may_alone() -> None:
    jobs = [prompted(0, "a"), prompted(1, "a"), prompted(2, "a", "blurred"), prompted(3, "b", "b")]
    assert texts(run_all(scheduler(9), jobs)) == [(0, 0, 2), (2, 1, 1), (3, 0, 1)]


def test_two_lines_encode_both_or_none() -> None:
    jobs = [prompted(0, "a"), prompted(1, "b"), prompted(2, "a")]
    assert texts(run_all(scheduler(9, cfg=2), jobs)) == [(0, 0, 1), (1, 0, 1)]


def test_the_least_recently_used_goes_first() -> None:
    admitted: list[Job] = []
    jobs = [prompted(number, prompt, "n") for number, prompt in enumerate("abac")]
    run_all(scheduler(3, admitted), jobs)
    gone = [one.prompts.gone for one in admitted if one.prompts is not None]
    assert gone == [(), (), (), ((0, "b"),)]


def test_a_cancelled_requests_prompts_are_encoded_anew() -> None:
    line = scheduler(9)
    line.submit(prompted(0, "a"))
    line.submit(prompted(1, "a"))
    assert texts(line.pump()) == [(0, 0, 2)]  # the second one waits for it
    assert line.cancel(0) == Group(Kind.DROP, 0)
    assert texts(line.pump()) == [(1, 0, 2)]


def test_the_simulator_knows_that_items_fall_away() -> None:
    jobs = [prompted(number, f"prompt {number}", "blurred") for number in range(3)]
    costs = Costs(ParallelConfig(pp=1), text_s=2.0)
    without, kept = (simulate(costs, jobs, 1, prompts=prompts) for prompts in (0, 9))
    assert without.makespan_s - kept.makespan_s == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("size", "entries"), [("256MB", 61), ("0", 0), (10_000_000, 2), ("4 MiB", 1), ("4194303", 0), ("1gb", 238)]
)
def test_bytes_are_embeddings_of_the_model(size: int | str, entries: int) -> None:
    assert prompts_in(KNOWN["Wan-AI/Wan2.2-TI2V-5B-Diffusers"], "bfloat16", size) == entries


@pytest.mark.parametrize("size", ["", "many", "-1", "1TB", -5, True, 1.5])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"prompt_cache=.* is no size: give bytes, such as 256MB"):
        prompts_in(KNOWN["Wan-AI/Wan2.2-TI2V-5B-Diffusers"], "bfloat16", size)


@pytest.mark.parametrize(
    ("parallel", "text_encoder", "items"),
    [
        (ParallelConfig(pp=2), "reload", {"r0 text": 2, "r1 text": 1, "r3 text": 1}),
        (ParallelConfig(cfg=2), "resident", {"r0 text": 1, "r1 text": 1, "r3 text": 1}),
    ],
)
def test_embeddings_that_are_kept_have_diffusers_bits(
    parallel: ParallelConfig,
    text_encoder: TextEncoder,
    items: dict[str, int],
    checkpoint: Checkpoint,
    oracle: Oracle,
    tmp_path: Path,
) -> None:
    folder, trace = checkpoint(RandomConfig("ti2v", seed=3)), tmp_path / "t.json"
    fields: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    prompts = [("a cat", "blurred"), ("a dog", "blurred"), ("a dog", "blurred"), ("a cat", "dark")]
    requests = [VideoRequest(prompt=one, negative_prompt=other, **fields) for one, other in prompts]
    with Engine(folder, parallel, device="cpu", trace=trace, text_encoder=text_encoder) as engine:
        handles = [engine.submit(request) for request in requests]
        for handle, request in zip(handles, requests, strict=True):
            assert_equal(handle.result(60), oracle.run(folder, "float32", request))
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert Counter(name for name in names if "text" in name) == items


def test_what_a_second_line_is_to_forget_waits_for_a_request_that_it_hears_of() -> None:
    """One without guidance is not known there."""
    cache, held = PromptCache(2, lines=2), set[PromptKey]()
    for number in range(20):
        guided = replace(prompted(2 * number, "a", f"no {number}"), branches=2)
        for one in (guided, replace(prompted(2 * number + 1, "b"), branches=1)):
            settled = cache.settle(one)
            assert settled.prompts is not None
            assert {line for line, _ in settled.prompts.gone} <= set(range(one.branches))
            held = (held | set(keys_of(one, 2).values())) - set(settled.prompts.gone)
            cache.encoded(one.id)
        cache.forget(guided.id)
        assert sum(line == 1 for line, _ in held) <= 3
