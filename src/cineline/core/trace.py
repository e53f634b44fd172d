"""The timeline of a run: one row a rank, one slice a work item, in Chrome's trace format.

Open the file in ui.perfetto.dev or chrome://tracing. Format: "Trace Event Format", complete events
("ph": "X", times in microseconds).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cineline.core.output import whole_file
from cineline.core.request import Kind, WorkItem


@dataclass(frozen=True)
class Slice:
    """One work item on one rank.

    Attributes:
        rank: whose.
        item: what was executed.
        start_ns, end_ns: wall-clock time, without the wait for its input.
        waited_ns: how long the stage waited for the input tensor before that.
    """

    rank: int
    item: WorkItem
    start_ns: int
    end_ns: int
    waited_ns: int


def slice_name(item: WorkItem) -> str:
    """A short label, such as "r3 step 7 cond"."""
    if item.kind is Kind.DENOISE:
        return f"r{item.request} step {item.number} {item.branch.name.lower()}"
    suffix = f" {item.number}" if item.kind is Kind.DECODE else ""
    return f"r{item.request} {item.kind.name.lower()}{suffix}"


def write_trace(slices: Iterable[Slice], path: Path) -> None:
    """Write the slices as a Chrome trace, by a temporary name first."""
    ordered = sorted(slices, key=lambda entry: entry.start_ns)
    origin = min((entry.start_ns for entry in ordered), default=0)
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({entry.rank for entry in ordered})
    ]
    events = [
        {
            "ph": "X",
            "name": slice_name(entry.item),
            "cat": entry.item.kind.name.lower(),
            "pid": 0,
            "tid": entry.rank,
            "ts": (entry.start_ns - origin) / 1000,
            "dur": (entry.end_ns - entry.start_ns) / 1000,
            "args": {"request": entry.item.request, "waited_ms": entry.waited_ns / 1e6},
        }
        for entry in ordered
    ]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}))
