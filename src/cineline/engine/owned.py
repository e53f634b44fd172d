"""The engine's ends of connections: no child that its process forks keeps them open, for ranks would take it for the
engine."""

from __future__ import annotations

import contextlib
import os
from multiprocessing.connection import Connection
from weakref import WeakSet

_owned: WeakSet[Connection] = WeakSet()


def own(connection: Connection) -> Connection:
    """Have it closed in children that are forked from now on."""
    _owned.add(connection)
    return connection


def let_go(connection: Connection) -> None:
    """Close it."""
    _owned.discard(connection)
    connection.close()


def _close_all() -> None:
    for connection in list(_owned):
        with contextlib.suppress(OSError):
            connection.close()
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
