"""`make gpu`: every step in a process of its own, its result written at once; what is there already is not run again.

Without a GPU all steps run small on the CPU, which shows that they work and nothing else.

python -m benchmarks.gpu [--folder FOLDER] [--only STEP ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

STEP_LIMIT_S = 480
HERE = Path(__file__).resolve().parent.parent.parent
STEPS = (
    *("bits-float32", "bits-bfloat16", "transformer-ti2v-5b", "transformer-t2v-a14b"),
    *("decoder-ti2v-5b", "decoder-t2v-a14b", "ranks-ti2v-5b", "waits-ti2v-5b", "waits-t2v-a14b"),
)
COLUMNS = ("step", "arm", "seconds", "planned", "peak GB", "planned", "equal", "deviation", "waits")


def run_step(name: str, file: Path) -> None:
    """In the step's own process: measure, and write after each row."""
    import torch

    from benchmarks.gpu import bits, decoder, ranks, transformer, waits
    from cineline.bench.report import machine
    from cineline.core.output import whole_file

    device = torch.device(_device())
    kind, _, what = name.partition("-")
    modules = {"bits": bits, "transformer": transformer, "decoder": decoder, "ranks": ranks, "waits": waits}
    facts = machine(device.type) | {"command": f"python -m benchmarks.gpu --only {name}"}
    result: dict[str, Any] = {"step": name, "device": device.type, "machine": facts, "complete": False, "rows": []}
    begun = time.monotonic()
    rows = partial(modules[kind].measure, what)(device)
    while not result["complete"]:
        try:
            result["rows"].append(next(rows))
        except StopIteration:
            result["complete"] = True
        except Exception as error:
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}"
        result["took_s"] = round(time.monotonic() - begun, 1)
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        if "error" in result:
            raise SystemExit(1)


def main() -> None:
    """All steps that are not done, and the table of what is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE / "benchmarks" / "gpu-results")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.inside:
        run_step(options.only[0], options.folder / f"{options.only[0]}.json")
        return
    device = _device()
    if device == "cpu":
        print("There is no GPU here: every step runs small, on the CPU.", flush=True)
    found = {
        name: _complete(options.folder, name, device) or _run(options.folder, name, device) for name in options.only
    }
    failed = [name for name, complete in found.items() if not complete]
    (options.folder / "table.md").write_text(table(options.folder))
    print(table(options.folder))
    if failed:
        raise SystemExit(f"not complete: {', '.join(failed)}; the same command goes on from here.")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _complete(folder: Path, name: str, device: str) -> bool:
    """Whether the step has been done on such a device; what the CPU has done a GPU does again."""
    file = folder / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    return bool(result.get("complete")) and result.get("device") == device


def _run(folder: Path, name: str, device: str) -> bool:
    print(f"{name} ...", flush=True)
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE / "src"), os.environ.get("PYTHONPATH")]))
    environment = {"MKL_CBWR": "AUTO", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--only", name, "--folder", str(folder)]
    try:
        subprocess.run(command, env={**environment, "PYTHONPATH": path}, cwd=HERE, check=True, timeout=STEP_LIMIT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
    return _complete(folder, name, device)


def table(folder: Path) -> str:
    """All results of a folder, in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    machines: dict[str, None] = {}
    for name in STEPS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        machines[json.dumps({key: value for key, value in result["machine"].items() if key != "command"})] = None
        for row in result["rows"]:
            lines.append(" | ".join([name, *_cells(row)]))
        if "error" in result:
            lines.append(f"{name} | {result['error']}")
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(machines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    seconds = row.get("seconds")
    return [
        row["arm"],
        "" if seconds is None else "{:.3f} ({:.3f} to {:.3f})".format(*seconds),
        *("" if row.get(name) is None else f"{row[name]:.3f}" for name in ("planned_seconds", "peak_gb")),
        *("" if row.get(name) is None else str(row[name]) for name in ("planned_peak_gb", "equal", "deviation")),
        "" if row.get("waits") is None else str(row["waits"]),
    ]


if __name__ == "__main__":
    main()
