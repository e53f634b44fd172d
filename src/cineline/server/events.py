"""Events as they happen, by server-sent events: each client is told what is new since it was last told, so that a slow
one misses steps and holds nothing up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from cineline.server.keys import Client
from cineline.server.refusal import Refusal
from cineline.server.schemas import VideoObject
from cineline.server.service import Service

LOOK_EVERY_S = 0.2
PING_EVERY_S = 15

SEND_LIMIT_S = 30
"""For a client to take an event; who does not is gone."""

MOST_STREAMS = 200
"""At once; each looks at the jobs five times a second."""

OVERLAP_S = 10.0
"""Of looks for jobs that have ended: a row may come so long after the time that it says, as its write may wait."""

ENDS = ("completed", "failed")


@dataclass
class Events:
    """Streams of them; of one event loop."""

    service: Service
    _open: int = field(default=0, init=False)

    def of_job(self, client: Client, job: str) -> EventSourceResponse:
        """One job's, to its end.

        Raises:
            Refusal: there is none, or too many listen.
        """
        self.service.get(client, job)
        return self._response(lambda: self._job(client, job))

    def of_all(self, client: Client) -> EventSourceResponse:
        """All of a client's jobs, and the line, for ever.

        Raises:
            Refusal: too many listen.
        """
        return self._response(lambda: self._all(client))

    def _response(self, make: Callable[[], AsyncIterator[ServerSentEvent]]) -> EventSourceResponse:
        if self._open >= MOST_STREAMS:
            raise Refusal(429, f"{self._open} clients listen already: try again.", "too_many_streams", retry_after_s=10)
        headers = {"X-Accel-Buffering": "no"}
        return EventSourceResponse(self._counted(make()), ping=PING_EVERY_S, send_timeout=SEND_LIMIT_S, headers=headers)

    async def _counted(self, events: AsyncIterator[ServerSentEvent]) -> AsyncIterator[ServerSentEvent]:
        self._open += 1
        try:
            async for event in events:
                yield event
        finally:
            self._open -= 1

    async def _job(self, client: Client, job: str) -> AsyncIterator[ServerSentEvent]:
        told, shown = None, -1
        while not self.service.stopping:
            try:
                now = await run_in_threadpool(self.service.get, client, job)
            except Refusal:
                yield _deleted(job)
                return
            if now != told:
                yield _video(now)
                told = now
            preview = await run_in_threadpool(self.service.preview, client, job, shown)
            if preview is not None:
                shown = preview[0]
                yield _preview(job, *preview)
            if now.status in ENDS:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    async def _all(self, client: Client) -> AsyncIterator[ServerSentEvent]:
        told: dict[str, VideoObject] = {}
        line: list[object] | None = None
        shown: dict[str, int] = {}
        ends = _Ends(self.service, client)
        await run_in_threadpool(ends.new, True)  # those that ended before are not told
        while not self.service.stopping:
            now = {video.id: video for video in await run_in_threadpool(self.service.open_jobs, client)}
            gone = told.keys() - now.keys()
            for video in await run_in_threadpool(ends.new, bool(gone)):
                now.pop(video.id, None)  # it has ended since
                gone.discard(video.id)
                yield _video(video)
            for job in gone - ends.told:
                yield _deleted(job)
            for job, video in now.items():
                before = told.get(job)
                if video is not before and video != before:
                    yield _video(video)
                if video.phase == "waiting":
                    continue
                preview = await run_in_threadpool(self.service.preview, client, job, shown.get(job, -1))
                if preview is not None:
                    shown[job] = preview[0]
                    yield _preview(job, *preview)
            told, shown = now, {job: step for job, step in shown.items() if job in now}
            states: list[object] = list(self.service.line(client))
            if states != line:
                yield ServerSentEvent(event="line", data=_json(states))
                line = states
            await asyncio.sleep(LOOK_EVERY_S)


class _Ends:
    """A client's jobs that end from now on, each once.

    Attributes:
        told: those of the last seconds.
    """

    def __init__(self, service: Service, client: Client) -> None:
        self._service, self._client = service, client
        self._since, self._changes = time.time(), -1
        self.told: set[str] = set()

    def new(self, must_look: bool) -> list[VideoObject]:
        """Those since the last time."""
        changes = self._service.changes
        if changes == self._changes and not must_look:
            return []
        moment = time.time()
        found = self._service.ended_since(self._client, self._since - OVERLAP_S)
        new = [video for video in found if video.id not in self.told]
        self.told = {video.id for video in found}
        self._since, self._changes = moment, changes
        return new


def _video(video: VideoObject) -> ServerSentEvent:
    return ServerSentEvent(event="video", data=video.model_dump_json())


def _preview(job: str, step: int, image: str) -> ServerSentEvent:
    return ServerSentEvent(event="preview", data=_json({"id": job, "step": step, "image": image}))


def _deleted(job: str) -> ServerSentEvent:
    return ServerSentEvent(event="deleted", data=_json({"id": job}))


def _json(value: object) -> str:
    return json.dumps(value)
