"""What every benchmark prints and writes: the machine, a table, JSON beside it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from cineline.core.output import whole_file
from cineline.core.streams import console

LIBRARIES = ("cineline", "torch", "diffusers", "transformers")


FILE_WIDTH = 120
"""Columns of what is printed where there is no terminal."""


def machine(device: str, program: str = "cineline") -> dict[str, Any]:
    """Hardware, versions and command, to stand beside every figure."""
    facts = {
        "command": " ".join([program, *sys.argv[1:]]),
        "device": _device_name(device),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
    return facts | {name: metadata.version(name) for name in LIBRARIES}


def _device_name(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], result: dict[str, Any], json_file: Path | None
) -> None:
    """Print a table and the machine it was measured on; write `result` where a file is named."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    screen = console(width=FILE_WIDTH)
    screen.print(table)
    screen.print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), highlight=False)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
