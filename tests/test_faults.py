"""Faults on purpose: each kind, in real rank processes, at moments drawn by a seed that names the test."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import psutil
import pytest
import torch
from faulty_family import InexactSpec, Plan
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_family import ToySpec, ToyStages
from toy_reference import toy_reference

from cineline import Engine, InvalidConfig, NotFinite, ParallelConfig, RankFailed, RequestHandle, VideoRequest
from cineline.core.config import DeviceConfig
from cineline.core.control import Done, Spoiled, Unkept
from cineline.core.faults import VARIABLE, Fault, Moment, planned
from cineline.core.request import Branch, Group, Kind, WorkItem
from cineline.engine import line as line_of_requests
from cineline.engine.blueprint import Blueprint
from cineline.engine.line import Line
from cineline.engine.ranks import Ranks
from cineline.engine.record import Record
from cineline.errors import anew
from cineline.families.pipeline_parallel import PipelineParallelMixin, RequestState, StagePart
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.rank.faults import EXIT_CODE, with_faults
from cineline.schedule.rule import Rule, scripts_of
from cineline.schedule.words import Compute, Do, Keep, Send, Wait

LIMIT_S = 20.0
REQUESTS = [
    VideoRequest(prompt="abc", num_inference_steps=5, guidance_scale=3.0, num_frames=3, seed=seed) for seed in range(3)
]
SEEDS = range(3)


def engine(stages: int) -> Engine:
    return Engine(ToySpec(), ParallelConfig(pp=stages), device="cpu", restarts=0)


def moments(stages: int, rank: int) -> Iterator[dict[str, Any]]:
    """All that there are on a rank for a request, by the scripts that the ranks follow."""
    parallel, job = ParallelConfig(pp=stages), ToySpec().resolve(REQUESTS[0], 0)
    parallel = parallel.filled(ToySpec().cut(parallel, DeviceConfig()))
    yield {"at": "admit"}
    scripts = scripts_of(Rule(parallel, job.shape, (0,) * job.steps, parallel.place(rank)))
    for script in (script for own in scripts.values() for script in own):
        for action in script.run:
            match action:
                case Wait():
                    yield at("take", action.item)
                case Send():
                    yield at("give", action.item)
                case Keep():
                    yield from (at("give", action.item), at("take", action.item))
                case Compute():
                    yield from (at("before", script.item), at("after", script.item))
                case Do.FINISH:
                    yield at("finish", script.item)
                case Do.DONE:
                    yield at("answer", script.item)
                case _:
                    pass


def at(moment: Moment, item: WorkItem) -> dict[str, Any]:
    return {"at": moment, "kind": item.kind.name.lower(), "number": item.number, "branch": item.branch.name.lower()}


def drawn(do: str, seed: int, *only: str) -> tuple[int, dict[str, Any]]:
    """Stages, and a fault on one of them, at one of these moments, not all of which is said; a kind of moment is as
    likely as any other."""
    draw = random.Random(f"{do} {seed} {only}")
    stages = draw.choice([2, 3, 4])
    rank = draw.choice([rank for rank in range(stages) if any(moments_of(stages, rank, only))])
    all_of_rank = moments_of(stages, rank, only)
    kind = draw.choice(sorted({(moment["at"], moment.get("kind", "")) for moment in all_of_rank}))
    moment = draw.choice([one for one in all_of_rank if (one["at"], one.get("kind", "")) == kind])
    kept = {name: value for name, value in moment.items() if name in ("at", "kind") or draw.random() < 0.7}
    return stages, {"do": do, "rank": rank, "request": draw.randrange(len(REQUESTS)), **kept}


def moments_of(stages: int, rank: int, only: tuple[str, ...]) -> list[dict[str, Any]]:
    return [moment for moment in moments(stages, rank) if not only or moment["at"] in only]


def assert_right(handle: RequestHandle, wanted: VideoRequest) -> None:
    video = handle.result(LIMIT_S)
    latents, frames = toy_reference(ToySpec(), wanted)
    assert video.latents.equal(latents)
    assert video.frames is not None
    assert frames is not None
    assert (video.frames == frames).all()


def failure_of(stages: int) -> RankFailed:
    """Of a line that is sure to fail: at the last, when requests follow that the lost rank has not seen."""
    started = time.monotonic()
    with pytest.raises(RankFailed) as failed, engine(stages) as line:
        handles = [line.submit(one) for one in REQUESTS]
        for handle in handles:
            handle.result(LIMIT_S)
        while time.monotonic() - started < LIMIT_S:
            line.submit(REQUESTS[0]).result(LIMIT_S)
    assert time.monotonic() - started < LIMIT_S
    return failed.value


WORDS = {
    "kill": "the process was killed by SIGKILL",
    "exit": f"the process ended with exit code {EXIT_CODE}",
    "raise": r"RuntimeError: a fault on purpose \(do=raise rank=",
    "memory": "cpu has no memory left.*allocate memory: you tried to allocate 1152921504606846976 bytes.*: use",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("do", WORDS)
def test_a_rank_that_fails_is_named_with_its_words(do: str, seed: int, plan: Plan) -> None:
    stages, fault = drawn(do, seed)
    plan(fault)
    failure = failure_of(stages)
    assert failure.rank == fault["rank"]
    assert failure.request == (fault["request"] if do in ("raise", "memory") else None)
    assert anew(failure).args == failure.args
    failure.add_note(str(fault))
    with pytest.raises(RankFailed, match=f"Rank {fault['rank']} failed: {WORDS[do]}"):
        raise failure


@pytest.mark.parametrize("moment", sorted(set(get_args(Moment)) - {"load"}))
def test_each_moment_comes(moment: str, plan: Plan) -> None:
    stages, fault = drawn("raise", 0, moment)
    plan(fault)
    failure = failure_of(stages)
    assert failure.rank == fault["rank"]
    assert failure.request == fault["request"]
    assert f"at={moment} " in failure.cause


@pytest.mark.real_start
@pytest.mark.parametrize("do", WORDS)
def test_a_rank_that_fails_when_it_loads_fails_the_start(do: str, plan: Plan) -> None:
    plan({"do": do, "rank": 1, "at": "load"})
    with pytest.raises(RankFailed, match=f"Rank 1 failed: {WORDS[do]}"):
        engine(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_hangs_up_is_named_though_its_process_goes_on(seed: int, plan: Plan) -> None:
    """It ends itself when it finds that it cannot say that it is alive."""
    stages, fault = drawn("hang_up", seed)
    plan(fault)
    failure = failure_of(stages)
    assert failure.rank == fault["rank"]
    assert failure.cause in ("its connection closed while the process went on", "the process ended with exit code 1")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_whose_connections_are_cut_fails_the_line(seed: int, plan: Plan) -> None:
    """Whose fault it is nobody can tell: any rank that has lost an edge may be named."""
    stages, fault = drawn("cut", seed)
    plan(fault)
    assert "the edge to or from rank" in failure_of(stages).cause


def test_a_cut_spares_the_connection_to_the_engine_which_may_be_tcp() -> None:
    """As it is under torchrun."""
    code = """
import socket, sys
from cineline.rank import faults
engine, edge = (socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(2))
faults._cut(engine.fileno())
engine.send(b"alive")
engine.recv(1)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen([sys.executable, "-c", code, str(server.getsockname()[1])])
        server.settimeout(LIMIT_S)
        (engine_end, _), (edge_end, _) = server.accept(), server.accept()
        with engine_end, edge_end:
            engine_end.settimeout(LIMIT_S)
            edge_end.settimeout(LIMIT_S)
            assert engine_end.recv(5) == b"alive"
            assert edge_end.recv(1) == b""
            assert process.poll() is None
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_delay_changes_times_and_no_bits(seed: int, plan: Plan) -> None:
    stages, fault = drawn("delay", seed)
    plan(fault | {"seconds": 1.0})
    with engine(stages) as line:
        started = time.monotonic()
        for handle, wanted in [(line.submit(one), one) for one in REQUESTS]:
            assert_right(handle, wanted)
        assert 1.0 <= time.monotonic() - started < LIMIT_S


def test_a_slow_disk_is_a_delay_at_load(plan: Plan) -> None:
    plan({"do": "delay", "seconds": 1.5, "rank": 1, "at": "load"})
    started = time.monotonic()
    with engine(2) as line:
        assert time.monotonic() - started >= 1.5
        assert_right(line.submit(REQUESTS[0]), REQUESTS[0])


def assert_named(handle: RequestHandle, fault: dict[str, Any], stage: int) -> None:
    with pytest.raises(NotFinite) as failed:
        handle.result(LIMIT_S)
    error = failed.value
    assert (error.stage, error.kind) == (stage, fault["kind"]), str(error)
    assert error.number == fault.get("number", error.number)


@pytest.mark.parametrize("do", ["nan", "inf"])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_not_finite_fails_its_request_and_no_other(seed: int, do: str, plan: Plan) -> None:
    stages, fault = drawn(do, seed, "after", "finish")
    if fault["kind"] == "decode" and fault["rank"] == stages - 1:  # frames are bytes
        fault["rank"] = 0
    plan(fault)
    with engine(stages) as line:
        handles = [line.submit(one) for one in REQUESTS]
        for number, (handle, wanted) in enumerate(zip(handles, REQUESTS, strict=True)):
            if number == fault["request"]:
                assert_named(handle, fault, fault["rank"])
            else:
                assert_right(handle, wanted)
        assert_right(line.submit(REQUESTS[0]), REQUESTS[0])


@pytest.mark.parametrize("at", ["after", "finish"])
@pytest.mark.parametrize("rank", range(3))
def test_a_last_step_that_is_not_finite_never_ends_well(rank: int, at: str, plan: Plan) -> None:
    """Though the tail may be through with it before the rank is heard that spoiled it."""
    stage = rank if at == "after" else 2
    fault = {"do": "nan", "rank": stage, "at": at, "kind": "denoise", "number": 4}
    plan(*(fault | {"request": request} for request in range(8)))
    with engine(3) as line:
        for _ in range(8):
            handle = line.submit(REQUESTS[0].model_copy(update={"decode": False}))
            assert_named(handle, fault, stage)


@pytest.mark.parametrize("moment", [{"at": "after", "kind": kind} for kind in ("text", "encode", "denoise")])
def test_one_stage_alone_is_named_too(moment: dict[str, Any], plan: Plan) -> None:
    plan({"do": "inf", "rank": 0, "request": 0, **moment})
    with engine(1) as line:
        spoiled, right = [line.submit(one) for one in REQUESTS[:2]]
        assert_named(spoiled, moment, 0)
        assert_right(right, REQUESTS[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_is_stopped_is_named_within_seconds(seed: int, plan: Plan) -> None:
    stages, fault = drawn("stop", seed)
    plan(fault)
    with engine(stages) as line:
        handles = [line.submit(one) for one in REQUESTS]
        deadline = time.monotonic() + LIMIT_S
        while not (stopped := stopped_ranks()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(stopped) == 1
        since = time.monotonic()
        words = f"Rank {fault['rank']} failed: its process {stopped[0].pid} is stopped, as by SIGSTOP"
        with pytest.raises(RankFailed, match=words):
            for handle in [*handles, line.submit(REQUESTS[0])]:
                handle.result(LIMIT_S)
        assert time.monotonic() - since < 15


def stopped_ranks() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and child.status() == psutil.STATUS_STOPPED]


def test_faults_that_never_fit_change_nothing(plan: Plan) -> None:
    plan(
        {"do": "kill", "rank": 0, "at": "before", "request": 99},
        {"do": "nan", "rank": 1, "at": "after", "kind": "denoise", "number": 5},
        {"do": "raise", "rank": 2, "at": "finish", "kind": "text"},
        {"do": "exit", "rank": 1, "at": "load", "start": 1},
        {"do": "raise", "rank": 7, "at": "load"},
    )
    with engine(3) as line:
        for handle, wanted in [(line.submit(one), one) for one in REQUESTS]:
            assert_right(handle, wanted)


WAN_KINDS = ("text", "encode", "denoise", "finish", "decode")


@pytest.mark.parametrize("axes", [{"pp": 1}, {"pp": 2}, {"pp": 3}, {"pp": 2, "cfg": 2}], ids=str)
def test_what_is_not_finite_in_wan_stays_in_its_request(
    axes: dict[str, Any], plan: Plan, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    draw = random.Random(str(axes))
    parallel = ParallelConfig(**axes)
    tails = [rank for rank in range(parallel.ranks) if parallel.place(rank).pp == parallel.pp - 1]
    kinds = [kind for kind in WAN_KINDS if parallel.pp > 1 or kind != "decode"]
    faults: list[dict[str, Any]] = []
    for request, kind in enumerate(kinds):
        ranks = {"finish": tails[:1], "decode": [0], "encode": [0]}.get(kind, range(parallel.ranks))
        moment = {"at": "finish", "kind": "denoise"} if kind == "finish" else {"at": "after", "kind": kind}
        number = draw.randrange({"denoise": 3, "decode": 2}.get(moment["kind"], 1))
        do = draw.choice(["nan", "inf"])
        faults.append({"do": do, "request": request, "rank": draw.choice(ranks), "number": number, **moment})
    plan(*faults)
    folder, wanted = checkpoint(RandomConfig()), wan(1)
    with Engine(folder, parallel, device="cpu") as line:
        # Prompts of their own: those that share a kept embedding share what spoils it, until that has been told.
        handles = [line.submit(wan(0, prompt=f"{kind} red", negative_prompt=f"{kind} blue")) for kind in kinds]
        right = line.submit(wanted)
        for handle, fault in zip(handles, faults, strict=True):
            assert_named(handle, fault, parallel.place(fault["rank"]).pp)
        assert_equal(right.result(2 * LIMIT_S), oracle.run(folder, "float32", wanted))


@pytest.mark.parametrize(
    ("kind", "axes"),
    [("i2v", {"pp": 1}), ("i2v", {"pp": 2}), ("i2v", {"pp": 2, "expert_placement": "split"}), ("ti2v", {"pp": 2})],
    ids=str,
)
def test_an_image_that_is_not_finite_is_told_as_encode(
    kind: WanKind, axes: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint(RandomConfig(kind)), tmp_path / kind)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(vae)
    weights["quant_conv.bias"][0] = torch.nan
    save_file(weights, vae, {"format": "pt"})
    request = wan(0).model_copy(update={"image": Image.new("RGB", (64, 64))})
    with Engine(folder, ParallelConfig(**axes), device="cpu") as line:
        assert_named(line.submit(request), {"kind": "encode", "number": 0}, 0)


def test_a_device_without_memory_fails_wan(plan: Plan, checkpoint: Checkpoint) -> None:
    plan({"do": "memory", "rank": 1, "at": "after", "kind": "decode"})
    words = r"use a smaller size or fewer frames, more stages, or fewer requests in flight \(request 0\)$"
    failed = pytest.raises(RankFailed, match=f"Rank 1 failed: cpu has no memory left in decode 0 .*: {words}")
    with Engine(checkpoint(RandomConfig()), ParallelConfig(pp=2), device="cpu", restarts=0) as line, failed:
        line.submit(wan(0)).result(2 * LIMIT_S)


def wan(seed: int, prompt: str = "a red square", negative_prompt: str = "") -> VideoRequest:
    return VideoRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=3.0,
        seed=seed,
    )


@pytest.mark.parametrize("moment", ["take", "before", "after", "give", "finish", "answer"])
def test_want_of_memory_says_where_and_whose(moment: str, plan: Plan) -> None:
    plan({"do": "memory", "rank": 1, "at": moment, "kind": "denoise", "number": 2, "request": 1})
    failure = failure_of(2)
    assert (failure.rank, failure.request) == (1, 1)
    words = " has no memory left" if moment == "take" else " has no memory left in denoise 2 ("
    assert words in failure.cause


# Without processes.


class NoRanks:
    """Told what to do, and does nothing."""

    def do(self, deed: Callable[[], None]) -> None:
        deed()

    def tell(self, message: object, instead: object = None) -> None:
        pass


def line_without_ranks(stages: int) -> Line:
    blueprint = Blueprint.draw(ToySpec(), ParallelConfig(pp=stages), DeviceConfig(), None, "local")
    return Line(blueprint, cast(Ranks, NoRanks()), Record(None, blueprint.run))


@pytest.mark.parametrize("word", ["none", "before", "behind"])
def test_what_is_not_finite_is_answered_whoever_says_who_made_it(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_of_requests, "CULPRIT_LIMIT_S", 0.1)
    line = line_without_ranks(3)
    ticket, other = (line.submit(one, None, {}) for one in REQUESTS[:2])
    spoiled = Spoiled(WorkItem(Kind.DENOISE, 0, 2), 1)
    if word == "before":
        line.hear(spoiled)
    line.hear(Done(Group(Kind.DENOISE, 0, 3, 2), spoiled=True))
    if word == "behind":
        line.hear(spoiled)
    line.look()
    assert ticket.future.done() == (word != "none")
    time.sleep(0.15)
    line.look()
    error = ticket.future.exception(0)
    assert isinstance(error, NotFinite)
    assert (error.stage, error.number) == ((None, 3) if word == "none" else (1, 2))
    assert not other.future.done()


def test_a_request_without_snapshots_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    line = line_without_ranks(1)
    for number in (3, 4):
        line.hear(Unkept(number, "no such state"))
    words = "Request 3 has no new snapshot (no such state): if a rank is lost it begins at an older one, or anew."
    assert caplog.messages == [words]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_request_without_snapshots_goes_on(stages: int, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(InexactSpec(), ParallelConfig(pp=stages), device="cpu") as line:
        handles = [line.submit(wanted) for wanted in REQUESTS]
        for handle, wanted in zip(handles, REQUESTS, strict=True):
            assert_right(handle, wanted)
    (words,) = caplog.messages
    cause = "TypeError: state['sigma'] is of type numpy.float32: a snapshot holds tensors, Python's numbers, texts"
    assert words.startswith(f"Request 0 has no new snapshot ({cause}")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each delay; none is waited for."""
    times: list[float] = []
    monkeypatch.setattr(time, "sleep", times.append)
    return times


def delay(seconds: float, **fields: Any) -> Fault:
    given: dict[str, Any] = {"do": "delay", "seconds": seconds, "rank": 0, "at": "before"}
    return Fault(**given | fields)


def test_off_costs_nothing() -> None:
    family = ToyStages(ToySpec())
    assert planned() == ()
    assert with_faults(family, ()) is family
    assert with_faults(family, [delay(1.0, rank=1), delay(1.0, start=1)]) is family


def test_a_family_with_faults_passes_everything_on() -> None:
    """A method that the mixin gets and this does not would be the mixin's own, not the family's."""
    own = {name for name, value in vars(PipelineParallelMixin).items() if callable(value) and name[0] != "_"}
    family = with_faults(ToyStages(ToySpec()), [delay(1.0)])
    assert isinstance(family, PipelineParallelMixin)
    assert own <= vars(type(family)).keys()


def test_a_fault_fires_as_often_as_it_says(slept: list[float]) -> None:
    faults = [delay(1.0), delay(2.0, times=3), delay(3.0, branch="uncond"), delay(4.0, kind="decode", number=1)]
    family = loaded(faults)
    state = family.admit(ToySpec().resolve(REQUESTS[0], 0), None)
    for step in range(4):
        for branch in Branch:
            family.compute(prepared(state), WorkItem(Kind.DENOISE, 0, step, branch), True, True)
    assert slept == [1.0, 2.0, 2.0, 3.0, 2.0]
    for chunk in range(3):
        family.compute(state, WorkItem(Kind.DECODE, 0, chunk), True, True)
    assert slept[5:] == [4.0]


def test_a_fault_of_a_request_waits_for_it_and_rehearsals_use_none_up(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ToySpec().resolve(REQUESTS[0], 0)
    monkeypatch.setattr(ToyStages, "rehearsals", lambda self: [(job, None)])
    family = loaded([delay(1.0, at="admit"), delay(2.0, at="admit", request=3)])
    for rehearsed, image in family.rehearsals():
        family.admit(rehearsed, image)
    assert slept == []
    for number in range(5):
        family.admit(ToySpec().resolve(REQUESTS[0], number), None)
    assert slept == [1.0, 2.0]


def test_a_nan_is_written_into_a_copy() -> None:
    family = loaded([Fault(do="nan", rank=0, at="finish"), Fault(do="nan", rank=0, at="after", times=2)])
    lent = torch.zeros(3)
    state = prepared(family.admit(ToySpec().resolve(REQUESTS[0], 0), None))
    conditioning = state.conditioning
    family.compute(state, WorkItem(Kind.ENCODE, 0), False, True)
    assert state.conditioning[0].isnan().sum() == 1
    assert not any(tensor.isnan().any() for tensor in conditioning)
    state.latents = lent
    state.predictions = dict.fromkeys(Branch, lent)
    shared = state.latents
    family.finish(state, WorkItem(Kind.DENOISE, 0))
    assert state.latents.isnan().sum() == 1
    assert not shared.isnan().any()
    # Frames are bytes, so that the fault waits for what comes after them.
    state.latents = torch.zeros(3, 3)
    family.compute(state, WorkItem(Kind.DECODE, 0), True, True)
    assert state.hidden[0].dtype == torch.uint8
    family.compute(state, WorkItem(Kind.DECODE, 0), True, False)
    assert state.hidden[0].isnan().sum() == 1


def loaded(faults: list[Fault]) -> PipelineParallelMixin[Any]:
    """A toy on one rank."""
    parallel = ParallelConfig(pp=1)
    cut = ToySpec().cut(parallel, DeviceConfig())
    family = with_faults(ToyStages(ToySpec()), faults)
    family.load(StagePart(parallel.place(0), parallel.filled(cut), cut[0], torch.device("cpu"), DeviceConfig()))
    return family


def prepared(state: RequestState) -> RequestState:
    state.conditioning = torch.zeros(3), torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("kill rank 1", "='kill rank 1' is no JSON list of faults: give one such as"),
        ('{"do": "kill"}', "is no JSON list of faults"),
        ("[3]", "is no JSON list of faults"),
        ([{"do": "explode"}], "do='explode' of fault 0 cannot be used: give 'kill', 'stop'"),
        ([{"rank": -1}], "rank=-1 of fault 0 cannot be used: give greater than or equal to 0"),
        ([{"rank": "1"}], "rank='1' of fault 0 cannot be used: give a valid integer"),
        ([{"at": "noon"}], "at='noon' of fault 0"),
        ([{}, {"kind": "drop"}], "kind='drop' of fault 1"),
        ([{"branch": 1}], "branch=1 of fault 0"),
        ([{"times": 0}], "times=0 of fault 0"),
        ([{"do": "delay", "seconds": -1}], "seconds=-1 of fault 0"),
        ([{"colour": 1}], "fault 0 has an unknown field 'colour': the fields are do, rank, at, "),
        ([{"rank": None}], "rank=None of fault 0"),
        ([{"do": "delay"}], "of fault 0, do='delay' has no seconds: give some"),
        ([{"seconds": 1}], r"of fault 0, seconds=1.0 is for do='delay', not 'kill': leave it out"),
        ([{"do": "inf", "at": "give"}], "at='give' has nothing for do='inf' to spoil"),
        ([{"do": "nan"}], "of fault 0, at='before' has nothing for do='nan' to spoil: use after or finish"),
        ([{"at": "load", "request": 0}], "of fault 0, request=0 is not known at='load': leave it out"),
        ([{"at": "admit", "kind": "text"}], "of fault 0, kind='text' is not known at='admit': leave it out"),
    ],
)
def test_what_is_no_fault_is_refused_in_a_sentence(given: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"do": "kill", "rank": 0, "at": "before"}
    text = given if isinstance(given, str) else json.dumps([good | fault for fault in given])
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InvalidConfig, match=words) as refused:
        planned()
    message = str(refused.value)
    assert message.startswith(VARIABLE)
    assert message.endswith(".")
    assert "\n" not in message


def test_a_fault_without_a_rank_is_refused_by_the_engine(plan: Plan) -> None:
    plan({"do": "kill", "at": "before"})
    with pytest.raises(InvalidConfig, match="fault 0 has no 'rank': give one"):
        engine(2)


def test_planned_faults_are_warned_of(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    plan({"do": "delay", "seconds": 2, "rank": 1, "at": "load"}, {"do": "kill", "rank": 0, "at": "take", "times": 2})
    first, second = planned()
    assert first == Fault(do="delay", seconds=2.0, rank=1, at="load")
    assert second.times == 2
    assert "faults on purpose: do=delay rank=1 at=load seconds=2.0 times=1 start=0; do=kill" in caplog.text
