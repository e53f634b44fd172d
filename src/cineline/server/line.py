"""The line as clients may see it: what each rank computes and has computed, with the job where that is the client's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cineline.core.trace import Slice
from cineline.engine.ranks import RankState
from cineline.server.dispatcher import Dispatcher
from cineline.server.keys import Client

KEPT_S = 60.0
"""What a client is told that has just come."""


class LineView:
    """For any thread."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @property
    def ranks(self) -> list[RankState]:
        """What each computes; none while there is no engine."""
        engine = self._dispatcher.engine
        return [] if engine is None else engine.ranks

    def states(self, client: Client) -> list[dict[str, Any]]:
        """What each rank computes, since when (microseconds since 1970), and for which of the client's jobs."""
        states = []
        for rank in self.ranks:
            own = None if rank.request is None else self._dispatcher.owners.job(rank.request, client)
            item = rank.item.partition(" of request")[0] or None
            since = None if rank.since_ns is None else rank.since_ns // 1000
            states.append({"rank": rank.rank, "item": item, "video": own, "since_us": since})
        return states

    def slices(self, client: Client, count: int) -> tuple[int, list[dict[str, Any]]]:
        """How many slices there have been, and those behind the first so many, of the last minute at most.

        Returns:
            By job, None for others': rows of rank, kind, number, branch, begin in microseconds since 1970, how long it
            took and, before that, waited for its input, in microseconds.
        """
        engine = self._dispatcher.engine
        if engine is None:
            return count, []
        count, found = engine.recent.since(count)
        earliest = time.time_ns() - KEPT_S * 1e9
        by_job: dict[str | None, list[Sequence[Any]]] = {}
        for piece in found:
            if piece.end_ns >= earliest:
                job = self._dispatcher.owners.job(piece.item.request, client)
                by_job.setdefault(job, []).append(_row(piece))
        return count, [{"video": job, "slices": rows} for job, rows in by_job.items()]


def _row(piece: Slice) -> Sequence[Any]:
    item = piece.item
    words = item.kind.name.lower(), item.number, item.branch.name.lower()
    took_us, waited_us = (piece.end_ns - piece.start_ns) / 1000, piece.waited_ns / 1000
    return piece.rank, *words, piece.start_ns // 1000, took_us, waited_us
