"""The house: imports go one way, and the public names are these."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import cineline

SOURCE = Path(cineline.__file__).parent

LAYERS = [
    ["errors"],
    ["output"],
    ["codec.video"],
    ["request"],
    ["config", "trace", "schedule.words"],
    ["schedule.rule"],
    ["costs.work"],
    ["costs.transformer", "costs.vae_units"],
    ["costs.text", "costs.vae"],
    ["costs.model", "planning.balance"],
    ["planning.cut"],
    ["spec"],
    ["planning.known", "planning.hardware"],
    ["scheduler", "control", "simulation.timeline", "simulation.profile", "simulation.wire", "planning.seconds"],
    ["simulation.simulator", "planning.line"],
    ["planning.forecast"],
    ["planning.fit"],
    ["planning.planner"],
    ["planning.report"],
    ["forked"],
    ["launch", "axis", "handle", "auto"],
    ["channel", "sink"],
    ["mesh", "models.weights", "models.random_checkpoint", "denoise", "pace", "models.sequence_parallel"],
    ["codec.text", "codec.vae", "models.pipeline_parallel", "models.tensor_parallel"],
    ["codec.decoder"],
    ["codec.rows"],
    ["models.wan", "stage"],
    ["worker", "hub"],
    ["engine", "nursery"],
    ["bench.measure", "bench.report", "bench.sleeping", "bench.beside", "evaluation.scenes"],
    ["bench.reference"],
    ["bench.calibrate", "bench.footprint"],
    ["bench.line", "bench.videos", "bench.decode", "evaluation.judge", "evaluation.compare"],
    ["bench.schedule", "bench.simulator", "bench.exact", "bench.traffic", "bench.memory", "evaluation.score"],
    ["bench.prediction"],
    ["cli.options", "cli.batch", "cli.progress"],
    ["cli.generate", "cli.plan", "cli.bench", "cli.evaluate"],
    ["cli"],
    ["__main__"],
]
"""Each module imports from the rows above its own only, wherever in the file the import stands."""

NO_TORCH = [
    "errors",
    "output",
    "request",
    "spec",
    "planning.known",
    "planning.hardware",
    "planning.cut",
    "planning.planner",
    "planning.report",
    "config",
    "trace",
    "scheduler",
    "control",
    "schedule.words",
    "schedule.rule",
    "simulation.profile",
    "simulation.wire",
    "simulation.simulator",
    "simulation.timeline",
    "forked",
    "launch",
    "hub",
    "handle",
    "engine",
]


def modules() -> dict[str, Path]:
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        named[name] = path
    return named


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cineline"):
            base = node.module.removeprefix("cineline").lstrip(".")
            within = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            names |= within & modules().keys() or {base}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("cineline.") for alias in node.names if "cineline." in alias.name}
    return names


def test_imports_go_down_the_list_only() -> None:
    row_of = {name: row for row, names in enumerate(LAYERS) for name in names}
    packages = {
        "",
        "bench",
        "codec",
        "costs",
        "evaluation",
        "models",
        "planning",
        "schedule",
        "simulation",
    }  # docstrings, and the public names
    assert modules().keys() - packages == row_of.keys()
    for name in row_of:
        for other in imported(modules()[name]) - packages:
            assert row_of[other] < row_of[name], f"{name} imports {other}"


def test_the_decisions_need_no_torch() -> None:
    code = f"import sys; {'; '.join(f'import cineline.{name}' for name in NO_TORCH)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_public_names() -> None:
    assert sorted(cineline.__all__) == [
        "CheckpointError",
        "CinelineError",
        "Engine",
        "EngineClosed",
        "InvalidConfig",
        "InvalidRequest",
        "OutputError",
        "ParallelConfig",
        "RankFailed",
        "RequestCancelled",
        "RequestHandle",
        "ResultTimeout",
        "Video",
        "VideoRequest",
        "__version__",
    ]
    assert all(hasattr(cineline, name) for name in cineline.__all__)


def test_the_toy_family_is_under_100_lines() -> None:
    assert len((Path(__file__).parent / "toy_family.py").read_text().splitlines()) < 100
