"""All requests of an engine: in which order they run, and what has come of each. Nothing here waits for a rank.

A lock guards who waits for what. The scheduler, and with it whatever ranks are told, is the engine's thread's alone: a
caller that is interrupted leaves no word said to some ranks and not to others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cineline.core import control
from cineline.core.config import ParallelConfig, Place
from cineline.core.family import FamilySpec
from cineline.core.request import Group, Job, VideoRequest
from cineline.engine.handle import Ticket
from cineline.engine.ranks import CULPRIT_LIMIT_S, Ranks, Report
from cineline.errors import CinelineError, EngineClosed, NotFinite, RequestCancelled, RequestTimedOut, anew
from cineline.schedule.scheduler import Scheduler

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


class Line:
    """The engine's requests.

    Args:
        spec: the model's. parallel: how it is divided.
        in_flight: requests that denoise at once.
        ranks: told what to do.
        check: refuses a job that is too large.
    """

    def __init__(
        self,
        spec: FamilySpec,
        parallel: ParallelConfig,
        in_flight: int | None,
        ranks: Ranks,
        check: Callable[[Job], None],
    ) -> None:
        self._spec = spec
        self._ranks = ranks
        self._check = check
        self._heads = [parallel.rank(Place(cfg=cfg)) for cfg in range(parallel.cfg)]
        self._lock = threading.Lock()
        self._scheduler = Scheduler(parallel, in_flight, self._admit)
        self._tickets: dict[int, Ticket] = {}
        self._images: dict[int, Image.Image] = {}
        self._next_id = 0
        self._earliest = math.inf
        self._ended: CinelineError | None = None
        self._unkept = False

    @property
    def idle(self) -> bool:
        """Nobody waits for anything."""
        return not self._tickets

    def submit(self, request: VideoRequest, image: Image.Image | None) -> Ticket:
        """Queue a request.

        Raises:
            InvalidRequest: it breaks one of the model's rules, or is too large.
            EngineClosed, RankFailed: no more are taken.
        """
        with self._lock:
            job = self._spec.resolve(request, self._next_id)
            if self._ended is not None:
                raise anew(self._ended)
            self._check(job)
            self._next_id += 1
            ticket = self._tickets[job.id] = Ticket(job, math.inf if request.timeout_s is None else request.timeout_s)
            self._earliest = min(self._earliest, ticket.deadline)
        self._ranks.do(partial(self._queue, job, image))
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Stop a request; false if it was already done."""
        words = f"Request {ticket.job.id} was cancelled at step {ticket.steps_done}."
        return self._fail(ticket.job.id, RequestCancelled(words))

    def _fail(self, request: int, error: CinelineError) -> bool:
        """End one request, and leave the others alone; false if it was already done."""
        with self._lock:
            ticket = self._tickets.pop(request, None)
            if ticket is None:
                return False
        self._ranks.do(partial(self._drop, request))
        ticket.fail(error)
        return True

    def look(self) -> None:
        """Again and again: drop the requests whose time is over."""
        now = time.monotonic()
        if now < self._earliest:
            return
        with self._lock:
            late = [ticket for ticket in self._tickets.values() if ticket.deadline <= now]
            left = (ticket.deadline for ticket in self._tickets.values() if ticket.deadline > now)
            self._earliest = min(left, default=math.inf)
        for ticket in late:
            self._fail(ticket.job.id, _lateness(ticket))

    def hear(self, message: Report) -> None:
        """What a rank says; for the engine's thread."""
        if isinstance(message, control.Spoiled):
            item = message.item
            self._fail(item.request, NotFinite(item.request, message.stage, item.kind.name.lower(), item.number))
            return
        if isinstance(message, control.Begun):
            self._scheduler.begun(message.group)
            self._emit(self._scheduler.pump())
            return
        if isinstance(message, control.Snapshot):  # nobody goes on from one
            return
        if isinstance(message, control.Unkept):
            if not self._unkept:
                words = "Request %d cannot go on from a snapshot (%s): if a rank is lost it begins anew."
                log.warning(words, message.request, message.cause)
            self._unkept = True
            return
        finished = self._scheduler.complete(message.group, message.moves)
        self._emit(self._scheduler.pump())
        number = message.group.request
        if message.spoiled:  # the rank that spoiled it may be heard later
            self._await_culprit(message.group)
            return
        with self._lock:
            ticket = self._tickets.pop(number, None) if finished else self._tickets.get(number)
        if ticket is not None:
            ticket.take(message)
            if finished:
                ticket.finish()

    def _await_culprit(self, group: Group) -> None:
        with self._lock:
            ticket = self._tickets.get(group.request)
            if ticket is not None and ticket.spoiled is None:
                ticket.spoiled = group
                ticket.deadline = min(ticket.deadline, time.monotonic() + CULPRIT_LIMIT_S)
                self._earliest = min(self._earliest, ticket.deadline)

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


def _lateness(ticket: Ticket) -> CinelineError:
    """Of a request whose time is over."""
    number = ticket.job.id
    if ticket.spoiled is not None:
        return NotFinite(number, None, ticket.spoiled.kind.name.lower(), ticket.spoiled.number)
    return RequestTimedOut(
        f"Request {number} was not done in timeout_s={ticket.timeout_s:g} (step {ticket.steps_done} of "
        f"{ticket.job.steps}): give it more, fewer steps, or a smaller size."
    )


CLOSED = EngineClosed("The engine is closed: make a new one.")
UNDONE = EngineClosed("The engine was closed before the request was done.")
