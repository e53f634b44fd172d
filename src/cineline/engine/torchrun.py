"""What torchrun says of its world, in the environment."""

from __future__ import annotations

import os

from cineline.core.hosts import LEAVE, SIGNS
from cineline.errors import InvalidConfig, shown

WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What all of its processes have."""


def torchrun_rank() -> int | None:
    """This process's rank in a torchrun world, or None outside one.

    Raises:
        InvalidConfig: there is something of such a world, and not all of it.
    """
    signs = [name for name in SIGNS if os.environ.get(name)]
    if not signs:
        return None
    missing = _missing()
    if missing:
        raise InvalidConfig(f"{signs[0]} is set as by torchrun, but not {', '.join(missing)}: {LEAVE}")
    world = _number("WORLD_SIZE", 1)
    local_world = _number("LOCAL_WORLD_SIZE", 1, world)
    _number("LOCAL_RANK", 0, local_world - 1)
    _number("MASTER_PORT", 1, 65535)
    return _number("RANK", 0, world - 1)


def torchrun_world() -> tuple[int, int]:
    """Processes in this torchrun world, and on this host."""
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def spans_hosts() -> bool:
    """Whether some of them are on another host."""
    world, local = torchrun_world()
    return world > local


def need_torchrun() -> None:
    """Refuse to be a rank of torchrun's outside its world.

    Raises:
        InvalidConfig: this is none, or not all of one.
    """
    if torchrun_rank() is None:
        raise InvalidConfig(
            "launcher='torchrun' needs a torchrun world: start with torchrun -m cineline generate, or your program "
            f"with torchrun (not set: {', '.join([SIGNS[0], *_missing()])})."
        )


def _number(name: str, least: int, most: int = 10**6) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise InvalidConfig(f"{name}={shown(text)} is no whole number from {least} to {most}: {LEAVE}")
    return int(text)


def _missing() -> list[str]:
    return [name for name in WORLD if not os.environ.get(name)]
