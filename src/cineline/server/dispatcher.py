"""From the queue to the engine and to files: a thread that has the engine, and keeps its line full.

The engine is given no more than fills the line and a few that wait, so that priorities and cancels act on all others
at once. What it has is `in_progress` in the store, and is found again after any end of the process: its file is there,
or its snapshot is, or it begins anew. A job is completed only when its file has its name.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from cineline.core.config import ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.handle import RequestHandle
from cineline.engine.ranks import RankState
from cineline.engine.sink import Sink
from cineline.errors import (
    CinelineError,
    EngineClosed,
    InvalidRequest,
    OutputError,
    RankFailed,
    RequestCancelled,
    reason,
)
from cineline.schedule.scheduler import default_in_flight
from cineline.server.fair import FairQueue
from cineline.server.outcomes import MOST_SETBACKS, Outcomes, unforeseen
from cineline.server.running import Running, culprits
from cineline.server.store import StoredJob

POLL_S = 0.05
SPARE = 2
"""Requests that the engine has beyond those that fill the line: the next ones."""

TIDY_EVERY_S = 1.0

MOST_TRIES = 30
"""Times, a second apart, that a file which is written is tried to be completed."""

log = logging.getLogger(__name__)


class EngineEnded(Exception):
    """The engine takes no more requests.

    Attributes:
        error: why.
    """

    def __init__(self, error: CinelineError) -> None:
        super().__init__(str(error))
        self.error = error


class Dispatcher:
    """The thread, and what others ask of it.

    Args:
        outcomes: of jobs, with where these are kept.
        make_engine: with the data folder's snapshots; may take minutes.
        parallel, in_flight: how the line is divided, and how many requests it is to hold; None fills it.
        ended: called when the thread ends by itself.

    Attributes:
        failure: what ended it, if it was not told to end.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        make_engine: Callable[[], Engine],
        parallel: ParallelConfig,
        in_flight: int | None,
        ended: Callable[[], None],
    ) -> None:
        self.failure: CinelineError | None = None
        self._outcomes = outcomes
        self._store, self._folder, self._metrics = outcomes.store, outcomes.folder, outcomes.metrics
        self._make_engine, self._ended = make_engine, ended
        self._engine: Engine | None = None
        branches = (1,) if parallel.cfg == 2 else (1, 2)
        self._room = SPARE + (in_flight or max(default_in_flight(parallel.pp, each) for each in branches))
        self._fair = FairQueue()
        self._running: dict[str, Running] = {}
        self._changed = threading.Event()
        self._stopping = False
        self._close_limit_s = 0.0
        self._tidied = 0.0
        self._thread = threading.Thread(target=self._run, name="cineline-dispatcher", daemon=True)

    # For any thread.

    def start(self) -> None:
        """Make the engine, and go on with what is not done; before anybody is answered.

        Raises:
            OutputError: the state cannot be written.
        """
        self._outcomes.recover()
        self._thread.start()

    def stop(self, limit_s: float) -> None:
        """Park what runs and end the engine; returns when that is done, in about so many seconds at most."""
        self._close_limit_s = limit_s
        self._stopping = True
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join(limit_s)

    @property
    def engine(self) -> Engine | None:
        """Once it is there, and until it is to end."""
        return None if self._stopping or self.failure is not None else self._engine

    @property
    def ranks(self) -> list[RankState]:
        """What each computes; none while there is no engine."""
        engine = self.engine
        return [] if engine is None else engine.ranks

    @property
    def running(self) -> dict[str, Running]:
        """What the engine has, by id."""
        return dict(self._running)

    def wake(self) -> None:
        """Something is queued."""
        self._changed.set()

    def cancel(self, job: str) -> None:
        """The job has gone from the store."""
        running = self._running.get(job)
        if running is not None:
            running.handle.cancel()
        self._changed.set()

    # The thread.

    def _run(self) -> None:
        try:
            self._begin()
            while not self._stopping:
                try:
                    self._tick()
                except (sqlite3.OperationalError, OSError) as error:  # a full disk, which may have room later
                    log.warning("The jobs' state cannot be written (%s): it is tried again.", reason(error))
                    self._changed.wait(TIDY_EVERY_S)
                self._changed.wait(POLL_S)
                self._changed.clear()
            for running in self._running.values():
                running.handle.park()
        except CinelineError as error:
            self.failure = error
        except EngineEnded as ended:
            self.failure = ended.error
        except Exception as error:  # the thread's edge: else the service would stand still
            log.exception("The dispatcher failed.")
            self.failure = CinelineError(f"The service failed ({type(error).__name__}): see the log.")
        finally:
            self._end()

    def _end(self) -> None:
        for running in self._running.values():
            running.sink.give_up(RequestCancelled("The service ends."))
        if self._engine is not None:
            self._engine.close(self._close_limit_s if self.failure is None else 0.0)
        if not self._stopping:
            self._ended()

    def _begin(self) -> None:
        """The engine goes on with what it has a snapshot of; the rest begins anew."""
        import_module("torch")  # which a request's end needs: not while others are answered
        engine = self._engine = self._make_engine()
        for handle in engine.resume(self._folder.snapshots):
            path = handle.outputs.get("video", Path())
            job = self._store.get(path.stem)  # as it is now: loading takes minutes
            if job is None or job.state != "in_progress" or path != self._folder.video(job.id):
                handle.cancel()
                handle.delivered()
            else:
                self._watch(job, handle)
        self._outcomes.queue_lost(self._running.keys())
        self._outcomes.pace.idle()

    def _watch(self, job: StoredJob, handle: RequestHandle) -> None:
        sink = Sink(handle, self._folder.video(job.id), None)
        self._running[job.id] = Running(job, handle, sink, handle.progress[0])
        if self._store.get(job.id) is None:  # deleted meanwhile
            with suppress(CinelineError):
                handle.cancel()

    def _tick(self) -> None:
        now = time.monotonic()
        if not self._running:
            self._outcomes.pace.idle()
        for running in list(self._running.values()):
            if running.not_before > now:
                continue
            try:
                self._advance(running)
            except (sqlite3.OperationalError, OSError) as error:  # the others go on
                log.warning("Job %s cannot be written (%s): it is tried again.", running.job.id, reason(error))
                running.not_before = now + TIDY_EVERY_S
        if self._engine_failure is not None:  # before others come to it
            self._blame(self._engine_failure)
        self._admit()
        if time.monotonic() - self._tidied > TIDY_EVERY_S:
            self._tidied = time.monotonic()
            self._outcomes.expire()
            self._outcomes.queue_lost(self._running.keys())

    def _blame(self, failure: CinelineError) -> NoReturn:
        """The engine has ended: whoever is blamed for that too often fails."""
        for running in culprits(list(self._running.values()), failure):
            if running.job.setbacks + 1 >= MOST_SETBACKS:
                self._outcomes.fail(running.job, failure)
            else:
                self._store.set_back(running.job.id)
        raise EngineEnded(failure)

    @property
    def _engine_failure(self) -> CinelineError | None:
        return None if self._engine is None else self._engine.failure

    def _advance(self, running: Running) -> None:
        """Write what has come of a job.

        Raises:
            sqlite3.OperationalError, OSError: the disk refuses, and may not later.
        """
        try:
            if not running.update(self._metrics):
                return
            self._outcomes.complete(running.job)
        except CinelineError as error:
            running.sink.give_up(error)
            if self._engine_failure is None:
                self._end_badly(running, error)
            return
        except OSError as error:
            running.tries += 1
            if running.tries < MOST_TRIES and not isinstance(error, FileNotFoundError):
                raise
            words = f"The video cannot be kept ({reason(error)}): check the service's disk."
            self._end_badly(running, OutputError(words))
            return
        except sqlite3.OperationalError:
            raise
        except Exception as error:
            running.sink.give_up(error)
            self._end_badly(running, unforeseen(running.job, error))
            return
        self._outcomes.pace.done(running.job.work)
        self._running.pop(running.job.id)  # after that: whoever looks has the one or the other
        running.handle.delivered()

    def _end_badly(self, running: Running, error: CinelineError) -> None:
        """Of one job alone."""
        self._outcomes.set_back(running.job, error)
        self._running.pop(running.job.id)
        running.handle.cancel()
        running.handle.delivered()

    @property
    def _has_room(self) -> bool:
        """In the line, where decodes wait, and on the disk."""
        handles = [running.handle for running in self._running.values()]
        denoising = sum(handle.phase not in ("decoding", "done") for handle in handles)
        in_line = denoising < self._room and len(handles) < 4 * self._room
        return in_line and self._folder.has_room(alone=not handles)

    def _admit(self) -> None:
        if not self._has_room:
            return
        waiting = self._store.waiting()
        while waiting and self._has_room:
            chosen = self._fair.choose(waiting)
            waiting = [job for job in waiting if job is not chosen]
            if chosen is not None and self._store.start(chosen.id):
                self._submit(chosen.id)

    def _submit(self, number: str) -> None:
        assert self._engine is not None
        job = self._store.get(number)
        if job is None:
            return
        self._metrics.waited.observe(max(0.0, time.time() - job.created_at))
        images: dict[str, Any] = {name: self._folder.image(job.id, name) for name in job.images}
        try:
            request = VideoRequest(**job.request, **images)
            handle = self._engine.submit(request, {"video": self._folder.video(job.id)})
        except InvalidRequest as error:  # the model's rules, or the devices, are others than when it was taken
            self._outcomes.fail(job, error)
            return
        except (EngineClosed, RankFailed) as error:  # it ended a moment ago, by another's fault
            self._store.queue_again(job.id)
            self._blame(error)
        except CinelineError as error:
            self._outcomes.set_back(job, error)
            return
        except Exception as error:
            self._outcomes.set_back(job, unforeseen(job, error))
            return
        self._watch(job, handle)
