"""How the benchmarks measure: arms interleaved, repeated where somebody else used the machine (no torch)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

OTHERS_LIMIT = 0.03
"""Share of the machine's CPU time that others may use during a run before it is repeated."""

TRIES = 5
"""Runs of which the quietest one counts when none stays below the limit."""


@dataclass(frozen=True)
class Run:
    """One run of one arm.

    Attributes:
        seconds: wall-clock time.
        others: share of the host's CPU time that processes other than ours used meanwhile (0 to 1).
        repeats: runs thrown away because that share was over the limit.
    """

    seconds: float
    others: float
    repeats: int = 0


@dataclass(frozen=True)
class Summary:
    """Median and range of one number over the runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class CpuClock:
    """CPU seconds of the whole host and of this process and its descendants."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def read(self) -> tuple[float, float]:
        """Busy seconds of the host's cores, and ours among them.

        Stolen time counts as busy: another guest had it. Interrupts do not: they are nobody's in particular.
        """
        host = psutil.cpu_times()
        busy = host.user + host.nice + host.system + getattr(host, "steal", 0.0)
        ours = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            ours += times.user + times.system + times.children_user + times.children_system
        return busy, ours


def run_quietly(arm: Callable[[], float]) -> Run:
    """Run an arm, again while others use more than `OTHERS_LIMIT`; the quietest run counts.

    Args:
        arm: returns the seconds it took.
    """
    clock = CpuClock()
    runs: list[Run] = []
    while len(runs) < TRIES and (not runs or runs[-1].others > OTHERS_LIMIT):
        started, (busy, ours) = time.monotonic(), clock.read()
        seconds = arm()
        wall, (busy_after, ours_after) = time.monotonic() - started, clock.read()
        others = max(0.0, busy_after - busy - (ours_after - ours)) / (wall * (psutil.cpu_count() or 1))
        runs.append(Run(seconds, others, len(runs)))
    quietest = min(runs, key=lambda run: run.others)
    return Run(quietest.seconds, quietest.others, len(runs) - 1)


def interleave(
    arms: Mapping[str, Callable[[], float]], rounds: int, tell: Callable[[str], None]
) -> dict[str, list[Run]]:
    """Run every arm once a round, in an order that moves on by one arm a round.

    Args:
        arms: by name.
        rounds: runs of each arm.
        tell: called with a line after each run.
    """
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            run = run_quietly(arms[name])
            runs[name].append(run)
            tell(f"round {number + 1}/{rounds}  {name}: {run.seconds:.2f} s, others {run.others:.1%}")
    return runs


def plain(results: Any) -> Any:
    """Runs, however they are grouped, as JSON has them."""
    if isinstance(results, dict):
        return {str(name): plain(value) for name, value in results.items()}
    return [asdict(run) for run in results]


def others(runs: Sequence[Run]) -> str:
    """The largest share of CPU that others used during a run that counts, and how many runs were repeated."""
    repeats = sum(run.repeats for run in runs)
    return f"{max(run.others for run in runs):.1%}" + (f", {repeats} repeated" if repeats else "")


def ratios(base: Sequence[Run], arm: Sequence[Run]) -> Summary:
    """How many times faster than the base the arm was, round by round."""
    return Summary.of([one.seconds / other.seconds for one, other in zip(base, arm, strict=True)])


def beside_first(results: Mapping[str, Sequence[Run]], requests: int) -> list[list[str]]:
    """A row for each arm: its name, seconds a request, throughput as a share of the first one's, and others' CPU."""
    base = next(iter(results.values()))
    rows = []
    for name, own in results.items():
        share = ratios(base, own)
        each = Summary.of([run.seconds / requests for run in own])
        told = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})"
        rows.append([name, str(each), told, others(own)])
    return rows
