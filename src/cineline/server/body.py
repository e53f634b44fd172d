"""Bodies of requests, JSON or multipart, read within limits of bytes and time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from cineline.errors import reason, shown
from cineline.server.fields import listed, typed
from cineline.server.orders import PICTURES
from cineline.server.refusal import Refusal, invalid

BODY_LIMIT = 32 * 2**20
"""Bytes: an image of 20 MB as a data URL, and more text than anybody writes."""

TOGETHER_LIMIT = 8 * BODY_LIMIT
"""Bytes of all bodies that are being read, or used."""

JSON_LIMIT = 2**20
"""Bytes of JSON beside images: as Python's objects they take fifty times that."""

DATA_URLS = re.compile(rb'"data:[^"]{1000,}"', re.IGNORECASE)
"""Those that matter; short ones count as JSON."""

TIME_LIMIT_S = 60.0
"""For a whole body."""

NESTED = re.compile(r"(\w+)\[(image_url|file_id)\]")
"""How OpenAI's client names an object's fields in a form."""

FIELD_LIMIT = 64
FORM, JSON = "multipart/form-data", "application/json"

Reference = bytes | str | Mapping[str, Any]
"""An image: a file's bytes, an address, or an object with one."""


@dataclass(frozen=True)
class Body:
    """What a client sent.

    Attributes:
        references: to images, by the request's fields.
    """

    fields: Mapping[str, Any]
    references: Mapping[str, Reference]


@dataclass
class BodyReader:
    """Reads bodies, all of which together take so much memory at most; of one event loop."""

    _held: int = field(default=0, init=False)

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[Body]:
        """The body, whose memory counts until it has been used.

        Raises:
            Refusal: it is too large, too slow, of another type, or cannot be read.
        """
        raw = bytearray()
        try:
            yield _split(await self._given(request, raw))
        finally:
            self._held -= len(raw)

    async def _given(self, request: Request, raw: bytearray) -> dict[str, Any]:
        content_type = request.headers.get("content-type", "")
        kind = content_type.partition(";")[0].strip().lower()
        if kind not in (FORM, JSON):
            raise Refusal(
                415, f"Content-Type {shown(content_type)} is not taken: use {JSON} or {FORM}.", "unsupported_media_type"
            )
        try:
            async with asyncio.timeout(TIME_LIMIT_S):
                await self._fill(request, raw)
            if kind == FORM:
                return await _form(request, bytes(raw), content_type)
            return await run_in_threadpool(_json, raw)
        except TimeoutError:
            raise Refusal(408, f"The body was not here after {TIME_LIMIT_S:g} s: send it faster.", "timeout") from None
        except ClientDisconnect:
            raise invalid("The connection ended within the body: send all of it.") from None

    async def _fill(self, request: Request, raw: bytearray) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > BODY_LIMIT:
            _too_large()
        async for chunk in request.stream():
            if len(raw) + len(chunk) > BODY_LIMIT:
                _too_large()
            if self._held + len(chunk) > TOGETHER_LIMIT:
                raise Refusal(429, "Too many large bodies come at once: try again.", "busy", retry_after_s=1)
            raw += chunk
            self._held += len(chunk)


def _too_large() -> NoReturn:
    raise Refusal(413, f"The body is over {BODY_LIMIT} bytes: send a smaller image.", "body_too_large")


def _json(raw: bytearray) -> dict[str, Any]:
    beside = len(raw) - sum(found.end() - found.start() for found in DATA_URLS.finditer(raw))
    if beside > JSON_LIMIT:
        raise Refusal(
            413, f"The body has {beside} bytes beside its images: use {JSON_LIMIT} at most.", "body_too_large"
        )
    try:
        given = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is no JSON ({reason(error)}): send an object.", code="invalid_json") from None
    if not isinstance(given, dict):
        raise invalid(f"The body is {shown(type(given).__name__)}, no JSON object: send one.", code="invalid_json")
    return given


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


async def _form(request: Request, raw: bytes, content_type: str) -> dict[str, Any]:
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary or not raw.rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
        raise invalid("The form has no end: send all of it, with its boundary.", code="invalid_form")

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield raw

    parser = MultiPartParser(
        request.headers,
        chunks(),
        max_files=2,
        max_fields=FIELD_LIMIT,
        max_part_size=BODY_LIMIT,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:
        words = error.message if isinstance(error, MultiPartException) else reason(error)
        raise invalid(f"The form cannot be read ({words}): send multipart/form-data.", code="invalid_form") from None
    try:
        texts, lists, files = await _parts(form)
    finally:
        await form.close()
    strange = [name for name in files if name not in PICTURES]
    if strange:
        raise invalid(
            f"The form has a file {shown(strange[0])}: files are for {' and '.join(PICTURES)}.", strange[0][:100]
        )
    nested = {name: found for name in texts if (found := NESTED.fullmatch(name))}
    objects: dict[str, dict[str, str]] = {}
    for name, found in nested.items():
        objects.setdefault(found[1], {})[found[2]] = texts.pop(name)
    return objects | typed(texts, lists) | files


async def _parts(form: FormData) -> tuple[dict[str, str], dict[str, list[str]], dict[str, bytes]]:
    """Texts, items of lists, files."""
    texts: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if (base := listed(name)) is not None and isinstance(value, str):
            lists.setdefault(base, []).append(value)
            continue
        if name in texts or name in files:
            raise invalid(f"The form has {shown(name)} twice: give it once.", name[:100])
        if isinstance(value, UploadFile):
            files[name] = await value.read()
        else:
            texts[name] = value
    return texts, lists, files


def _split(given: dict[str, Any]) -> Body:
    references: dict[str, Reference] = {}
    first: dict[str, str] = {}
    for name, image in PICTURES.items():
        reference = given.get(name)
        if reference is None:
            continue
        if image in references:
            raise invalid(f"{first[image]} and {name} mean the same and are both given: give one.", name)
        if not isinstance(reference, (bytes, str, dict)):
            raise invalid(f"{name}={shown(reference)} is no image: give a file or a data URL.", name)
        references[image], first[image] = reference, name
    return Body({name: value for name, value in given.items() if name not in PICTURES}, references)
