"""What starts the ranks: this process, Ray, or torchrun, whose other ranks serve rank 0's engine alone."""

from __future__ import annotations

import math
import sys

from cineline.cli.options import Given, one_of
from cineline.core.config import AXES, DeviceConfig
from cineline.engine.blueprint import check_launcher, default_device
from cineline.engine.hosts import serve_torchrun_rank
from cineline.engine.launch import Launcher
from cineline.engine.torchrun import torchrun_rank, torchrun_world

LAUNCHER = "local, torchrun, or ray: on the nodes of a cluster; torchrun inside its world."
"""The option's text."""


def launcher_of(name: str | None) -> Launcher:
    """What is asked for, or where nothing is, what the environment says.

    Raises:
        InvalidConfig: it is not known, or cannot be used here.
    """
    if name is None:
        return "local" if torchrun_rank() is None else "torchrun"
    launcher: Launcher = one_of("launcher", name, Launcher)
    check_launcher(launcher)
    return launcher


def stages_of(line: Given, launcher: Launcher) -> int:
    """What the other axes leave of torchrun's world."""
    others = math.prod(line.get(axis, 1) for axis in AXES if axis != "pp")
    return torchrun_world()[0] // others or 1 if launcher == "torchrun" and others > 0 else 1


def serve_where_not_first(launcher: Launcher, devices: Given) -> None:
    """Of torchrun's ranks all but rank 0 end here, when the line does.

    Raises:
        InvalidConfig: the devices cannot be.
        SystemExit: this was one of them.
    """
    if launcher == "torchrun" and torchrun_rank() != 0:
        config = DeviceConfig(**{"device": default_device(), **devices})
        sys.exit(serve_torchrun_rank(config.rank_environment(torchrun_world()[1])))
