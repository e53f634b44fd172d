"""What a person sees while requests run: a bar each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cineline.engine import RequestHandle

LINES_EVERY_S = 5.0


class View(Protocol):
    """Shows the requests' progress."""

    def update(self, handles: Sequence[RequestHandle]) -> None:
        """Called several times a second."""
        ...

    def close(self) -> None:
        """The requests are over, one way or another."""
        ...


def make_view(labels: Sequence[str], quiet: bool, console: Console) -> View:
    """Bars on a terminal, lines elsewhere, nothing with `quiet`."""
    if quiet:
        return _Silent()
    return _Bars(labels, console) if console.is_terminal else _Lines(labels, console)


def _count(handle: RequestHandle) -> tuple[int, int]:
    """Steps and decode chunks done, and of how many."""
    (steps, of_steps), (chunks, of_chunks) = handle.progress, handle.decoded
    return steps + chunks, of_steps + of_chunks


def _phase(handle: RequestHandle) -> str:
    steps, of_steps = handle.progress
    if handle.done:
        return "done"
    if steps == of_steps:
        return "decode"
    return f"step {steps}/{of_steps}" if steps else "waiting"


class _Silent:
    def update(self, handles: Sequence[RequestHandle]) -> None:
        pass

    def close(self) -> None:
        pass


class _Bars:
    def __init__(self, labels: Sequence[str], console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._bars: list[TaskID] = [
            self._progress.add_task(label, total=None, start=False, phase="waiting") for label in labels
        ]
        self._progress.start()

    def update(self, handles: Sequence[RequestHandle]) -> None:
        for bar, handle in zip(self._bars, handles, strict=True):
            done, total = _count(handle)
            if done and not self._progress.tasks[bar].started:
                self._progress.start_task(bar)
            self._progress.update(bar, completed=done, total=total, phase=_phase(handle))

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, labels: Sequence[str], console: Console) -> None:
        self._labels = labels
        self._console = console
        self._printed = time.monotonic()
        self._begun: dict[str, tuple[float, int]] = {}

    def update(self, handles: Sequence[RequestHandle]) -> None:
        now = time.monotonic()
        due = now - self._printed >= LINES_EVERY_S
        if due:
            self._printed = now
        for label, handle in zip(self._labels, handles, strict=True):
            done, total = _count(handle)
            if not done:
                continue
            since, done_then = self._begun.setdefault(label, (now, done))
            if due and not handle.done and done > done_then:
                remaining = (now - since) / (done - done_then) * (total - done)
                self._console.print(f"{label}: {_phase(handle)}, about {remaining:.0f} s left", highlight=False)

    def close(self) -> None:
        pass
