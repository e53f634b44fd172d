"""One way to divide a model over devices, tried out in simulated time (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from cineline.core.config import ParallelConfig, Place
from cineline.core.costs import LineCosts
from cineline.planning.alike import Alike
from cineline.planning.bound import Bound
from cineline.planning.fit import DECODES
from cineline.schedule.simulator import Simulation, simulate


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to do it. Its seconds are the simulator's, each run when it is first asked for.

    Attributes:
        line: axes, cut and costs of one replica. replicas: engines side by side, each with its own devices.
        in_flight: M of each. requests: that wait at each.
        peaks: bytes on each stage.
        short_of: requests in flight that memory does not allow though they would fill the line.
    """

    line: LineCosts
    replicas: int
    in_flight: int
    requests: int
    peaks: tuple[int, ...]
    short_of: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.line.parallel

    @cached_property
    def latency(self) -> float:
        """Seconds of one request alone."""
        return self.run(1).makespan_s

    @cached_property
    def period(self) -> float:
        """Seconds between results, of all replicas together, when there is no end of requests.

        Of 3 M requests, which go through the line in waves of M or so, the second M: those in front and behind keep
        the line full. What is begun before the first of these is done makes it seem a little shorter than it is, so
        that it counts for no less than its bound.
        """
        ends: dict[int, int] = {}
        for each in self.run(3 * self.in_flight).slices:
            ends[each.item.request] = max(each.end_ns, ends.get(each.item.request, 0))
        in_order = sorted(ends.values())
        seconds = (in_order[2 * self.in_flight - 1] - in_order[self.in_flight - 1]) / 1e9 / self.in_flight
        return max(seconds / self.replicas, self.least_period)

    @property
    def total(self) -> float:
        """Seconds until all waiting requests are done."""
        return self._whole[0]

    @property
    def busy(self) -> tuple[float, ...]:
        """Of that time, the share in which each stage computes."""
        return self._whole[1]

    @cached_property
    def _whole(self) -> tuple[float, tuple[float, ...]]:
        run = self.run(self.requests)
        ranks = [self.parallel.rank(Place(pp=stage)) for stage in range(self.parallel.pp)]
        return run.makespan_s, tuple(1 - run.bubbles[rank] for rank in ranks)

    def run(self, requests: int) -> Simulation:
        """So many requests through one replica."""
        return simulate(self._costs, [replace(self.line.job, id=number) for number in range(requests)], self.in_flight)

    @cached_property
    def _costs(self) -> Alike:
        return Alike(self.line)

    @cached_property
    def bound(self) -> Bound:
        """What one replica cannot beat."""
        return Bound(self._costs, self.line.job)

    @cached_property
    def least_total(self) -> float:
        """No more than `total`, without a simulation."""
        return self.bound.total(self.in_flight, self.requests)

    @cached_property
    def least_period(self) -> float:
        """No more than `period`, without a simulation."""
        return self.bound.period(self.in_flight) / self.replicas

    @property
    def peak(self) -> int:
        """Bytes of the fullest device."""
        return max(self.peaks)

    @property
    def exact(self) -> bool:
        """Whether its results are, bit for bit, one device's (where products keep their bits)."""
        axes = self.parallel
        decodes = axes.vae_decode in DECODES or (axes.vae_decode == "rows" and axes.pp == 1)
        return axes.ring == axes.tp == 1 and decodes

    @property
    def limit(self) -> str:
        """What keeps it from being faster: the reason for its highest bound, or "memory"."""
        limits = self.bound.limits(self.in_flight, self.requests)
        return "memory" if self.short_of else max(limits, key=lambda name: limits[name])
