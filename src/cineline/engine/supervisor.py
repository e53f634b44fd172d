"""The engine's thread: takes in what the ranks say, and starts them anew where one is lost."""

from __future__ import annotations

import logging

from cineline.engine.line import CLOSED, UNDONE, Line
from cineline.engine.ranks import Abandoned, Ranks
from cineline.engine.record import Record
from cineline.errors import CinelineError, RankFailed, reason

LEAVE_LIMIT_S = 2.0
"""For ranks that are through, to end when they are let go."""

log = logging.getLogger(__name__)


def serve(line: Line, ranks: Ranks, record: Record, restarts: int) -> None:
    """Take in what the ranks say until all are through, too many have failed, or nobody is interested any more; then
    they are gone, and nobody waits for them.

    Args:
        restarts: of the ranks, in a row without progress.
    """
    try:
        failure = _Supervisor(line, ranks, restarts).run()
    except Exception as error:  # the thread's edge: without it nobody would ever be answered
        failure = RankFailed(0, f"what it reported could not be taken in ({type(error).__name__}: {error})")
    line.end(failure or CLOSED, failure or UNDONE)
    ranks.end(0.0 if failure else LEAVE_LIMIT_S)
    record.close()


class _Supervisor:
    def __init__(self, line: Line, ranks: Ranks, restarts: int) -> None:
        self._line = line
        self._ranks = ranks
        self._most = restarts
        self._in_a_row = 0
        self._progress = -1

    def run(self) -> CinelineError | None:
        """The failure that ends the engine, if one does."""
        while True:
            failure: CinelineError | None = self._ranks.listen(self._line.hear, self._line.look)
            while isinstance(failure, RankFailed) and not self._ranks.leaving:
                self._line.blame(failure)
                if not self._may_restart():
                    return self._last(failure)
                failure = self._restart(failure)
            if failure is not None or self._ranks.leaving:
                return failure
            self._go_on()

    def _may_restart(self) -> bool:
        if self._line.progress > self._progress:
            self._in_a_row = 0
        self._progress = self._line.progress
        self._in_a_row += 1
        return self._in_a_row <= self._most

    def _last(self, failure: RankFailed) -> RankFailed:
        if not self._most:
            return failure
        words = f"{failure.cause}; before, ranks were started anew {self._most} times without progress"
        return type(failure)(failure.rank, words, failure.request)

    def _restart(self, failure: RankFailed) -> CinelineError | None:
        """New ranks; what failed now, if something did."""
        log.warning("%s; the ranks are started anew (%d of %d).", failure, self._in_a_row, self._most)
        self._ranks.end(0.0)
        try:
            self._ranks.start(self._line.look)
        except Abandoned:
            return None
        except CinelineError as error:
            return error
        except OSError as error:  # no process to be had
            return RankFailed(0, f"it could not be started ({reason(error)})")
        return None

    def _go_on(self) -> None:
        going = self._line.readmit(alone=self._in_a_row > 1)
        where = ", ".join(f"{number} at step {step}" for number, step in going.items())
        log.warning("The ranks are there again%s.", f"; requests go on: {where}" if where else "")
