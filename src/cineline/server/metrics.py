"""What `/metrics` says, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cineline.engine.ranks import RankState

JOB_SECONDS = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
HTTP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60, 600)


@dataclass(frozen=True)
class Now:
    """What is asked for when somebody looks.

    Attributes:
        queued: jobs that wait. in_flight: that the engine has. denoising: of these, that are being denoised.
        ready: whether jobs are taken. full: whether the disk has no room for new ones.
        ranks: what each computes; empty while there are none.
    """

    queued: int
    in_flight: int
    denoising: int
    ready: bool
    full: bool
    ranks: list[RankState]


class Metrics:
    """Counters of this process, and what is so now.

    Args:
        now: called at each look.
    """

    def __init__(self, now: Callable[[], Now]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Present(now))
        kept = self._registry
        self.steps = Counter("cineline_steps", "Solver steps done; its rate is steps a second.", registry=kept)
        self.restarts = Counter("cineline_restarts", "Restarts of the ranks, as jobs saw them.", registry=kept)
        self.jobs = Counter("cineline_jobs", "Jobs that ended, by how.", ["outcome"], registry=kept)
        self.waited = _histogram("cineline_job_waiting_seconds", "From creation to the engine.", JOB_SECONDS, kept)
        self.took = _histogram("cineline_job_seconds", "From the engine to the file.", JOB_SECONDS, kept)
        self.answers = _histogram(
            "cineline_http_seconds", "Of answers, by route and status.", HTTP_SECONDS, kept, ("route", "status")
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)


class _Present(Collector):
    def __init__(self, now: Callable[[], Now]) -> None:
        self._now = now

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What is so now."""
        now = self._now()
        yield GaugeMetricFamily("cineline_queued_jobs", "Jobs that wait.", now.queued)
        yield GaugeMetricFamily("cineline_in_flight_jobs", "Jobs that the engine has.", now.in_flight)
        yield GaugeMetricFamily("cineline_denoising_jobs", "Of these, being denoised.", now.denoising)
        yield GaugeMetricFamily("cineline_ready", "1 while jobs are taken.", now.ready)
        yield GaugeMetricFamily("cineline_disk_full", "1 while the disk has no room for new jobs.", now.full)
        busy = CounterMetricFamily(
            "cineline_rank_busy_seconds", "Computing, since its start; its rate is the busy share.", labels=["rank"]
        )
        for rank in now.ranks:
            busy.add_metric([str(rank.rank)], rank.busy_s)
        yield busy


def _histogram(
    name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry, labels: Sequence[str] = ()
) -> Histogram:
    return Histogram(name, text, labels, registry=registry, buckets=buckets)
