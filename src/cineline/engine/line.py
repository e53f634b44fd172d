"""All requests of an engine: in which order they run, and what has come of each. Nothing here waits for a rank.

A lock guards who waits for what. The scheduler, and with it whatever ranks are told, is the engine's thread's alone: a
caller that is interrupted leaves no word said to some ranks and not to others.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from cineline.core import control
from cineline.core.config import ParallelConfig, Place
from cineline.core.family import FamilySpec
from cineline.core.request import Group, Job, VideoRequest
from cineline.engine.handle import Ticket
from cineline.engine.ranks import Ranks
from cineline.errors import CinelineError, EngineClosed, RequestCancelled, anew
from cineline.schedule.scheduler import Scheduler

if TYPE_CHECKING:
    from PIL import Image


class Line:
    """The engine's requests.

    Args:
        spec: the model's. parallel: how it is divided.
        in_flight: requests that denoise at once.
        ranks: told what to do.
    """

    def __init__(self, spec: FamilySpec, parallel: ParallelConfig, in_flight: int | None, ranks: Ranks) -> None:
        self._spec = spec
        self._ranks = ranks
        self._heads = [parallel.rank(Place(cfg=cfg)) for cfg in range(parallel.cfg)]
        self._lock = threading.Lock()
        self._scheduler = Scheduler(parallel, in_flight, self._admit)
        self._tickets: dict[int, Ticket] = {}
        self._images: dict[int, Image.Image] = {}
        self._next_id = 0
        self._ended: CinelineError | None = None

    @property
    def idle(self) -> bool:
        """Nobody waits for anything."""
        return not self._tickets

    def submit(self, request: VideoRequest, image: Image.Image | None) -> Ticket:
        """Queue a request.

        Raises:
            InvalidRequest: it breaks one of the model's rules.
            EngineClosed, RankFailed: no more are taken.
        """
        with self._lock:
            job = self._spec.resolve(request, self._next_id)
            if self._ended is not None:
                raise anew(self._ended)
            self._next_id += 1
            ticket = self._tickets[job.id] = Ticket(job)
        self._ranks.do(partial(self._queue, job, image))
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Stop a request; false if it was already done."""
        with self._lock:
            if self._tickets.pop(ticket.job.id, None) is None:
                return False
        self._ranks.do(partial(self._drop, ticket.job.id))
        ticket.fail(RequestCancelled(f"Request {ticket.job.id} was cancelled at step {ticket.steps_done}."))
        return True

    def hear(self, message: control.Begun | control.Done) -> None:
        """What a rank says; for the engine's thread."""
        if isinstance(message, control.Begun):
            self._scheduler.begun(message.group)
            self._emit(self._scheduler.pump())
            return
        finished = self._scheduler.complete(message.group, message.moves)
        self._emit(self._scheduler.pump())
        with self._lock:
            number = message.group.request
            ticket = self._tickets.pop(number, None) if finished else self._tickets.get(number)
        if ticket is not None:
            ticket.take(message)
            if finished:
                ticket.finish()

    def end(self, error: CinelineError, for_open: CinelineError | None = None) -> bool:
        """Take no more requests, and end those that are open; false where that was done before.

        Args:
            error: for whoever submits from now on. for_open: for those that wait, if it is another one.
        """
        with self._lock:
            first = self._ended is None
            if first:
                self._ended = error
            tickets, self._tickets = list(self._tickets.values()), {}
        for ticket in tickets:
            self._ranks.do(partial(self._drop, ticket.job.id))
            ticket.fail(for_open or error)
        return first

    # The engine's thread.

    def _queue(self, job: Job, image: Image.Image | None) -> None:
        if image is not None:
            self._images[job.id] = image
        self._scheduler.submit(job)
        self._emit(self._scheduler.pump())

    def _drop(self, number: int) -> None:
        self._images.pop(number, None)
        drop = self._scheduler.cancel(number)
        self._emit([*([drop] if drop else []), *self._scheduler.pump()])

    def _admit(self, job: Job) -> None:
        image = self._images.pop(job.id, None)
        own = control.Admit(job, image)
        self._ranks.tell(control.Admit(job), instead=dict.fromkeys(self._heads, own) if image is not None else None)

    def _emit(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._ranks.tell(group)


CLOSED = EngineClosed("The engine is closed: make a new one.")
UNDONE = EngineClosed("The engine was closed before the request was done.")
