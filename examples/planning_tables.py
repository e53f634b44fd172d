"""The tables of docs/planning.md: `python examples/planning_tables.py` prints them, `--write` puts them there."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cineline.errors import InvalidConfig
from cineline.families.wan.known import KNOWN
from cineline.planning.hardware import devices_of, link_of
from cineline.planning.planner import Planning, Task, plan, planned_job, plans_of, soonest
from cineline.planning.report import name_of

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"

CARDS = {"RTX4090": "pcie4", "L40S": "pcie4", "H100": "nvlink4", "H200": "nvlink4"}
"""24, 48, 80 and 141 GB, with the link that joins them."""

COUNTS = (1, 2, 4, 8)

SIZES = {"ti2v": (704, 1280, 121), "t2v": (480, 832, 81), "i2v": (480, 832, 81)}

PUBLISHED = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": [(46.3, 52.0), (37.9, 47.4), (34.1, 44.9)],
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": [(208.9, 76.6), (171.3, 50.3), (152.5, 37.2)],
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": [(256.1, 76.4), (211.1, 50.1), (186.9, 37.0)],
}
"""Seconds and GB on 1, 2 and 4 devices (github.com/vllm-project/vllm-omni/pull/2322)."""


FEW_STEPS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
"""The model whose requests of four steps are planned for, too."""


def task_of(model: str, devices: str, link: str, requests: int, preset: str | None = None) -> Task:
    spec = KNOWN[model]
    height, width, frames = SIZES[spec.kind]
    fields = {"height": height, "width": width, "num_frames": frames, "preset": preset}
    job = planned_job(spec, fields)
    return Task(spec, devices_of(devices), link_of(link), job, requests)


def command(task: Task, devices: str, more: str = "") -> str:
    job = task.job
    size = f"--height {job.height} --width {job.width} --num-frames {job.num_frames}"
    return f"cineline plan {task.spec.model_options} --devices {devices} --link {task.link.name} {size}{more}"


def cards_tables() -> Iterator[str]:
    """For each model: what four kinds of card hold, and how fast eight requests go."""
    for model in KNOWN:
        job = task_of(model, "1xH200", "nvlink4", 8).job
        yield f"### {model}, {job.width}x{job.height}, {job.num_frames} frames, {job.steps} steps, 8 requests"
        yield ""
        yield "| devices | best plan | decode | in flight | GB at most | s for 8 | s alone | s a request | least GB |"
        yield "|-|-|-|-|-|-|-|-|-|"
        for card, link in CARDS.items():
            for count in COUNTS:
                yield cards_row(model, f"{count}x{card}", link)
        yield ""
        yield f"Each row: `{command(task_of(model, '4xL40S', 'pcie4', 8), '4xL40S')}` with its own devices and link."
        yield ""


def preset_table() -> Iterator[str]:
    """The same of one model with four steps and no guidance, as distilled models and LoRAs have them."""
    yield "| devices | best plan | decode | in flight | GB at most | s for 8 | s alone | s a request | least GB |"
    yield "|-|-|-|-|-|-|-|-|-|"
    for card, link in CARDS.items():
        for count in COUNTS:
            yield cards_row(FEW_STEPS, f"{count}x{card}", link, "lightning")
    yield ""
    line = command(task_of(FEW_STEPS, "4xL40S", "pcie4", 8), "4xL40S", " --preset lightning")
    yield f"Each row: `{line}` with its own devices and link."
    yield ""


def cards_row(model: str, devices: str, link: str, preset: str | None = None) -> str:
    task = task_of(model, devices, link, 8, preset)
    name = f"{devices}, {link}" if len(task.devices) > 1 else devices
    try:
        found: Planning = plan(task)
    except InvalidConfig as error:
        missing = re.search(r"needs ([\d.]+) GB on stage \d+, ([\d.]+) GB more", str(error))
        assert missing is not None
        return f"| {name} | does not fit: {missing[2]} GB too much | | | {missing[1]} | | | | |"
    best = found.best
    seconds = f"{best.total:.0f} | {best.latency:.0f} | {best.period:.0f}"
    figures = f"{best.peak / 1e9:.1f} | {seconds} | {found.memory.peak / 1e9:.1f}"
    return f"| {name} | {name_of(best)} | {best.parallel.vae_decode} | {best.in_flight} | {figures} |"


def published_table() -> Iterator[str]:
    """One request over stages alone, as published and as computed for H200s, which hold any of them whole."""
    yield "| model | devices | published s | published GB | computed s | computed GB | published speed-up | computed |"
    yield "|-|-|-|-|-|-|-|-|"
    for model, rows in PUBLISHED.items():
        alone = 0.0
        for count, (seconds, gigabytes) in zip((1, 2, 4), rows, strict=True):
            task = replace(task_of(model, f"{count}xH200", "nvlink4", 1), in_flight=1)
            stages = soonest([each for each in plans_of(task) if str(each.parallel) == f"pp={count}"])
            assert stages is not None
            alone = alone or stages.latency
            gains = f"{rows[0][0] / seconds:.2f} | {alone / stages.latency:.2f}"
            computed = f"{stages.latency:.1f} | {stages.peak / 1e9:.1f}"
            yield f"| {model.removeprefix('Wan-AI/')} | {count} | {seconds} | {gigabytes} | {computed} | {gains} |"
    yield ""


def tables() -> dict[str, str]:
    """By the names of their places in the page."""
    return {
        "cards": "\n".join(cards_tables()),
        "preset": "\n".join(preset_table()),
        "published": "\n".join(published_table()),
    }


def fill(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in tables().items():
        start, end = f"<!-- {name}: made by examples/planning_tables.py -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{table}{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(fill(PAGE.read_text()))
    else:
        print("\n".join(tables().values()))
