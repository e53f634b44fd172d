"""What a person sees while requests run: a bar each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cineline.engine.handle import RequestHandle

LINES_EVERY_S = 5.0


@dataclass(frozen=True)
class RequestProgress:
    """How far a request is.

    Attributes:
        steps, of_steps, chunks, of_chunks: solver steps and decode chunks done, and of how many.
        done: finished, failed or cancelled. restarts: of the ranks, since it was submitted.
        size: of the video in pixels, all frames together, by which its steps count among those of others.
    """

    steps: int
    of_steps: int
    chunks: int
    of_chunks: int
    done: bool
    restarts: int = 0
    size: int = 1

    @classmethod
    def of(cls, handle: RequestHandle) -> RequestProgress:
        """A handle's, now; `done` is read first, so that a finished one shows all it has done."""
        done = handle.done
        job = handle.job
        return cls(*handle.progress, *handle.decoded, done, handle.restarts, job.width * job.height * job.num_frames)

    @property
    def count(self) -> tuple[int, int]:
        """Steps and chunks done, and of how many."""
        return self.steps + self.chunks, self.of_steps + self.of_chunks

    @property
    def phase(self) -> str:
        """In words."""
        if self.done:
            return "done"
        times = "once" if self.restarts == 1 else f"{self.restarts} times"
        restarted = f", ranks restarted {times}" if self.restarts else ""
        if self.steps == self.of_steps:
            return f"decode{restarted}"
        return f"step {self.steps}/{self.of_steps}{restarted}" if self.steps else f"waiting{restarted}"


class Pace:
    """How fast a batch is: its work is all requests' steps and chunks, each by its video's size.

    It counts from the first step on, since ranks may be busy with prompts, and a request may go on in its middle.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._first = 0
        self._videos = 0

    def say(self, states: Sequence[RequestProgress], now: float) -> str:
        """Videos that are done, seconds left and videos an hour, as far as they are known.

        Args:
            now: seconds, of any clock.
        """
        of_work = sum(state.size * state.count[0 if state.done else 1] for state in states)
        work = sum(state.size * state.count[0] for state in states)
        left_over = [
            state for state in states if state.done and state.count[0] < state.count[1]
        ]  # failed, or cancelled
        finished = f"{sum(state.done for state in states) - len(left_over)} of {len(states)} videos"
        if self._since is None:
            if work:
                self._since, self._first = now, work
            return finished
        if now <= self._since or work <= self._first:
            return finished
        a_second = (work - self._first) / (now - self._since)
        lost = sum(state.size * state.count[0] for state in left_over)
        an_hour = 3600 * a_second / max(1, of_work - lost) * (len(states) - len(left_over))
        return f"{finished}, about {(of_work - work) / a_second:.0f} s left, {an_hour:.1f} videos an hour"


class View(Protocol):
    """Shows the requests' progress."""

    def update(self, states: Sequence[RequestProgress]) -> None:
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


class _Silent:
    def update(self, states: Sequence[RequestProgress]) -> None:
        pass

    def close(self) -> None:
        pass


class _Bars:
    def __init__(self, labels: Sequence[str], console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeRemainingColumn(),
        )
        # Else rich would print on the bars' terminal what standard output is to have, a pipe perhaps.
        self._progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._bars: list[TaskID] = [
            self._progress.add_task(label, total=None, start=False, phase="waiting") for label in labels
        ]
        self._pace = Pace()
        self._all = self._progress.add_task("all", total=len(labels), phase="") if len(labels) > 1 else None
        self._progress.start()

    def update(self, states: Sequence[RequestProgress]) -> None:
        for bar, state in zip(self._bars, states, strict=True):
            done, total = state.count
            if done and not self._progress.tasks[bar].started:
                self._progress.start_task(bar)
            self._progress.update(bar, completed=done, total=total, phase=state.phase)
        if self._all is not None:
            phase = self._pace.say(states, time.monotonic())
            self._progress.update(self._all, completed=sum(state.done for state in states), phase=phase)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, labels: Sequence[str], console: Console) -> None:
        self._labels = labels
        self._console = console
        self._printed = time.monotonic()
        self._begun: dict[int, tuple[float, int]] = {}
        self._pace = Pace()

    def update(self, states: Sequence[RequestProgress]) -> None:
        now = time.monotonic()
        due = now - self._printed >= LINES_EVERY_S
        if due:
            self._printed = now
        for number, (label, state) in enumerate(zip(self._labels, states, strict=True)):
            done, total = state.count
            if not done:
                continue
            since, done_then = self._begun.setdefault(number, (now, done))
            if due and not state.done and done > done_then:
                remaining = (now - since) / (done - done_then) * (total - done)
                self._console.print(f"{label}: {state.phase}, about {remaining:.0f} s left", highlight=False)
        said = self._pace.say(states, now)
        if due and len(states) > 1 and not all(state.done for state in states):
            self._console.print(f"all: {said}", highlight=False)

    def close(self) -> None:
        pass
