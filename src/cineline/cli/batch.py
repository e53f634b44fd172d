"""From options and a JSONL file to requests, each with the files its result goes to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cineline.core.family import FamilySpec
from cineline.core.image import load_image
from cineline.core.output import (
    LATENT_SUFFIXES,
    STILL_SUFFIXES,
    VIDEO_SUFFIXES,
    check_folder,
    check_frames_folder,
    check_output,
    check_rate,
    check_still,
)
from cineline.core.request import IMAGES, VideoRequest
from cineline.errors import InvalidRequest, OutputError, reason, shown

DEFAULT_OUTPUT = Path("out.mp4")
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Task:
    """One request and where its result goes; at least one of the files is set.

    Attributes:
        line: of the file of requests, from 1.
        frames: a folder of pictures, instead of a video.
    """

    request: VideoRequest
    video: Path | None
    latents: Path | None
    line: int = 1
    frames: Path | None = None

    @property
    def outputs(self) -> dict[str, Path]:
        """The files, by what they are."""
        files = {"video": self.video, "frames": self.frames, "latents": self.latents}
        return {what: path for what, path in files.items() if path is not None}

    @property
    def absolute(self) -> set[Path]:
        """The files, wherever the command is run."""
        return {path.absolute() for path in self.outputs.values()}


@dataclass(frozen=True)
class Outputs:
    """The options that say where results go; what is not given is None."""

    output: str | None
    output_dir: Path | None
    save_latents: Path | None
    name: str | None = None
    skip_existing: bool | None = None
    overwrite: bool | None = None

    @property
    def is_folder(self) -> bool:
        """Whether `output` is one of frames."""
        return self.output is not None and self.output.endswith("/")


def single_task(prompt: str, fields: Mapping[str, Any], outputs: Outputs) -> Task:
    """The task of `cineline generate PROMPT`.

    Raises:
        InvalidRequest, OutputError: a field or an output cannot be used.
    """
    output = None if outputs.output is None else Path(outputs.output)
    if output and outputs.output_dir:
        raise OutputError(f"Both --output {shown(output)} and --output-dir {shown(outputs.output_dir)}: use one.")
    if outputs.save_latents:
        check_output(outputs.save_latents, LATENT_SUFFIXES)
    decode = not outputs.save_latents or outputs.output_dir is not None or output is not None
    task = Task(VideoRequest(prompt=prompt, decode=decode, **fields), None, outputs.save_latents)
    if not decode:
        return task
    if output is not None and outputs.is_folder:
        check_frames_folder(output)
        return replace(task, frames=output)
    video = outputs.output_dir / "0001.mp4" if outputs.output_dir else output or DEFAULT_OUTPUT
    check_output(video, (*VIDEO_SUFFIXES, *STILL_SUFFIXES))
    return replace(task, video=video)


def tasks_of_file(path: Path, fields: Mapping[str, Any], outputs: Outputs) -> list[Task]:
    """The tasks of `cineline generate --requests FILE.jsonl`; `fields` are each line's defaults.

    Raises:
        InvalidRequest: a line cannot be used; its number is named, and no task is returned.
        OutputError: an output cannot be used.
    """
    if outputs.output:
        raise OutputError(f"--output {shown(outputs.output)} holds one video: use --output-dir with --requests.")
    for folder in (outputs.output_dir, outputs.save_latents):
        if folder is not None:
            check_folder(folder)
    if outputs.output_dir is None and outputs.save_latents is None:
        raise OutputError("--requests needs a folder for the videos: give --output-dir.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"--requests {shown(path)} cannot be read ({reason(error)}): give a text file in UTF-8."
        ) from None
    lines = [line.removeprefix(BYTE_ORDER_MARK) for line in lines]  # files that were joined have it within
    tasks = [_task_of_line(path, number, line, fields, outputs) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise InvalidRequest(f"--requests {shown(path)} has no requests: write one JSON object a line.")
    return tasks


def _task_of_line(path: Path, number: int, line: str, fields: Mapping[str, Any], outputs: Outputs) -> Task:
    where = f"{shown(path)}, line {number}"
    try:
        own = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: this is no JSON ({reason(error)}): write one JSON object a line.") from None
    if not isinstance(own, dict):
        raise InvalidRequest(f"{where}: {shown(own)} is no JSON object: write one JSON object a line.")
    given = {"decode": outputs.output_dir is not None, **fields}
    given = {name: value for name, value in given.items() if own.get(name) is None}
    own = {name: value for name, value in own.items() if value is not None or name not in given}
    try:
        request = VideoRequest(**given, **own)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from None
    if request.decode and outputs.output_dir is None:
        raise OutputError(f"{where}: decode=true needs a folder for the video: give --output-dir.")
    if not request.decode and outputs.save_latents is None:
        raise OutputError(f"{where}: decode=false leaves only the latents: give --save-latents.")
    video = outputs.output_dir / f"{number:04}.mp4" if outputs.output_dir and request.decode else None
    latents = outputs.save_latents / f"{number:04}.safetensors" if outputs.save_latents else None
    return Task(request, video, latents, number)


@contextmanager
def in_line(file: Path | None, task: Task) -> Iterator[None]:
    """Names the line of what is refused."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{shown(file)}, line {task.line}: {error}" if file else str(error)) from None


def check_tasks(spec: FamilySpec, tasks: list[Task], file: Path | None) -> None:
    """Hold every request against the model's rules before anything runs.

    Raises:
        InvalidRequest: with the line's number where the requests come from a file.
        OutputError: a rate, or a number of frames, that the video's file cannot hold.
    """
    for number, task in enumerate(tasks):
        with in_line(file, task):
            for name in IMAGES:
                if (image := getattr(task.request, name)) is not None:
                    load_image(image, name)
            job = spec.resolve(task.request, number)
            if task.video is not None:
                check_rate(task.video, job.fps)
                check_still(task.video, job.num_frames)
