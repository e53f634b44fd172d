"""`cineline generate --resume DIR`: the options that a snapshot folder stands for, and what is said of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineline.cli.batch import Outputs, Task
from cineline.cli.options import Given
from cineline.core.family import FamilySpec
from cineline.core.image import load_image
from cineline.core.output import whole_file
from cineline.core.request import IMAGES
from cineline.engine.blueprint import THREADS
from cineline.engine.folder import RUN, SnapshotFolder, entries_in, run_of
from cineline.engine.launch import Launcher
from cineline.errors import InvalidConfig, shown

if TYPE_CHECKING:
    from rich.console import Console

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started the world anew."""

OF_STAGES = ("split", "text_split", "vae_split")
"""What fits one number of stages alone."""

BATCH = "batch.json"

STORE_LIMIT_S = 60.0
"""For all requests of a batch to be written."""


@dataclass(frozen=True)
class Order:
    """The model and the line that are asked for, as far as options say."""

    model: str | None
    variant: str | None
    files: Given
    line: Given
    devices: Given
    in_flight: int | None
    loras: Sequence[str]
    lora_mode: str

    def resumed(self, folder: Path) -> Order:
        """What the folder says, but for what options say.

        Raises:
            InvalidConfig: nothing can be resumed from there.
        """
        run = run_of(folder)
        files = {name: Path(path) for name, path in run.files.items()} | self.files
        if run.model is None and self.model is None and not files:
            raise InvalidConfig(
                f"{shown(folder)} has requests of a model without a name: resume them in Python, by Engine.resume."
            )
        if threads := run.bits.get(THREADS):
            os.environ.setdefault(THREADS, threads)
        line = dict(run.line)
        if {"pp", "expert_placement"} & self.line.keys():
            line = {name: value for name, value in line.items() if name not in OF_STAGES}
        devices = dict(run.options)
        in_flight = devices.pop("in_flight", None)
        loras, lora_mode = devices.pop("loras", []), devices.pop("lora_mode", self.lora_mode)
        return replace(
            self,
            model=run.model if self.model is None else self.model,
            variant=run.variant if self.variant is None else self.variant,
            files=files,
            line=line | self.line,
            devices=devices | self.devices,
            in_flight=in_flight if self.in_flight is None else self.in_flight,
            loras=self.loras or loras,
            lora_mode=self.lora_mode if self.loras else lora_mode,
        )


def is_restart(launcher: Launcher) -> bool:
    """Whether torchrun has started the world anew."""
    return launcher == "torchrun" and os.environ.get(RESTARTS, "0") != "0"


def files_begun(folder: Path | None, asked: Sequence[Task], launcher: Launcher) -> list[Path] | None:
    """The files of these tasks where torchrun has started the world anew, and the folder is of them; else None."""
    if folder is None or not is_restart(launcher):
        return None
    try:
        batch = json.loads((folder / BATCH).read_text())
        return [Path(path) for path in batch["files"]] if batch["asked"] == _named(asked) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def refuse_unfinished(folder: Path) -> None:
    """Refuse to begin where something else is not done.

    Raises:
        InvalidConfig: the folder has such requests.
    """
    count = len(entries_in(folder)) if (folder / RUN).exists() else 0
    if count:
        raise InvalidConfig(
            f"--snapshot-dir {shown(folder)} has {count} requests that are not done: go on with them by --resume, or "
            "give another folder."
        )


def tells_metadata(folder: Path) -> bool:
    """Whether files of the batch that was last run in a folder say what made them."""
    try:
        return bool(json.loads((folder / BATCH).read_text())["metadata"])
    except (OSError, ValueError, LookupError, TypeError):
        return True


def store(folder: Path, spec: FamilySpec, asked: Sequence[Task], tasks: Sequence[Task], metadata: bool) -> None:
    """Keep all tasks before anything runs, so that a run that ends at any moment can be resumed.

    Args:
        asked: what `tasks` were made of, in which seeds may be still to draw. metadata: see `tells_metadata`.

    Raises:
        InvalidConfig: the folder has requests that are not done, or another process has it.
        OutputError: it cannot be used.
    """
    refuse_unfinished(folder)
    kept = SnapshotFolder(folder)
    try:
        kept.clear()
        for number, task in enumerate(tasks):
            given = {name: getattr(task.request, name) for name in IMAGES}
            loaded = {name: load_image(image, name) for name, image in given.items() if image is not None}
            request = task.request.model_copy(update=loaded)
            kept.add(spec.resolve(request, number), request, task.outputs)
        files = [str(path) for task in tasks for path in task.absolute]
        with whole_file(folder / BATCH) as temporary:
            temporary.write_text(json.dumps({"asked": _named(asked), "files": files, "metadata": metadata}))
    finally:
        kept.close(STORE_LIMIT_S)


def _named(tasks: Sequence[Task]) -> list[str]:
    """Tasks, so that they can be told from others."""
    return [repr(task) for task in tasks]


def refuse_beside_resume(
    prompt: str | None, requests: Path | None, fields: Mapping[str, Any], outputs: Outputs, recovery: Mapping[str, Any]
) -> None:
    """Refuse what the folder says itself.

    Raises:
        InvalidConfig: a request, an output or another folder is given, too.
    """
    given = {"prompt": prompt, "--requests": requests, **vars(outputs), **fields}
    given["--snapshot-dir"] = recovery.get("snapshot_dir")
    for name, value in given.items():
        if value is not None:
            option = name if name.startswith("-") or name == "prompt" else f"--{name.replace('_', '-')}"
            raise InvalidConfig(
                f"{option}={shown(value)} is given beside --resume, whose folder says it: leave it out."
            )


def tell_how_to_resume(folder: Path | None, screen: Console) -> None:
    """Where something is left to go on with."""
    if folder is not None and entries_in(folder):
        screen.print(f"Go on with: cineline generate --resume {folder}", highlight=False, soft_wrap=True)
