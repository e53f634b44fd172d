"""All requests of an engine: in which order they run, and what has come of each. Nothing here waits for a rank.

A lock guards who waits for what. The scheduler, and with it whatever ranks are told, is the engine's thread's alone: a
caller that is interrupted leaves no word said to some ranks and not to others.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cineline.core import control
from cineline.core.config import Place
from cineline.core.image import KeyFrames, fitted_frames
from cineline.core.request import Group, Job, VideoRequest
from cineline.engine.blueprint import Blueprint
from cineline.engine.folder import Kept
from cineline.engine.handle import Ticket
from cineline.engine.ranks import CULPRIT_LIMIT_S, Ranks, Report
from cineline.engine.record import Record
from cineline.errors import (
    CinelineError,
    EngineClosed,
    NotFinite,
    OutOfMemory,
    RankFailed,
    RequestCancelled,
    RequestTimedOut,
    anew,
)
from cineline.schedule.scheduler import Scheduler

MOST_BLAMED = 2
"""Failures of ranks in one request's items: it fails alone by the last of them."""


@dataclass
class _Open:
    """A request that the ranks are to do, or have begun: all that they need to begin it anew.

    Attributes:
        snapshot: the newest that there is.
    """

    job: Job
    image: KeyFrames | None
    snapshot: control.Snapshot | None

    @property
    def next_job(self) -> Job:
        """From the snapshot on."""
        taken = self.snapshot
        return self.job if taken is None else replace(self.job, first_step=taken.step, first_expert=taken.expert)


class Line:
    """The engine's requests.

    Args:
        blueprint: the model, how it is divided, and what its devices have room for.
        ranks: told what to do.
        record: told what becomes of each request.
        prompts: embeddings of prompts that each head keeps.

    Attributes:
        ended: why no more requests are taken; None while they are.
        progress: grows with each step or chunk that was not done before, and with each request that fails alone.
    """

    def __init__(self, blueprint: Blueprint, ranks: Ranks, record: Record, prompts: int = 0) -> None:
        parallel = blueprint.parallel
        self.progress = 0
        self._spec = blueprint.spec
        self._ranks = ranks
        self._check = blueprint.room.check
        self._record = record
        self._new_scheduler = partial(Scheduler, parallel, blueprint.in_flight, self._admit, prompts)
        self._heads = [parallel.rank(Place(cfg=cfg)) for cfg in range(parallel.cfg)]
        self._lock = threading.Lock()
        self._scheduler = self._new_scheduler()
        self._tickets: dict[int, Ticket] = {}
        self._open: dict[int, _Open] = {}
        self._alone: int | None = None
        self._held: list[_Open] = []
        self._next_id, self._id_step = blueprint.replica
        self._earliest = math.inf
        self.ended: CinelineError | None = None

    @property
    def idle(self) -> bool:
        """Nobody waits for anything."""
        return not self._tickets

    def check_open(self) -> None:
        """Refuse where nothing is taken any more.

        Raises:
            EngineClosed, RankFailed: nothing is.
        """
        if self.ended is not None:
            raise anew(self.ended)

    def submit(
        self,
        request: VideoRequest,
        image: KeyFrames | None,
        outputs: Mapping[str, Path],
        kept: Kept | None = None,
    ) -> Ticket:
        """Queue a request.

        Args:
            outputs: where its caller will write what comes of it.
            kept: its entry in the record's folder, where it has one.

        Raises:
            InvalidRequest: it breaks one of the model's rules, or is too large.
            EngineClosed, RankFailed: no more are taken.
        """
        snapshot = None if kept is None else kept.snapshot
        with self._lock:
            job = self._spec.resolve(request, self._next_id)
            self.check_open()
            self._check(job)
            self._next_id += self._id_step
            ticket = self._tickets[job.id] = Ticket(job, request.timeout_s, outputs)
            ticket.steps_done = 0 if snapshot is None else snapshot.step
            self._earliest = min(self._earliest, ticket.deadline)
            if image is not None:
                image, ticket.fitting = fitted_frames(image, job.width, job.height, request.fit)
            self._record.begin(job, request, outputs, None if kept is None else kept.name)
        self._ranks.do(partial(self._queue, _Open(job, image, snapshot)))
        return ticket

    def cancel(self, ticket: Ticket, keep: bool = False) -> bool:
        """Stop a request; false if it was already done.

        Args:
            keep: whether the record keeps what it has of it.
        """
        if keep:
            self._record.leave(ticket.job.id)
        words = f"Request {ticket.job.id} was cancelled at step {ticket.steps_done}."
        return self._fail(ticket.job.id, RequestCancelled(words))

    def _fail(self, request: int, error: CinelineError) -> bool:
        """End one request, and leave the others alone; false if it was already done."""
        with self._lock:
            ticket = self._tickets.pop(request, None)
            if ticket is None:
                return False
        self._record.failed(request, error)
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
        match message:
            case control.Spoiled(item, stage):
                self._fail(item.request, NotFinite(item.request, stage, item.kind.name.lower(), item.number))
            case control.Snapshot():
                self._keep(message)
            case control.Unkept():
                self._record.unkept(message)
            case control.Begun(group):
                self._scheduler.begun(group)
                if (ticket := self._tickets.get(group.request)) is not None:
                    ticket.begun = group.kind
                self._emit(self._scheduler.pump())
            case control.Done():
                self._take(message)

    def _take(self, done: control.Done) -> None:
        finished = self._scheduler.complete(done.group, done.moves)
        self._emit(self._scheduler.pump())
        number = done.group.request
        if done.spoiled:  # the rank that spoiled it may be heard later
            self._await_culprit(done.group)
            return
        with self._lock:
            ticket = self._tickets.pop(number, None) if finished else self._tickets.get(number)
        if ticket is not None:
            self.progress += ticket.take(done)
            if finished:
                self._open.pop(number)
                self._record.done(number)
                ticket.finish()
                self._let_others_in(number)

    def _keep(self, snapshot: control.Snapshot) -> None:
        """With split experts the later step's may come first, and the last one behind the request's end."""
        mine = self._open.get(snapshot.request)
        if mine is not None and (mine.snapshot is None or mine.snapshot.step < snapshot.step):
            mine.snapshot = snapshot
            self._record.keep(snapshot)

    def blame(self, failure: RankFailed) -> None:
        """Ranks are lost: end the request whose items that was in alone, where it was the second time, or for want of
        memory; for the engine's thread. Where only one was in the line it was that one's."""
        number = self._alone if failure.request is None else failure.request
        ticket = None if number is None else self._tickets.get(number)
        if ticket is None:
            return
        ticket.blamed += 1
        if ticket.blamed >= MOST_BLAMED or isinstance(failure, OutOfMemory):
            self.progress += self._fail(ticket.job.id, failure)

    def readmit(self, alone: bool) -> dict[int, int]:
        """New ranks are ready: have them do all that is open, in the order in which it came; for the engine's thread.

        Args:
            alone: the first one by itself until it is done, so that it is known whose the next failure is.

        Returns:
            The step that each goes on with, by its number.
        """
        known = sorted([*self._open.values(), *self._held], key=lambda own: own.job.id)
        with self._lock:
            again = [own for own in known if own.job.id in self._tickets]
            for own in again:
                self._tickets[own.job.id].restart()
            self._earliest = min((ticket.deadline for ticket in self._tickets.values()), default=math.inf)
        self._open, self._scheduler = {}, self._new_scheduler()
        self._alone = again[0].job.id if alone and again else None
        begun = again if self._alone is None else again[:1]
        self._held = again[len(begun) :]
        for own in begun:
            self._enter(own)
        self._emit(self._scheduler.pump())
        return {own.job.id: own.next_job.first_step for own in again}

    def _enter(self, own: _Open) -> None:
        self._open[own.job.id] = own
        self._scheduler.submit(own.next_job)

    def _let_others_in(self, number: int) -> None:
        """The request is over: those that waited for its end begin."""
        if number == self._alone:
            held, self._alone, self._held = self._held, None, []
            for own in held:
                self._enter(own)
            self._emit(self._scheduler.pump())

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
            first = self.ended is None
            if first:
                self.ended = error
            tickets, self._tickets = list(self._tickets.values()), {}
        for ticket in tickets:
            self._ranks.do(partial(self._drop, ticket.job.id))
            ticket.fail(for_open or error, is_abandoned=True)
        return first

    # The engine's thread.

    def _queue(self, own: _Open) -> None:
        if self._alone is None:
            self._enter(own)
            self._emit(self._scheduler.pump())
        else:
            self._held.append(own)

    def _drop(self, number: int) -> None:
        self._open.pop(number, None)
        self._held = [own for own in self._held if own.job.id != number]
        drop = self._scheduler.cancel(number)
        self._emit([*([drop] if drop else []), *self._scheduler.pump()])
        self._let_others_in(number)

    def _admit(self, job: Job) -> None:
        own = self._open[job.id]
        told = control.Admit(job, resume=own.snapshot.state if own.snapshot is not None and job.first_step else None)
        heads = {} if own.image is None else dict.fromkeys(self._heads, replace(told, image=own.image))
        self._ranks.tell(told, instead=heads)

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
