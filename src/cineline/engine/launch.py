"""Starts the rank processes: on this machine, or as the ranks of an existing torchrun world.

A rank is a process of its own with one connection to the engine. Its death closes the connection and
the engine's death closes all of them, so neither can outlive the other, whatever ended it.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, Listener
from typing import Literal, Protocol

from cineline.core.config import ParallelConfig
from cineline.core.control import ENGINE_ADDRESS
from cineline.engine.forked import ForkedRank, Nursery
from cineline.engine.torchrun import LEAVE, WORLD, torchrun_host, torchrun_world
from cineline.errors import InvalidConfig, RankFailed

Launcher = Literal["local", "torchrun"]

WORKER = "cineline.rank.worker"
NURSERY = "cineline.rank.nursery"

LIBRARIES = ("cineline.rank.loop", "cineline.transport.mesh")
"""What every rank loads, beside its family's module: nothing that starts threads or runs torch in parallel."""

POLL_S = 0.2

LOOPBACK = "127.0.0.1"
LOOPBACK_LIMIT_S = 5.0

GRACE_S = 5.0
"""Seconds that a rank gets to end by itself before it is killed."""

PROGRESS = "HF_HUB_DISABLE_PROGRESS_BARS"

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    PROGRESS: "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Process(Protocol):
    """What is used of a `subprocess.Popen`."""

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
        process: None when another host's torchrun owns it.
    """

    rank: int
    local_rank: int
    connection: Connection
    process: Process | None

    def describe_end(self) -> str:
        """How the process ended, in words."""
        if self.process is None:
            return "its connection closed (the process or its host is gone)"
        try:
            code = self.process.wait(timeout=GRACE_S)
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
            self.process.wait()


def launch_local(ranks: int, environment: Mapping[str, str], family: str | None = None) -> list[RankProcess]:
    """Start all ranks on this machine, each at the end of a pipe.

    Args:
        family: the module of their model's class, to fork them from one process that has loaded it; None to start each
            by itself.

    Raises:
        InvalidConfig: the ranks could not reach each other.
    """
    if ranks > 1:
        _check_loopback()
    started = start_ranks(ranks, environment, family)
    return [RankProcess(rank, rank, *ends) for rank, ends in enumerate(started)]


def start_ranks(ranks: int, environment: Mapping[str, str], family: str | None) -> list[tuple[Connection, Process]]:
    """Our end of each rank's pipe, and its process."""
    if ranks == 1 or family is None or not _can_watch():
        return [start_piped(WORKER, environment) for _ in range(ranks)]
    pipes = [Pipe() for _ in range(ranks)]
    theirs = [end.fileno() for _, end in pipes]
    # Other people's modules may start threads when they load, which a fork would lose.
    known = [*LIBRARIES, *([family] if family.startswith("cineline.") else [])]
    arguments = ["--ranks", ",".join(map(str, theirs)), "--load", ",".join(known)]
    nursery = Nursery(*start_piped(NURSERY, environment, arguments, theirs), ranks)
    for _, end in pipes:
        end.close()
    return [(ours, ForkedRank(nursery, rank)) for rank, (ours, _) in enumerate(pipes)]


def _check_loopback() -> None:
    """Refuse what the ranks would wait for until their limit."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK_LIMIT_S).close()
    except OSError as error:
        raise InvalidConfig(
            f"Ranks meet at {LOOPBACK}, which cannot be reached ({error.strerror or error}): bring the loopback "
            "interface up (ip link set lo up), or use one rank."
        ) from None


def _can_watch() -> bool:
    """Whether the end of a process that is not a child can be waited for (Linux 5.3, where nothing forbids it)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def start_piped(
    module: str, environment: Mapping[str, str], arguments: Sequence[str] = (), inherited: Sequence[int] = ()
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start `python -m module --fd N` on this machine, N being its end of a pipe; our end and the process.

    Args:
        arguments: more of them. inherited: more descriptors that it has.
    """
    ours, theirs = Pipe()
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    own = {name: value for name, value in environment.items() if name not in WORLD}  # torch would heed them
    command = [module, "--fd", str(theirs.fileno()), *arguments]
    process = _popen(command, {**loopback, **own}, inherited=(theirs.fileno(), *inherited))
    theirs.close()
    return ours, process


def _popen(arguments: list[str], environment: Mapping[str, str], inherited: tuple[int, ...]) -> subprocess.Popen[bytes]:
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


def launch_torchrun(parallel: ParallelConfig, environment: Mapping[str, str], limit_s: float) -> list[RankProcess]:
    """Rank 0 of a torchrun world: start the own rank and wait for the connections of all.

    Raises:
        InvalidConfig: the world has not as many ranks, or not all of them called within `limit_s`.
        RankFailed: the own rank ended before it called.
    """
    ranks = parallel.ranks
    world, per_host = torchrun_world()
    if world != ranks:
        raise InvalidConfig(
            f"torchrun started {world} processes, but {parallel} is {ranks} ranks: {parallel.advice(world)}."
        )
    host = torchrun_host()
    key = secrets.token_bytes(32)
    try:
        listener = Listener((host, 0), backlog=ranks, authkey=key)
    except OSError as error:
        raise InvalidConfig(f"MASTER_ADDR={host} is no address of this host ({error.strerror}): {LEAVE}") from None
    address = f"{host},{listener.address[1]},{key.hex()}"
    own = _popen([WORKER], {**environment, ENGINE_ADDRESS: address}, inherited=())
    try:
        connections = _accept(listener, ranks, own, limit_s)
    except BaseException:
        own.kill()
        own.wait()
        raise
    finally:
        listener.close()
    return [RankProcess(rank, rank % per_host, connections[rank], own if rank == 0 else None) for rank in range(ranks)]


def _accept(listener: Listener, ranks: int, own: subprocess.Popen[bytes], limit_s: float) -> dict[int, Connection]:
    connections: dict[int, Connection] = {}

    def accept_all() -> None:
        while len(connections) < ranks:
            try:
                connection = listener.accept()
                rank = connection.recv()
                assert isinstance(connection, Connection)
                connections[rank] = connection
            except (EOFError, AuthenticationError):
                continue  # somebody else's call
            except OSError:
                return  # the listener is closed

    thread = threading.Thread(target=accept_all, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(POLL_S)
        if own.poll() is not None and 0 not in connections:
            raise RankFailed(0, f"the process ended with exit code {own.poll()} before it called the engine")
    if len(connections) < ranks:
        missing = sorted(set(range(ranks)) - connections.keys())
        raise InvalidConfig(f"Ranks {missing} did not call within {limit_s:.0f} s: check their hosts' output.")
    return connections


def serve_torchrun_rank(environment: Mapping[str, str]) -> int:
    """Any other rank of a torchrun world: run the rank's process to its end; its exit code."""
    process = _popen([WORKER], environment, inherited=())
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
