"""Starts the rank processes of this machine (those of a torchrun world: `hosts`; on Ray's nodes: `ray_launch`).

A rank is a process of its own with one connection to the engine, whose end tells the engine of the rank's. A rank ends
with the process that started it (`rank.owner`), whoever else may have that connection open.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, Protocol

from cineline.core.config import ParallelConfig
from cineline.core.hosts import LEAVE, address_of_master
from cineline.core.key import given_key
from cineline.engine.nursery import Nursery, NurseryRank
from cineline.engine.owned import let_go, owned_pipe
from cineline.engine.torchrun import WORLD, torchrun_world
from cineline.errors import InvalidConfig, reason, shown

log = logging.getLogger(__name__)

Launcher = Literal["local", "torchrun", "ray"]

WORKER = "cineline.rank.worker"
NURSERY = "cineline.rank.nursery"

LIBRARIES = ("cineline.rank.loop", "cineline.transport.mesh")
"""What every rank loads, beside its family's module: nothing that starts threads or runs torch in parallel."""

MOST_CALLS = 128
"""That may wait to be answered at once."""

LOOPBACK = "127.0.0.1"
LOOPBACK_LIMIT_S = 5.0

KILL_LIMIT_S = 10.0
"""For a process to be gone that was killed."""

END_LIMIT_S = 2.0
"""From the end of a rank's connection to that of its process."""

PROGRESS = "HF_HUB_DISABLE_PROGRESS_BARS"

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    PROGRESS: "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Process(Protocol):
    """What is used of a `subprocess.Popen`."""

    @property
    def pid(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


@dataclass
class RankProcess:
    """A rank as the engine sees it.

    Attributes:
        rank: its number in the world.
        local_rank: its number on its host.
        connection: to its process.
        process: None when torchrun owns it.
        host: where it is, in words; empty where that is this one. address: its own there, which the others reach.
    """

    rank: int
    local_rank: int
    connection: Connection
    process: Process | None
    host: str = ""
    address: str | None = None

    def describe_end(self) -> str:
        """How the process ended, in words."""
        if self.process is None:
            return f"its connection closed (the process or its host{self.host and f' {self.host}'} is gone)"
        try:
            code = self.process.wait(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "its connection closed while the process went on"
        if code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def end(self, deadline: float) -> None:
        """See to it that the process is gone soon after `deadline` (`time.monotonic`)."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(KILL_LIMIT_S)
            except subprocess.TimeoutExpired:  # the kernel does not let go of it: a driver, a disk
                log.warning("Rank %d's process %s was killed and is still there.", self.rank, self.process.pid)


def check_launch(launcher: Launcher, parallel: ParallelConfig) -> None:
    """Refuse what the ranks would fail at, or wait for until their limit.

    Raises:
        InvalidConfig: torchrun's world has not as many ranks, its address is none of this host's, the key between hosts
            is none, or the ranks of this machine could not reach each other.
    """
    if launcher == "torchrun":
        world, _ = torchrun_world()
        if world != parallel.ranks:
            raise InvalidConfig(
                f"torchrun started {world} processes, but {parallel} is {parallel.ranks} ranks: "
                f"{parallel.advice(world)}."
            )
        given_key()
        open_server(address_of_master()).close()
    elif parallel.ranks > 1:
        _check_loopback()


def launch_local(ranks: int, environment: Mapping[str, str], family: str | None = None) -> list[RankProcess]:
    """Start all ranks on this machine, each at the end of a pipe.

    Args:
        family: the module of their model's class, to fork them from one process that has loaded it; None to start each
            by itself.
    """
    started = start_ranks(ranks, environment, family)
    return [RankProcess(rank, rank, *ends) for rank, ends in enumerate(started)]


def start_ranks(ranks: int, environment: Mapping[str, str], family: str | None) -> list[tuple[Connection, Process]]:
    """Our end of each rank's pipe, and its process."""
    links = [owned_pipe() for _ in range(ranks)]
    theirs = [end.fileno() for _, end in links]
    arguments = ["--ranks", ",".join(map(str, theirs))]
    if family is not None:
        # Other people's modules may start threads when they load, which a fork would lose.
        known = [*LIBRARIES, *([family] if family.startswith("cineline.") else [])]
        arguments += ["--load", ",".join(known)]
    connection, process = start_piped(NURSERY, environment, arguments, theirs)
    try:
        nursery = Nursery(connection, process, ranks)
        for _, end in links:
            let_go(end)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return [(ours, NurseryRank(nursery, rank)) for rank, (ours, _) in enumerate(links)]


def start_piped(
    module: str, environment: Mapping[str, str], arguments: Sequence[str] = (), inherited: Sequence[int] = ()
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start `python -m module --fd N --parent PID` on this machine, N being its end of a pipe; our end and the process.

    Args:
        arguments: more of them. inherited: more descriptors that it has.
    """
    ours, theirs = owned_pipe()
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    alone = {name: value for name, value in environment.items() if name not in WORLD}  # torch would heed them
    command = [module, "--fd", str(theirs.fileno()), "--parent", str(os.getpid()), *arguments]
    process = _popen(command, {**loopback, **alone}, inherited=(theirs.fileno(), *inherited))
    let_go(theirs)
    return ours, process


def _check_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK_LIMIT_S).close()
    except OSError as error:
        raise InvalidConfig(
            f"Ranks meet at {LOOPBACK}, which cannot be reached ({error.strerror or error}): bring the loopback "
            "interface up (ip link set lo up), or use one rank."
        ) from None


def open_server(host: str) -> socket.socket:
    """Listen at MASTER_ADDR, as it is called somewhere.

    Raises:
        InvalidConfig: it is no address of this host.
    """
    try:
        if ipaddress.ip_address(host).is_unspecified:
            raise OSError("it stands for all addresses")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=MOST_CALLS)
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"MASTER_ADDR={shown(host)} is no address of this host ({reason(error)}): {LEAVE}"
        ) from None


def _popen(arguments: list[str], environment: Mapping[str, str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments],  # -P: what lies in the current folder is not the program's
        env={**QUIET, **environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,
        pass_fds=inherited,
        start_new_session=True,  # a Ctrl-C at the terminal is for the engine alone
    )


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def popen_rank(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank that finds its engine by torchrun's environment."""
    bound = ["--bound"] if threading.current_thread() is threading.main_thread() else []
    return _popen([WORKER, "--parent", str(os.getpid()), *bound], environment, inherited=())
