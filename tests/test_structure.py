"""The house: imports go one way, and the public names are these."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import cineline

SOURCE = Path(cineline.__file__).parent

ROOMS = [
    "errors",
    "core",
    "schedule",
    "planning",
    "transport",
    "weights",
    "media",
    "families",
    "rank",
    "engine",
    "bench",
    "server",
    "cli",
]
"""Whatever is in a room imports from itself and from the rooms above it only, wherever in a file the import stands."""

NO_TORCH = ["core", "schedule", "planning", "engine"]
NO_TORCH += ["weights.layout", "weights.sources", "weights.scaled", "weights.lora"]
NO_TORCH += [
    f"families.wan.{name}"
    for name in (
        "spec",
        "constants",
        "costs",
        "job",
        "known",
        "vocabulary",
        "naming",
        "recognise",
        "assemble",
        "tensors",
    )
]
NO_TORCH += ["families.wan.lora_keys", "families.wan.loras"]
NO_TORCH += [f"families.{name}" for name in ("checkpoint", "fields", "placing", "stack", "qwen_vl_costs", "registry")]
NO_TORCH += ["families.double_stream", *(f"families.wan_vae.{name}" for name in ("constants", "costs", "cost_units"))]
NO_TORCH += ["families.identity", "transport.rendezvous"]
NO_TORCH += [f"families.qwen_image.{name}" for name in ("spec", "costs", "prompts", "vae", "known")]
NO_TORCH += [f"families.hunyuan_video.{name}" for name in ("spec", "costs", "constants", "vae", "known")]
"""Rooms, or parts of one, whose modules need no torch."""


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


def room(name: str) -> str:
    return name.partition(".")[0]


def test_imports_go_down_the_list_only() -> None:
    assert {room(name) for name in modules()} - {"", "__main__"} == set(ROOMS)
    for name, path in modules().items():
        for other in imported(path) - {""} if name not in ("", "__main__") else ():
            assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} imports {other}"


def test_no_room_imports_in_a_circle() -> None:
    """Within a room the same: a module's imports never lead back to it."""
    graph = {name: imported(path) & modules().keys() for name, path in modules().items() if name}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_few_modules_are_flat() -> None:
    flat = [name for name, path in modules().items() if "." not in name and path.name != "__init__.py"]
    assert sorted(flat) == ["__main__", "errors"]


def test_the_decisions_need_no_torch() -> None:
    names = [name for name in modules() if any(name == part or name.startswith(f"{part}.") for part in NO_TORCH)]
    code = f"import sys; {'; '.join(f'import cineline.{name}' for name in names)}; print('torch' in sys.modules)"
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
        "ModelFiles",
        "NotFinite",
        "OutOfMemory",
        "OutputError",
        "ParallelConfig",
        "RankFailed",
        "RequestCancelled",
        "RequestHandle",
        "RequestTimedOut",
        "ResultTimeout",
        "Video",
        "VideoRequest",
        "WrongProcess",
        "__version__",
    ]
    assert all(hasattr(cineline, name) for name in cineline.__all__)


def test_the_toy_family_is_under_100_lines() -> None:
    assert len((Path(__file__).parent / "toy_family.py").read_text().splitlines()) < 100


PATHS = {"path", "folder", "file", "home", "index", "reference", "other", "requests", "output", "trace"}


def test_an_error_repeats_no_path_that_is_not_shown() -> None:
    """Nor the representation of a value: `errors.shown` keeps both on one line, and short."""
    bare = []
    for name, path in modules().items():
        raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        for part in (part for node in raised for part in ast.walk(node) if isinstance(part, ast.FormattedValue)):
            ends = getattr(part.value, "attr", getattr(part.value, "id", "")).lstrip("_")
            if ends in PATHS or (part.conversion != -1 and isinstance(part.value, ast.Name)):
                bare.append(f"{name}:{part.lineno}")
    assert not bare


def test_no_class_is_over_250_lines_and_hardly_a_function_over_50() -> None:
    functions = 0
    long = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            lines = (getattr(node, "end_lineno", None) or 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.ClassDef):
                assert lines <= 250, f"{name}.{node.name} has {lines} lines"
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions += 1
                if lines > 50:
                    long.append(f"{name}.{node.name}: {lines}")
    assert len(long) <= functions / 100, long
