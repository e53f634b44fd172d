"""A picture of a timeline: a row a rank, a colour a request, a hatch a kind of work item (no torch)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cineline.core.extras import need
from cineline.core.output import check_output, whole_file
from cineline.core.request import Branch, Kind, WorkItem
from cineline.core.trace import Slice

PICTURE_SUFFIXES = (".png", ".svg")

HATCHES = {Kind.TEXT: "....", Kind.ENCODE: "xxxx", Kind.DENOISE: "", Kind.DECODE: "////", Kind.DROP: "oo"}

UNCOND_ALPHA = 0.55
"""Of the second branch, which is paler than the first."""

SLICES_WITH_EDGES = 200
"""In a row; of more the edges would hide the colours."""


def draw_timeline(slices: Sequence[Slice], path: Path) -> None:
    """Draw the slices as a PNG or SVG picture.

    Raises:
        OutputError: it cannot be written there, or is neither.
        MissingLibrary: matplotlib is not installed.
    """
    check_output(path, PICTURE_SUFFIXES)
    need("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    origin = min((entry.start_ns for entry in slices), default=0)
    ranks = sorted({entry.rank for entry in slices})
    requests = sorted({entry.item.request for entry in slices})
    bars: dict[tuple[int, int, Kind, Branch], list[tuple[float, float]]] = defaultdict(list)
    for entry in slices:
        start, end = ((time - origin) / 1e9 for time in (entry.start_ns, entry.end_ns))
        bars[ranks.index(entry.rank), requests.index(entry.item.request), *_look(entry.item)].append(
            (start, end - start)
        )
    figure = Figure(figsize=(14, 1.6 + 0.45 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    line = 0.4 if len(slices) < SLICES_WITH_EDGES * len(ranks) else 0.0
    for (row, request, kind, branch), spans in bars.items():
        look: dict[str, Any] = {"facecolor": _colour(request), "alpha": _alpha(branch), "hatch": HATCHES[kind]}
        axes.broken_barh(spans, (row - 0.4, 0.8), edgecolor="white", linewidth=line, **look)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=_colour(number), label=f"request {request}") for number, request in enumerate(requests)]
    legend += [
        Patch(facecolor="0.4", edgecolor="white", alpha=_alpha(branch), hatch=HATCHES[kind], label=_label(kind, branch))
        for kind, branch in sorted({key[2:] for key in bars})
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=min(8, len(legend) or 1), frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _look(item: WorkItem) -> tuple[Kind, Branch]:
    """What an item is drawn by: its kind, and of a forward the branch."""
    return item.kind, item.branch if item.kind is Kind.DENOISE else Branch.COND


def _label(kind: Kind, branch: Branch) -> str:
    return f"denoise, {branch.name.lower()}" if kind is Kind.DENOISE else kind.name.lower()


def _alpha(branch: Branch) -> float:
    return 1.0 if branch is Branch.COND else UNCOND_ALPHA


def _colour(number: int) -> str:
    return f"C{number % 10}"
