"""Which files a batch writes: by their names' template, none of them twice, and none that is there unless told so."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import Formatter

from cineline.cli.batch import Outputs, Task, in_line
from cineline.core.family import FamilySpec
from cineline.core.output import (
    STILL_SUFFIXES,
    VIDEO_SUFFIXES,
    check_frames_folder,
    check_output,
    is_made,
    preview_beside,
)
from cineline.core.request import RANDOM, videos_of
from cineline.errors import OutputError, shown

FIELDS = ("line", "seed", "video")
"""Of a name's template: the line's number, its seed, and the video's number among those of its line."""

DIGITS = re.compile(r"0?[0-9]{0,2}")
"""What may stand behind a field's colon."""


def check_name(outputs: Outputs, is_batch: bool) -> None:
    """Refuse a template that names no file, and contradictions.

    Args:
        is_batch: requests are in a file, so that latents go into a folder.

    Raises:
        OutputError: it is none, or there is no folder for its files.
    """
    if outputs.skip_existing and outputs.overwrite:
        raise OutputError("Both --skip-existing and --overwrite are given: use one.")
    if outputs.name is None:
        return
    if outputs.output_dir is None and not (is_batch and outputs.save_latents):
        raise OutputError(f"--name {shown(outputs.name)} is for files in a folder: give --output-dir.")
    fields_of(outputs.name)
    name_of(outputs.name, 1, 0, 1)


def fields_of(template: str) -> set[str]:
    """The fields that a template has.

    Raises:
        OutputError: another one, or another format than digits.
    """
    try:
        parts = [(name, digits, how) for _, name, digits, how in Formatter().parse(template) if name is not None]
    except ValueError:
        parts = [("", "", None)]
    for name, digits, how in parts:
        if name not in FIELDS or not DIGITS.fullmatch(digits or "") or how:
            raise OutputError(
                f"--name {shown(template)} is no template: use {', '.join(f'{{{field}}}' for field in FIELDS)}, with "
                "digits as in {line:04}."
            )
    return {name for name, *_ in parts}


def name_of(template: str, line: int, seed: int, video: int) -> str:
    """What the template makes of them, one file's name.

    Raises:
        OutputError: it is none.
    """
    name = template.format(line=line, seed=seed, video=video)
    inner = name.removesuffix("/")
    if inner in ("", ".", "..") or "/" in inner or not inner.isprintable():
        raise OutputError(f"--name {shown(template)} makes {shown(name)}, which is no file's name: leave folders out.")
    return name


def settle_files(
    spec: FamilySpec, tasks: Iterable[Task], file: Path | None, outputs: Outputs, begun: bool
) -> tuple[list[Task], list[Path]]:
    """A task for each video, with its own seed and files, none of which another has.

    What is there already is refused, replaced (`--overwrite`) or kept (`--skip-existing`, by which a task writes what
    is missing, if anything is). One request's file that `--output` or `--save-latents` names is replaced without a
    word, as is the default, out.mp4: whoever runs the same line again has named it.

    Args:
        file: of the requests. begun: this run has begun before, so that what is there may be its own.

    Returns:
        The tasks that are left, and the files that are kept.

    Raises:
        InvalidRequest, OutputError: a request or a file cannot be used.
    """
    pairs = [(task, video) for task in tasks for video in _videos_of(spec, task, file, outputs)]
    videos = [video for _, video in pairs]
    _refuse_twice(videos)
    named = file is None and outputs.output_dir is None and len(videos) == 1
    files = [path for task in videos for path in task.outputs.values()] if outputs.skip_existing else []
    kept = dict.fromkeys(path for path in files if is_made(path))
    if not (outputs.skip_existing or outputs.overwrite or begun):
        _refuse_existing([] if named else videos)
    left = [_without(task, kept) for task in videos]
    for (asked, video), task in zip(pairs, left, strict=True):
        if asked.request.seed == RANDOM and 0 < len(task.outputs) < len(video.outputs):
            raise OutputError(
                f"{shown(next(iter(task.outputs.values())))} is missing beside what is there, whose seed was drawn: "
                "give that seed (cineline show says it), or remove what is there."
            )
    _check_files([task for task in left if task.outputs], outputs.overwrite or begun)
    return [task for task in left if task.outputs], list(kept)


def _videos_of(spec: FamilySpec, task: Task, file: Path | None, outputs: Outputs) -> Iterator[Task]:
    if task.request.num_videos == 1 and task.request.seed != RANDOM and outputs.name is None:
        yield task
        return
    with in_line(file, task):
        seed = spec.resolve(task.request, 0).seed
    videos = videos_of(task.request, seed)
    for number, request in enumerate(videos, 1):
        own = replace(task, request=request)
        if outputs.name is not None:
            own = _renamed(own, name_of(outputs.name, task.line, seed + number - 1, number), file is not None)
        if len(videos) > 1:
            told_apart = fields_of(outputs.name or "") & {"seed", "video"}
            own = _marked(own, f"-{number}", not told_apart, not told_apart or file is None)
        yield own


def _renamed(task: Task, name: str, latents_too: bool) -> Task:
    """With the name that a template makes; it may say a video's format, or with / at its end that frames are wanted."""
    stem, suffix = name.removesuffix("/"), Path(name).suffix.lower()
    known = suffix in (*VIDEO_SUFFIXES, *STILL_SUFFIXES) and not name.endswith("/")
    if task.latents is not None and latents_too:
        base = Path(stem).stem if known else stem
        task = replace(task, latents=task.latents.with_name(f"{base}.safetensors"))
    if task.video is None:
        return task
    path = task.video.with_name(stem if known or name.endswith("/") else f"{stem}.mp4")
    return replace(task, video=None, frames=path) if name.endswith("/") else replace(task, video=path)


def _marked(task: Task, mark: str, frames_too: bool, latents_too: bool) -> Task:
    def marked(path: Path | None, wanted: bool) -> Path | None:
        return path.with_name(f"{path.stem}{mark}{path.suffix}") if path and wanted else path

    folder = task.frames.with_name(f"{task.frames.name}{mark}") if task.frames and frames_too else task.frames
    video, latents = marked(task.video, frames_too), marked(task.latents, latents_too)
    return replace(task, video=video, latents=latents, frames=folder)


def _refuse_twice(tasks: Sequence[Task]) -> None:
    lines: dict[Path, int] = {}
    for task in tasks:
        for path in task.outputs.values():
            if path.absolute() in lines:
                raise OutputError(
                    f"Both line {lines[path.absolute()]} and line {task.line} would write {shown(path)}: put "
                    "{line}, {seed} and {video} into --name."
                )
            lines[path.absolute()] = task.line


def _check_files(tasks: Sequence[Task], replaces: bool | None) -> None:
    """Those that will be written can be, and no preview takes the place of what is there."""
    for task in tasks:
        for what, path in task.outputs.items():
            if what == "frames":
                check_frames_folder(path)
            else:
                check_output(path, (path.suffix.lower(),))
        preview = preview_beside(next(iter(task.outputs.values())))
        if task.request.preview is not None and preview.exists() and not replaces:
            raise OutputError(
                f"{shown(preview)} is there already, and the preview would be written there: move or remove it, or use "
                "--overwrite."
            )


def _refuse_existing(tasks: Sequence[Task]) -> None:
    there = [path for task in tasks for path in task.outputs.values() if path.exists()]
    if there:
        more = f", as {'is' if len(there) == 2 else 'are'} {len(there) - 1} more" if there[1:] else ""
        raise OutputError(
            f"{shown(there[0])} is there already{more}: use --skip-existing to keep it, --overwrite to replace it, or "
            "another folder or --name."
        )


def _without(task: Task, kept: Container[Path]) -> Task:
    """The task without the files that are kept; latents alone need no decoding."""

    def missing(path: Path | None) -> Path | None:
        return None if path in kept else path

    left = replace(task, video=missing(task.video), latents=missing(task.latents), frames=missing(task.frames))
    decode = left.video is not None or left.frames is not None
    if decode == task.request.decode:
        return left
    return replace(left, request=task.request.model_copy(update={"decode": decode}))
