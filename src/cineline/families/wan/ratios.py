"""The file beside a model that has its ratios for MagCache (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cineline.core.output import whole_file
from cineline.errors import CheckpointError, InvalidRequest, shown
from cineline.families.configs import read_json
from cineline.families.wan.mag_cache import Ratios
from cineline.families.wan.shapes import WanShapes

RATIOS_FILE = "cineline-cache.json"

BRANCHES = ("cond", "uncond")

Measured = Mapping[str, Sequence[float]]
"""Ratios by branch."""


def ratios_file(model: WanShapes) -> Path:
    """Beside `model_index.json`; where there is none, beside the transformer's file and called like that, for others'
    files are there, too."""
    home = model.folder
    return home.with_name(f"{home.stem}.{RATIOS_FILE}") if home.is_file() else home / RATIOS_FILE


def ratios_of(model: WanShapes) -> tuple[Ratios, ...]:
    """Of each expert; both branches skip alike, by the mean of theirs.

    Raises:
        InvalidRequest: there are none.
        CheckpointError: the file is none of ours.
    """
    path = ratios_file(model)
    if not path.is_file():
        raise InvalidRequest(
            f"cache='mag' needs ratios that are measured on the model once, and {shown(path)} is not there: run "
            f"cineline calibrate-cache {model.model_options}, or leave cache out."
        )
    stored = read_json(path, "it was there a moment ago").get("mag")
    experts = [stored.get(name) for name in model.experts] if isinstance(stored, dict) else [None]
    if not all(map(_is_measured, experts)):
        raise CheckpointError(
            f"{shown(path)} does not have rows of positive ratios, of branches alike in length, of every expert: "
            f"remove it and run cineline calibrate-cache {model.model_options}."
        )
    return tuple(_mean(list(branches.values())) for branches in experts if branches)


def write_ratios(model: WanShapes, measured: Mapping[str, Measured], how: Mapping[str, Any]) -> Path:
    """Write the file.

    Args:
        measured: by expert. how: it was measured, for whoever reads it.

    Raises:
        OutputError: it cannot be written.
    """
    path = ratios_file(model)
    with whole_file(path) as temporary:
        content = {"mag": measured, "measured": how}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _is_measured(branches: Any) -> bool:
    if not isinstance(branches, dict) or not branches or not set(branches) <= set(BRANCHES):
        return False
    rows = list(branches.values())
    lists = all(isinstance(row, list) and row for row in rows) and len({len(row) for row in rows}) == 1
    return lists and all(_is_ratio(value) for row in rows for value in row)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _mean(rows: Sequence[Sequence[float]]) -> Ratios:
    return tuple(sum(values) / len(values) for values in zip(*rows, strict=True))
