"""The actor of a rank on a node of a Ray cluster: it starts the rank's process there, tells how that ends, and ends it.

The rank is a child of the actor's process, so that its environment is a rank's own, and no thread of Ray's is in it. It
ends with the actor (`rank.owner`), whatever has ended that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import psutil

MODULE = "cineline.rank.remote"

ENGINE = "CINELINE_ENGINE"
"""Environment of a rank's process: host, port and key (hexadecimal) of its engine, separated by commas."""

INTERFACES = "GLOO_SOCKET_IFNAME"
"""The variable that says over which interfaces gloo talks."""

LIBRARIES = ("cineline", "torch", "diffusers")
"""Whose versions must be the engine's."""


@dataclass(frozen=True)
class Node:
    """Where an actor is.

    Attributes:
        address: the node's, by which the cluster's others reach it. versions: of `LIBRARIES`.
    """

    address: str
    versions: Mapping[str, str]


class RankActor:
    """One rank's. Its methods run one after another, on the main thread of the actor's process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def node(self) -> Node:
        """Where this is."""
        ray: Any = import_module("ray")
        return Node(ray.util.get_node_ip_address(), versions())

    def start(self, arguments: list[str], environment: Mapping[str, str], without: Collection[str]) -> None:
        """Start the rank's process.

        Args:
            arguments: of `rank.remote`. environment: in place of the node's. without: what it is not to have of that.
        """
        bound = ["--bound"] if threading.current_thread() is threading.main_thread() else []
        own = {name: value for name, value in os.environ.items() if name not in without}
        own.setdefault(INTERFACES, _interface(self.node().address))
        own["PYTHONPATH"] = os.pathsep.join(_search_path())
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, "--parent", str(os.getpid()), *bound, *arguments],
            env={**own, **environment},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # the engine's own is for what it makes
        )

    def wait(self) -> int:
        """The exit code of the rank's process, once it has ended."""
        assert self._process is not None
        return self._process.wait()


def _search_path() -> list[str]:
    """This process's, without the libraries that Ray ships with itself."""
    ray: Any = import_module("ray")
    inside = str(Path(ray.__file__).parent)
    return [path for path in sys.path if path and not path.startswith(inside)]


def gpu() -> tuple[str, float]:
    """Name and bytes of the GPU that Ray gives this process."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return found.name, float(found.total_memory)


def versions() -> dict[str, str]:
    """Of `LIBRARIES`, here."""
    return {name: metadata.version(name) for name in LIBRARIES}


def _interface(address: str) -> str:
    """The name of the interface that has the address: gloo's own guess goes by the host's name, which may be the
    loopback's."""
    names = [name for name, own in psutil.net_if_addrs().items() if address in {one.address for one in own}]
    return names[0] if names else ""
