"""The HTTP side: routes to what the service does, and every error in OpenAI's shape."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, Literal

import av
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cineline.errors import shown
from cineline.server.body import BodyReader
from cineline.server.events import Events
from cineline.server.files import DataFolder, thumbnail
from cineline.server.images import Images
from cineline.server.keys import Client, Keys
from cineline.server.metrics import Metrics
from cineline.server.orders import REFERENCE
from cineline.server.refusal import Refusal, invalid
from cineline.server.schemas import (
    CREATE_BODY,
    Deleted,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
    VideoObject,
    VideoPage,
)
from cineline.server.service import Service
from cineline.server.waiters import Waiters

LOOK_EVERY_S = 0.1

ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

POLL_MS = (100, 5000)
"""What `openai-poll-after-ms` says at least and at most."""

NOT_SUPPORTED = (
    ("POST", "/v1/videos/{video_id}/remix"),
    ("POST", "/v1/videos/edits"),
    ("POST", "/v1/videos/extensions"),
    ("POST", "/v1/videos/characters"),
    ("GET", "/v1/videos/characters/{character_id}"),
)
"""Of OpenAI's API, what the model does not do."""

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
MP4 = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {**MP4["content"], "image/webp": {"schema": {"type": "string", "format": "binary"}}}},
    206: MP4,
    416: {"content": {"text/plain": {"schema": {"type": "string"}}}},
}


@dataclass(frozen=True)
class Parts:
    """What the routes use."""

    service: Service
    folder: DataFolder
    keys: Keys
    images: Images
    metrics: Metrics


def make_app(parts: Parts) -> ASGIApp:
    """The application, timed from outside: also what fails in it."""
    app = FastAPI(
        title="Cineline",
        version=metadata.version("cineline"),
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        redirect_slashes=False,
    )
    _answer_errors(app)
    # Only where keys are needed: the document would say else that they were.
    secured = [Security(HTTPBearer(auto_error=False))] if parts.keys.clients else []
    app.include_router(_states(parts))
    app.include_router(_not_supported(), dependencies=secured)
    app.include_router(_making(parts), dependencies=secured)
    app.include_router(_looking(parts), dependencies=secured)
    return _Timed(app, parts.metrics)


def _client_of(keys: Keys) -> Callable[[Request], Awaitable[Client]]:
    async def client(request: Request) -> Client:  # else a thread of a pool would be asked
        return keys.client(request.headers.get("authorization"))

    return client


def _making(parts: Parts) -> APIRouter:
    """Jobs made and deleted."""
    router, service, reader, waiters = APIRouter(), parts.service, BodyReader(), Waiters()
    Asks = Annotated[Client, Depends(_client_of(parts.keys))]
    Key = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[ -~]+$")]

    async def made(request: Request, client: Client, key: str | None) -> tuple[VideoObject, bool]:
        async with reader.reading(request) as body:
            images = {
                image: await parts.images.load(reference, REFERENCE if image == "image" else image)
                for image, reference in body.references.items()
            }
            return await run_in_threadpool(service.create, client, body.fields, images, key)

    @router.post("/v1/videos", openapi_extra=dict(CREATE_BODY), tags=["videos"])
    async def create(request: Request, client: Asks, idempotency_key: Key = None) -> VideoObject:
        """Queue a video; it is kept on the disk before this answers."""
        video, _ = await made(request, client, idempotency_key)
        waiters.keep(video.id)
        return video

    @router.post(
        "/v1/videos/sync",
        openapi_extra=dict(CREATE_BODY),
        tags=["videos"],
        response_class=Response,
        responses={200: MP4},
    )
    async def sync(request: Request, client: Asks, idempotency_key: Key = None) -> Response:
        """Make a video and wait for it; if all who wait hang up it is cancelled."""
        began = time.monotonic()
        video, is_new = await made(request, client, idempotency_key)
        with waiters.waiting(video.id, is_new):
            while video.status not in ("completed", "failed"):
                if service.stopping:
                    raise Refusal(503, f"The service ends; {video.id} goes on after that: get it then.", "stopping")
                if await request.is_disconnected():
                    if waiters.is_for_one(video.id):
                        await run_in_threadpool(service.delete, client, video.id)
                    raise invalid("The client has hung up.")
                await asyncio.sleep(LOOK_EVERY_S)
                video = await run_in_threadpool(service.get, client, video.id)
        stored = await run_in_threadpool(service.finished, client, video.id)
        return FileResponse(
            parts.folder.video(stored.id),
            media_type="video/mp4",
            headers={
                "X-Request-Id": stored.id,
                "X-Model": video.model,
                "X-Inference-Time-S": f"{time.monotonic() - began:.3f}",
            },
        )

    @router.delete("/v1/videos/{video_id}", tags=["videos"])
    def delete(video_id: str, client: Asks) -> Deleted:
        """Remove a job and its files; one that runs is stopped."""
        return Deleted(id=service.delete(client, video_id))

    return router


def _looking(parts: Parts) -> APIRouter:
    """Jobs looked at, and what came of them."""
    router, service, events = APIRouter(), parts.service, Events(parts.service)
    Asks = Annotated[Client, Depends(_client_of(parts.keys))]
    began = int(time.time())

    @router.get("/v1/videos", tags=["videos"])
    def listed(
        client: Asks,
        after: Annotated[str | None, Query(description="The id that the page begins behind.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoPage:
        """Jobs, a page at a time."""
        return service.page(client, after, limit, order)

    @router.get("/v1/videos/{video_id}", tags=["videos"])
    def get(video_id: str, client: Asks, response: Response) -> VideoObject:
        """A job as it is now; also one that failed, which has an `error`."""
        video = service.get(client, video_id)
        least, most = POLL_MS
        response.headers["openai-poll-after-ms"] = str(
            int(min(most, max(least, 100 * (time.time() - video.created_at))))
        )
        return video

    @router.head("/v1/videos/{video_id}/content", include_in_schema=False)
    @router.get("/v1/videos/{video_id}/content", tags=["videos"], response_class=Response, responses=CONTENT)
    def content(
        request: Request, video_id: str, client: Asks, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        """The MP4 file, or one part of it (Range; several, or none that there can be, give the whole); or its first
        frame as WebP."""
        _ignore_other_ranges(request)
        if variant == "spritesheet":
            raise invalid("variant='spritesheet' is not supported: use video or thumbnail.", "variant", "not_supported")
        path = parts.folder.video(service.finished(client, video_id).id)
        try:
            if variant == "thumbnail":
                return Response(thumbnail(path), media_type="image/webp")
            return FileResponse(path, media_type="video/mp4", filename=path.name, stat_result=path.stat())
        except (OSError, av.FFmpegError):
            raise Refusal(404, "The video's file is gone: it was deleted or has expired.", "video_not_found") from None

    @router.get("/v1/videos/{video_id}/events", tags=["events"], response_class=Response, responses={200: STREAM})
    async def job_events(video_id: str, client: Asks) -> Response:
        """A job's state, phase, step and previews as they change, to its end."""
        return events.of_job(client, video_id)

    @router.get("/v1/events", tags=["events"], response_class=Response, responses={200: STREAM})
    async def all_events(client: Asks) -> Response:
        """All jobs' state, phase, step and previews as they change, and which item is on which rank."""
        return events.of_all(client)

    @router.get("/v1/models", tags=["models"])
    def models(client: Asks) -> ModelList:
        """The names that the model goes by."""
        return ModelList(data=[Model(id=name, created=began) for name in service.names])

    @router.get("/v1/models/{model:path}", tags=["models"])
    def model(model: str, client: Asks) -> Model:
        """One of them."""
        if model not in service.names:
            raise Refusal(
                404, f"There is no model {shown(model)}: use {' or '.join(service.names)}.", "model_not_found"
            )
        return Model(id=model, created=began)

    return router


def _states(parts: Parts) -> APIRouter:
    """For whoever watches the service."""
    router = APIRouter(tags=["state"])

    @router.get("/health")
    async def health() -> Health:
        """The process is alive, however many threads wait for something."""
        return Health()

    @router.get("/ready")
    def ready() -> Health:
        """Jobs are taken, and there is an engine for them."""
        if not parts.service.is_ready:
            what = "about to end" if parts.service.stopping else "loading its model"
            raise Refusal(503, f"The service is {what}: try again.", "not_ready", retry_after_s=5)
        return Health()

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def metrics() -> Response:
        """For Prometheus."""
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _not_supported() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def refuse(request: Request) -> None:
        name = request.url.path.rstrip("/").split("/")
        what = "characters" if "characters" in name else name[-1]
        raise invalid(f"{what} is not supported: make a new video.", None, "not_supported")

    for method, path in NOT_SUPPORTED:
        router.add_api_route(path, refuse, methods=[method])
    return router


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        refusal = invalid(f"{name}={shown(first.get('input'))} cannot be used: {first['msg']}.", name)
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "There is nothing here", 405: "This method is not for this path"}
        message = f"{words.get(error.status_code, str(error.detail))}: see /openapi.json."
        refusal = Refusal(error.status_code, message, "not_found" if error.status_code == 404 else "not_allowed")
        return JSONResponse(refusal.body, refusal.status, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        refusal = Refusal(500, f"The service failed ({type(error).__name__}): see its log.", "internal_error")
        return JSONResponse(refusal.body, refusal.status)


def _ignore_other_ranges(request: Request) -> None:
    """As RFC 9110 has it for those that are not understood; the answer's own class would refuse them."""
    found = ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if found is None or (found[1] and found[2] and int(found[1]) > int(found[2])) or not (found[1] or found[2]):
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
        request.scope["headers"] = headers


class _Timed:
    """Times answers, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.answers.labels(route, message["status"]).observe(time.monotonic() - began)
            await send(message)

        await self._app(scope, receive, noted)
