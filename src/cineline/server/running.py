"""A job that the engine has, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cineline.engine.handle import RequestHandle
from cineline.engine.sink import Sink
from cineline.errors import CinelineError, RankFailed
from cineline.server.metrics import Metrics
from cineline.server.store import StoredJob


@dataclass
class Running:
    """It.

    Attributes:
        steps, restarts: counted so far. written: whether its file is.
        begun: whether a rank has been seen to work on it.
        preview: the newest picture of what is coming, uint8 [F, H, W, 3], and the step that it was taken at.
        tries: to complete it, which the disk refused. not_before: when to look at it again (`time.monotonic`).
    """

    job: StoredJob
    handle: RequestHandle
    sink: Sink
    steps: int
    restarts: int = 0
    begun: bool = False
    written: bool = False
    preview: tuple[int, np.ndarray] | None = None
    tries: int = 0
    not_before: float = 0.0

    def update(self, metrics: Metrics) -> bool:
        """Write what has come of it; whether all of it is written.

        Raises:
            CinelineError: that will never be.
        """
        done = self.handle.done  # first, so that of a finished one all is seen
        self.begun = self.begun or self.handle.phase not in ("waiting", "done")
        self._count(metrics)
        for preview in self.handle.take_previews()[-1:]:
            self.preview = self.steps, preview
        if not self.written:
            self.sink.update()
            if done:
                self.sink.finish()
                if self.sink.failed is not None:
                    raise self.sink.failed
            self.written = done
        return done

    def _count(self, metrics: Metrics) -> None:
        steps, restarts = self.handle.progress[0], self.handle.restarts
        metrics.steps.inc(steps - self.steps)
        metrics.restarts.inc(restarts - self.restarts)
        self.steps, self.restarts = steps, restarts


def culprits(there: Sequence[Running], failure: CinelineError) -> Sequence[Running]:
    """Whom to blame for the engine's end: whose turn it was; where that is not known, who had begun; else all."""
    number = failure.request if isinstance(failure, RankFailed) else None
    known = [running for running in there if number is not None and running.handle.job.id == number]
    return known or [running for running in there if running.begun] or there
