"""The planner: random models, devices and requests; and what it says of the real ones."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import job as job_like
from toy_family import ToySpec
from typer.testing import CliRunner

from cineline import ParallelConfig
from cineline.cli import app
from cineline.core.config import DeviceConfig, Place
from cineline.core.hardware import Device, Link
from cineline.core.request import Job, Kind, Value, WorkItem
from cineline.engine import auto
from cineline.engine.auto import divide
from cineline.errors import InvalidConfig
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.known import KNOWN
from cineline.families.wan.spec import WanSpec
from cineline.planning.bound import Bound
from cineline.planning.hardware import DEVICES, LINKS, device_named, devices_of, link_of
from cineline.planning.plan import Plan
from cineline.planning.planner import OTHERS, Planning, Task, axes_of_plan, plan, planned_job, plans_of
from cineline.planning.report import chosen_plans
from cineline.schedule.scheduler import speed_up_limit
from cineline.schedule.simulator import simulate

TI2V, T2V, I2V = list(KNOWN.values())[:3]


@st.composite
def specs(draw: st.DrawFn) -> WanSpec:
    """A Wan model of any size."""
    spec: WanSpec = draw(st.sampled_from([TI2V, T2V, I2V]))
    heads = draw(st.sampled_from([2, 3, 4, 8]))
    shape = {"num_layers": draw(st.integers(1, 12)), "num_attention_heads": heads}
    shape |= {"attention_head_dim": 32, "ffn_dim": 64 * draw(st.integers(1, 16))}
    text = {"num_layers": draw(st.integers(1, 12)), "d_model": 64 * draw(st.integers(1, 8)), "vocab_size": 1000}
    base = 8 * draw(st.integers(1, 6))
    vae = {"base_dim": base, "num_res_blocks": draw(st.integers(1, 2))}
    return replace(
        spec,
        transformer={**spec.transformer, **shape},
        text={**spec.text, **text},
        vae={**spec.vae, **vae},
    )


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Devices that may be unequal, and may be too small."""
    spec = draw(specs())
    count = draw(st.integers(1, 4))
    kinds = [
        replace(DEVICES["l40s"], memory=draw(st.floats(2e7, 5e9)), reserved=10**6),
        replace(DEVICES["rtx4090"], memory=draw(st.floats(2e7, 5e9)), reserved=10**6),
    ]
    devices = draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count))
    fields: dict[str, Any] = {"height": 64, "width": 32 * draw(st.integers(1, 4)), "num_inference_steps": 4}
    fields |= {"num_frames": 4 * draw(st.integers(0, 5)) + 1, "guidance_scale": draw(st.sampled_from([1.0, 4.0]))}
    return Task(
        spec,
        devices if draw(st.booleans()) else [kinds[0]] * count,
        draw(st.sampled_from(list(LINKS.values()))),
        planned_job(spec, fields),
        requests=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        in_flight=draw(st.one_of(st.none(), st.integers(1, 4))),
    )


def check(found: Plan, task: Task) -> None:
    """Every unit of every component on exactly one stage, in order; nothing above what its device holds."""
    line, axes, costs = found.line, found.parallel, task.spec.costs(task.dtype, task.vae_dtype)
    assert found.replicas * axes.ranks == len(task.devices)
    assert isinstance(costs, ModelCosts)
    for group in axes.groups:
        blocks = axes.blocks(costs.blocks)
        assert [block for stage in group for block in blocks[stage]] == list(range(costs.blocks))
    assert axes.text_split is not None
    assert len(axes.text_split) == axes.pp and sum(axes.text_split) == costs.text_layers
    assert min(axes.text_split) >= 0
    if axes.vae_decode == "rows":
        assert axes.vae_split is None and not found.exact
    else:
        units = [unit.name for stage in range(axes.pp) for unit in costs.units_on(axes, stage)]
        assert units == costs.vae.names
    for stage, device in enumerate(line.devices):
        assert line.peak_bytes(Place(pp=stage), found.in_flight) == found.peaks[stage] <= device.memory
    if axes.lanes == axes.cfg == 1:
        shares = [costs.held(axes, Place(pp=stage)).total for stage in range(axes.pp)]
        rows = axes.vae_decode == "rows"
        experts = costs.experts if len(axes.groups) == 1 else 1  # of each group; its last stage embeds, too
        again = experts * sum(len(group) > 1 for group in axes.groups)
        patches = again * costs.transformer.patch_embedding.nbytes(costs.dtype)
        assert rows or sum(shares) == costs.whole.total + patches
    assert 0 < found.period * found.replicas <= found.latency * 1.0001
    assert found.total >= found.latency * 0.9999
    assert found.bound.latency <= found.latency * 1.0001
    assert found.least_total <= found.total * 1.0001
    if task.in_flight is not None:
        assert found.in_flight <= task.in_flight


def all_of(planning: Planning) -> list[Plan]:
    named = [planning.best, planning.latency, planning.throughput, planning.memory, planning.replicas]
    return [each for each in [*named, *planning.others] if each is not None]


@given(tasks())
@settings(max_examples=20, deadline=None)
def test_every_plan_is_whole_in_order_and_fits(task: Task) -> None:
    try:
        planning = plan(task)
    except InvalidConfig as error:
        assert "does not fit" in str(error) or "No set of axes" in str(error)
        return
    for each in all_of(planning):
        check(each, task)
    assert planning.memory.peak <= planning.best.peak
    assert planning.best.exact or not any(each.exact for each in planning.others)


def test_a_video_model_on_four_cards() -> None:
    """The acceptance figure: T2V-A14B at 480x832x81 on four devices, at most 24 GB each."""
    planning = plan(planned(T2V, "4xL40S", height=480, width=832, num_frames=81))
    assert planning.memory.peak <= 24e9
    assert planning.best.exact


def planned(spec: WanSpec, devices: str, link: str = "pcie4", requests: int = 8, **fields: Any) -> Task:
    return Task(spec, devices_of(devices), link_of(link), planned_job(spec, fields), requests)


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    with pytest.raises(
        InvalidConfig, match=r"does not fit 1 x RTX4090: .* needs 7\d\.\d GB on stage 0, 5?\d?\d\.\d GB more"
    ):
        plan(planned(T2V, "1xRTX4090", height=480, width=832))


def test_replicas_win_where_the_model_fits_and_the_link_is_slow() -> None:
    planning = plan(planned(TI2V, "2xH100", "ethernet10"))
    assert planning.replicas is not None
    assert planning.best.replicas == 2


def test_one_request_goes_to_both_branches_at_once() -> None:
    planning = plan(planned(TI2V, "2xH100", "nvlink4", requests=1))
    assert planning.latency.parallel.cfg == 2 or planning.latency.parallel.ulysses == 2


def test_many_requests_that_fit_no_device_alone_fill_the_stages() -> None:
    planning = plan(planned(T2V, "4xL40S", height=480, width=832))
    best = planning.best
    assert best.parallel.pp > 1 and planning.replicas is None
    assert max(best.busy) > 0.9


def test_an_expert_without_a_step_is_no_trouble() -> None:
    task = Task(T2V, devices_of("2xH100"), link_of("nvlink4"), planned_job(T2V, {"num_inference_steps": 1}))
    assert plan(task).best.period > 0


def test_unequal_devices_get_unequal_shares() -> None:
    planning = plan(planned(TI2V, "1xH100,1xL40", height=480, width=832))
    blocks = planning.best.parallel.blocks(TI2V.layers)
    assert len(blocks[0]) > len(blocks[1])


def of_axes(task: Task, axes: str) -> Plan:
    """The soonest plan of one engine with these axes."""
    return min((each for each in plans_of(task) if axes_of_plan(each) == (1, axes)), key=lambda each: each.total)


def test_the_period_is_the_formulas() -> None:
    """P equal stages, no ends: 2MP / max(2M, P+1) of one stage's rate."""
    device = replace(DEVICES["h100"], memory=1e12)
    fast = Link("none", 1e18, 0.0)
    job = replace(planned_job(T2V, {"height": 480, "width": 832, "num_inference_steps": 40}), chunks=0, texts=0)
    alone = plan(Task(T2V, [device], fast, job, 1)).best
    for stages, in_flight in ((2, 1), (4, 1), (4, 2), (8, 3), (8, 5)):
        made = of_axes(Task(T2V, [device] * stages, fast, job, in_flight, in_flight=in_flight), f"pp={stages}")
        assert alone.period / made.period == pytest.approx(float(speed_up_limit(stages, in_flight, 2)), rel=0.03)


@dataclass(frozen=True)
class Uneven:
    """Any seconds for each kind of item on each stage, the first and the last chunk apart; nothing is held.

    Attributes:
        seconds: of each kind of item, by stage. high: steps of the first expert. travel: seconds of a value.
    """

    parallel: ParallelConfig
    seconds: dict[str, list[float]]
    high: int
    travel: dict[Value, float]

    def expert(self, job: Job, step: int) -> int:
        return int(step >= self.high)

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        if item.kind is Kind.DENOISE:
            return self.seconds[f"step {self.expert(job, item.number)}"][place.pp]
        if item.kind is Kind.DECODE:
            name = "first" if not item.number else "last" if item.number == job.chunks - 1 else "other"
            return self.seconds[f"{name} chunk"][place.pp]
        return self.seconds["text" if item.kind is Kind.TEXT else "encode"][place.pp]

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        return self.travel[value]

    def resident_bytes(self, place: Place) -> int:
        return 0

    def admitted_bytes(self, place: Place, job: Job) -> int:
        return 0

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        return 0


@st.composite
def uneven_lines(draw: st.DrawFn) -> Uneven:
    pp = draw(st.integers(1, 5))
    fields: dict[str, Any] = {"pp": pp, "cfg": draw(st.integers(1, 2))}
    fields["vae_decode"] = draw(st.sampled_from(["layers", "rows", "tail", "tiled"]))
    some_units = st.lists(st.integers(0, 1), min_size=pp, max_size=pp).filter(any).map(tuple)
    fields["text_split"] = draw(st.none() | some_units)
    if fields["vae_decode"] == "layers":
        fields["vae_split"] = draw(st.none() | some_units)
    if pp > 1 and draw(st.booleans()):
        fields |= {"expert_placement": "split", "high_stages": draw(st.integers(1, pp - 1))}
    some = st.sampled_from([0.0, 0.1, 1.0, 3.0])
    kinds = ("text", "encode", "step 0", "step 1", "first chunk", "other chunk", "last chunk")
    seconds = {kind: draw(st.lists(some, min_size=pp, max_size=pp)) for kind in kinds}
    return Uneven(ParallelConfig(**fields), seconds, draw(st.integers(0, 6)), {value: draw(some) for value in Value})


@st.composite
def like_jobs(draw: st.DrawFn) -> list[Job]:
    steps, branches, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(0, 4))
    texts, requests = draw(st.booleans()), draw(st.integers(1, 6))
    return [job_like(number, steps, branches, texts, chunks) for number in range(requests)]


@given(uneven_lines(), like_jobs(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_no_schedule_beats_the_bound(line: Uneven, jobs: list[Job], in_flight: int) -> None:
    bound = Bound(line, jobs[0])
    assert bound.latency <= simulate(line, jobs[:1], in_flight).makespan_s + 1e-6
    assert bound.total(in_flight, len(jobs)) <= simulate(line, jobs, in_flight).makespan_s + 1e-6


@pytest.mark.parametrize(
    ("spec", "devices", "link", "requests"),
    [(T2V, "4xL40S", "pcie4", 8), (TI2V, "2xH100", "pcie5", 1), (I2V, "2xL40S,1xRTX4090", "ethernet100", 3)],
)
def test_no_plan_is_sooner_than_the_best(spec: WanSpec, devices: str, link: str, requests: int) -> None:
    """Each that fits is simulated here; the planner left most of them out."""
    task = planned(spec, devices, link, requests, height=480, width=832, num_frames=21, num_inference_steps=10)
    planning, everything = plan(task), plans_of(task)
    exact = [each for each in everything if each.exact]
    best = planning.best
    jobs = [replace(task.job, id=number) for number in range(best.requests)]
    assert best.total == simulate(best.line, jobs, best.in_flight).makespan_s
    assert round(best.total, 3) == min(round(each.total, 3) for each in exact)
    assert round(planning.latency.latency, 3) == min(round(each.latency, 3) for each in exact)
    assert planning.throughput.period <= 1.011 * min(each.period for each in exact)
    soonest: dict[tuple[int, str], float] = {}
    for each in everything:
        soonest[axes_of_plan(each)] = min(each.total, soonest.get(axes_of_plan(each), each.total))
    del soonest[axes_of_plan(best)]
    assert [each.total for each in planning.others] == sorted(soonest.values())[:OTHERS]


def test_each_plan_is_listed_once() -> None:
    planning = plan(planned(TI2V, "2xH100", num_inference_steps=4))
    listed = list(chosen_plans(planning))
    assert listed[0] is planning.best
    assert len(set(listed)) == len(listed)
    assert axes_of_plan(planning.best) not in map(axes_of_plan, planning.others)


@pytest.mark.parametrize("text", ["", "4", "4xL40S;", "0xL40S", "2xNOTHING", "-1xL40S", "2 L40S"])
def test_devices_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig, match="devices="):
        devices_of(text)


def test_devices_and_links() -> None:
    assert [device.name for device in devices_of("2xl40s,RTX4090")] == ["L40S", "L40S", "RTX4090"]
    with pytest.raises(InvalidConfig, match=r"link='rope' is not in the table: use one of pcie4"):
        link_of("rope")
    named = {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA GeForce RTX 4090": "RTX4090", "NVIDIA L40S": "L40S"}
    named |= {"NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA H100 80GB HBM3": "H100"}
    assert {name: device_named(name, 1e9).name for name in named} == named
    with pytest.raises(InvalidConfig, match="'NVIDIA Nothing' is not in the planner's table"):
        device_named("NVIDIA Nothing", 1e9)
    device: Device = DEVICES["rtx4090"]
    assert link_of("pcie4").between(device).bandwidth == link_of("pcie4").bandwidth / 2


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", "--model", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--devices", "4xL40S", "--height", "480"]
    done = CliRunner().invoke(app, [*arguments, "--width", "832", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert 'Run it: cineline generate "PROMPT" --model Wan-AI/Wan2.2-T2V-A14B-Diffusers' in done.output
    assert "--guidance-scale 4 --guidance-scale-2 3 " in " ".join(done.output.split())  # one alone is both experts'
    written = json.loads(file.read_text())
    assert written["best"]["peak_gb"] <= 48
    assert sum(stage["text_layers"] for stage in written["best"]["stages"]) == 24


def test_the_page_has_what_the_planner_says() -> None:
    """Some of its rows; all of them take a minute."""
    root = Path(__file__).parent.parent
    tables = runpy.run_path(str(root / "examples" / "planning_tables.py"))
    page = (root / "docs" / "planning.md").read_text()
    rows = [tables["cards_row"](str(T2V.folder), f"4x{card}", link) for card, link in tables["CARDS"].items()]
    rows.append(tables["cards_row"](tables["FEW_STEPS"], "4xL40S", "pcie4", "lightning"))
    for row in [*rows, *tables["published_table"]()]:
        assert row in page, "run: python examples/planning_tables.py --write"


def test_what_is_simulated_holds_no_more_than_is_planned() -> None:
    for axes in ("pp=4", "cfg=2 x pp=2"):
        chosen = of_axes(planned(T2V, "4xL40S", height=480, width=832, num_frames=81), axes)
        for rank, peak in chosen.run(chosen.requests).peak_bytes.items():
            assert peak <= 1.02 * chosen.peaks[chosen.parallel.place(rank).pp]


def test_a_family_that_says_nothing_of_costs_is_not_planned_for() -> None:
    with pytest.raises(InvalidConfig, match="ToySpec does not say what its models cost"):
        divide(ToySpec(), DeviceConfig("cuda"), None)


def test_an_engine_on_the_cpu_plans_one_stage() -> None:
    assert divide(T2V, DeviceConfig("cpu"), None) == (ParallelConfig(), None)


def test_auto_is_the_best_plan_of_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "local_devices", lambda: [device_named("NVIDIA L40S", 48e9)] * 4)
    parallel, in_flight = divide(T2V, DeviceConfig("cuda", "bfloat16"), None)
    assert (parallel.pp, in_flight) == (4, 4)
    assert T2V.cut(T2V.place(parallel), DeviceConfig("cuda", "bfloat16"))[3].blocks == range(30, 40)
    monkeypatch.setattr(auto, "local_devices", lambda: [device_named("NVIDIA GeForce RTX 4090", 24e9)])
    with pytest.raises(InvalidConfig, match="does not fit"):
        divide(T2V, DeviceConfig("cuda", "bfloat16"), None)
