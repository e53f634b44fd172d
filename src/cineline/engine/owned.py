"""Connections between the engine's process and others: a child that it forks does not keep them open, for it would be
taken for one of their ends."""

from __future__ import annotations

import contextlib
import os
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar
from weakref import WeakSet


class Closable(Protocol):
    """A connection, or its socket."""

    def close(self) -> None: ...


_owned: WeakSet[Closable] = WeakSet()

Owned = TypeVar("Owned", bound=Closable)


def own(end: Owned) -> Owned:
    """Have it closed in children that are forked from now on."""
    _owned.add(end)
    return end


def owned_pipe() -> tuple[Connection, Connection]:
    """Both ends of a new one, owned."""
    ours, theirs = Pipe()
    return own(ours), own(theirs)


def let_go(end: Closable) -> None:
    """Close it."""
    _owned.discard(end)
    end.close()


def _close_all() -> None:
    for end in list(_owned):
        with contextlib.suppress(OSError):
            end.close()
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
