"""uvicorn's HTTP, which waits for the head of a request so long and no longer."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_LIMIT_S = 30.0

KEEP_ALIVE_S = 65
"""Of a connection on which nothing is asked: longer than clients (httpx 5 s) and proxies (nginx 60 s) keep theirs, so
that none is closed under a request that is on its way."""

LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """A connection. uvicorn itself lets one stay open for ever that sends a byte of its head now and then."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._await_head()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._forget()  # the next head's time begins with its first byte
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_LIMIT_S, self._look)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.write(LATE)
            self.transport.close()
