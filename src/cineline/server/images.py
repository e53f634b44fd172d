"""Images that clients send: files, data URLs, and addresses of hosts that are allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image
from starlette.concurrency import run_in_threadpool

from cineline.core.image import load_image
from cineline.errors import InvalidRequest, reason, shown
from cineline.server.body import Reference
from cineline.server.orders import REFERENCE
from cineline.server.refusal import Refusal, invalid

BYTES_LIMIT = 20 * 2**20
PIXELS_LIMIT = 40_000_000
SIDE_LIMIT = 16_384
FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:[\w.+/-]{0,100}(;[\w.=-]{1,100}){0,4},", re.ASCII | re.IGNORECASE)

WITH_IPV4 = [ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")]
"""Addresses that end in one of IPv4, to which they lead: NAT64 (RFC 6052), compatible (RFC 4291), SIIT (RFC 7915)."""

MOST_REDIRECTS = 3
FETCH_LIMIT_S = 20.0
PORTS = {"http": 80, "https": 443}

AT_ONCE = 2
"""Images that are decoded at the same time: each takes 3 bytes a pixel, or more."""

Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host's port."""


def resolve(host: str, port: int) -> list[str]:
    """As the system does."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


@dataclass
class Images:
    """Takes images in.

    Attributes:
        hosts: whose images may be fetched. resolve, transport: replaced by tests.
    """

    hosts: Sequence[str] = ()
    resolve: Resolve = resolve
    transport: httpx.AsyncBaseTransport | None = None
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)

    async def load(self, reference: Reference, name: str = REFERENCE) -> Image.Image:
        """The picture in RGB and upright.

        Args:
            name: the field that it came in, for who is refused.

        Raises:
            Refusal: it is none, too large, or nothing that is fetched.
        """
        try:
            return await self._load(reference)
        except Refusal as refusal:
            refusal.param = name
            raise

    async def _load(self, reference: Reference) -> Image.Image:
        if isinstance(reference, bytes):
            return await self._decoded(lambda: reference)
        address = _address(reference)
        if address[:5].lower() == "data:":
            return await self._decoded(lambda: _content(address))
        fetched = await self._fetch(address)
        return await self._decoded(lambda: fetched)

    async def _decoded(self, content: Callable[[], bytes]) -> Image.Image:
        async with self._turns:
            return await run_in_threadpool(lambda: _decode(content()))

    async def _fetch(self, address: str) -> bytes:
        if not self.hosts:
            raise invalid(
                f"The image {shown(address)} is an address, and nothing is fetched here: send the file, or a data URL.",
                None,
                "image_url_refused",
            )
        try:
            async with asyncio.timeout(FETCH_LIMIT_S):
                for _ in range(MOST_REDIRECTS + 1):
                    content, address = await self._get(address)
                    if content is not None:
                        return content
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise _unfetched(address, reason(error)) from None
        raise _unfetched(address, "it redirects too often")

    async def _get(self, address: str) -> tuple[bytes | None, str]:
        """The content, or None and where it is instead. The connection goes to the address that was looked at."""
        url = httpx.URL(address)
        target = await self._allowed(url)
        port = "" if url.port is None else f":{url.port}"
        async with httpx.AsyncClient(transport=self.transport, trust_env=False, timeout=10.0) as client:
            request = client.build_request(
                "GET",
                url.copy_with(host=target, username=None, password=None),
                headers={"Host": f"{url.host}{port}", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": url.host},
            )
            answer = await client.send(request, stream=True, follow_redirects=False)
            try:
                if answer.has_redirect_location:
                    return None, str(url.join(answer.headers["location"]))
                if answer.status_code != 200:
                    raise _unfetched(address, f"the host answers {answer.status_code}")
                encoding = answer.headers.get("content-encoding", "identity")
                if encoding.lower() != "identity":  # what is small may be large unpacked
                    raise _unfetched(address, f"it is encoded as {shown(encoding)}")
                content = bytearray()
                async for chunk in answer.aiter_raw():
                    content += chunk
                    if len(content) > BYTES_LIMIT:
                        raise _unfetched(address, f"it is over {BYTES_LIMIT} bytes")
                return bytes(content), address
            finally:
                await answer.aclose()

    async def _allowed(self, url: httpx.URL) -> str:
        """The public address of a host that is allowed; of several that none is private."""
        if url.scheme not in PORTS or url.port not in (None, PORTS[url.scheme]) or url.host.lower() not in self.hosts:
            raise invalid(
                f"The image {shown(str(url))} is not on a host that is allowed, at its usual port: use "
                f"{' or '.join(self.hosts)}, or send the file.",
                None,
                "image_url_refused",
            )
        found = await run_in_threadpool(self.resolve, url.host, PORTS[url.scheme])
        if not found or not all(_is_public(address) for address in found):
            raise invalid(
                f"The image {shown(str(url))} is at a private address: send the file.", None, "image_url_refused"
            )
        return found[0]


def _decode(content: bytes) -> Image.Image:
    """Its size is looked at before any pixel is."""
    if len(content) > BYTES_LIMIT:
        raise Refusal(413, f"The image has {len(content)} bytes: use {BYTES_LIMIT} at most.", "image_too_large", None)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_size(opened.width, opened.height)
            return load_image(opened)
    except InvalidRequest as error:
        raise invalid(str(error), None, "invalid_image") from None
    except Refusal:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("more") from None
    except Exception as error:  # a broken file's decoder may raise anything
        raise invalid(
            f"The image cannot be read ({type(error).__name__}): give a PNG, JPEG or WebP file.",
            None,
            "invalid_image",
        ) from None


def _is_public(address: str) -> bool:
    """Whether it leads to nobody's own network, also by an IPv4 address within."""
    given = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(given, ipaddress.IPv4Address):
        return given.is_global and not given.is_multicast
    within = given.ipv4_mapped or given.sixtofour
    if any(given in network for network in WITH_IPV4):
        within = ipaddress.IPv4Address(int(given) & 0xFFFFFFFF)
    is_own = given.is_multicast or given.is_site_local or not given.is_global
    return not is_own and (within is None or (within.is_global and not within.is_multicast))


def _unfetched(address: str, why: str) -> Refusal:
    return invalid(f"The image {shown(address)} cannot be fetched ({why}): send the file.", None, "invalid_image")


def _address(reference: Any) -> str:
    """Of a reference that is a text, or an object with one."""
    if isinstance(reference, dict):
        if reference.get("file_id") is not None:
            raise invalid("file_id is not supported: send the file, or a data URL.", None, "not_supported")
        strange = [name for name in reference if name not in ("image_url", "file_id", "type")]
        found = reference.get("image_url")
        reference = found.get("url") if isinstance(found, dict) else found
        if strange or not isinstance(reference, str):
            raise invalid("The object is no image: give {'image_url': 'data:...'}.")
    if not re.match(r"(data|https?):", reference, re.IGNORECASE):
        raise invalid(f"{shown(reference)} is no image: give a file or a data URL.")
    return str(reference)


def _content(address: str) -> bytes:
    """Of a data URL."""
    found = DATA_URL.match(address)
    if found is None or not found[0].lower().endswith(";base64,"):
        raise invalid("The data URL is not in base64: give data:image/png;base64,...", None, "invalid_image")
    try:
        return base64.b64decode(address[found.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(
            f"The data URL cannot be read ({reason(error)}): give whole base64.", None, "invalid_image"
        ) from None


def _check_size(width: int, height: int) -> None:
    if max(width, height) > SIDE_LIMIT or width * height > PIXELS_LIMIT:
        raise _too_many_pixels(f"{width}x{height}")


def _too_many_pixels(found: str) -> Refusal:
    return Refusal(
        413,
        f"The image has {found} pixels: use {PIXELS_LIMIT} at most, and {SIDE_LIMIT} a side.",
        "image_too_large",
        None,
    )
