"""Processes beside the benchmark's own: started, asked, and gone at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from cineline.engine.launch import start_piped
from cineline.errors import CinelineError

WAIT_LIMIT_S = 3600.0


@contextmanager
def processes(module: str, environment: Mapping[str, str], count: int = 1) -> Iterator[list[Connection]]:
    """That many of `python -m module --fd N`, each at the other end of a pipe."""
    started = [start_piped(module, environment) for _ in range(count)]
    try:
        yield [connection for connection, _ in started]
    finally:
        for connection, process in started:
            connection.close()
            process.kill()
            process.wait()


def hear(connection: Connection, who: str) -> Any:
    """What a process says next.

    Raises:
        CinelineError: it ended, or said nothing within `WAIT_LIMIT_S`.
    """
    try:
        if connection.poll(WAIT_LIMIT_S):
            return connection.recv()
    except EOFError:
        raise CinelineError(f"{who} ended: see its error above.") from None
    raise CinelineError(f"{who} has not answered in {WAIT_LIMIT_S:.0f} s: use a smaller case.")
