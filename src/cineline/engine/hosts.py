"""The ranks of a torchrun world, on one host or several: how the engine hears of them, and meets them.

Each rank leaves word in torchrun's store of what it is and how it calls rank 0's host. The engine listens there, and
nowhere else; a rank that fails before it is met leaves word, too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import psutil

from cineline.core.key import KEY, KEY_FILE, given_key, key_of, prove
from cineline.core.sockets import UNANSWERED_S, limit_receives, notice_loss
from cineline.engine.launch import Process, RankProcess, open_server, popen_rank
from cineline.engine.owned import own
from cineline.errors import CinelineError, InvalidConfig, RankFailed, shown
from cineline.transport.rendezvous import LOOK_EVERY_S, Farewell, Hello, Invitation, Rendezvous

log = logging.getLogger(__name__)

COME_LIMIT_S = 300.0
"""For the ranks of all hosts to say that they are there, once this one's is started: libraries load."""

CALL_LIMIT_S = 60.0
"""For all of them to call, once they are asked to."""

MEET_LIMIT_S = 20
"""For a caller to say who it is."""

NUMBER_LIMIT = 16
"""Bytes of that."""


def launch_torchrun(
    ranks: int, environment: Mapping[str, str], come_s: float = COME_LIMIT_S, call_s: float = CALL_LIMIT_S
) -> list[RankProcess]:
    """Rank 0 of a torchrun world: start the own rank, and meet all.

    Raises:
        InvalidConfig: not all of them came, or their hosts do not fit together.
        RankFailed: one of them failed before it was met.
    """
    own_rank = popen_rank(environment)
    try:
        rendezvous = Rendezvous.visit()
        try:
            hellos = gather(rendezvous, ranks, own_rank, come_s)
            check_versions(hellos)
            connections = meet(rendezvous, hellos, own_rank, call_s)
        except CinelineError as error:  # ranks of other hosts wait
            with contextlib.suppress(CinelineError):
                rendezvous.give_up(Farewell(rank=0, cause=str(error)))
            raise
    except BaseException:
        own_rank.kill()
        own_rank.wait()
        raise
    places = addresses_of(hellos)
    return [
        RankProcess(
            rank=hello.rank,
            local_rank=hello.local_rank,
            connection=own(connections[hello.rank]),
            process=own_rank if hello.rank == 0 else None,
            host="" if is_here(hello.address) else f"{shown(hello.host)} ({hello.address})",
            address=places[hello.rank],
        )
        for hello in hellos
    ]


def gather(rendezvous: Rendezvous, ranks: int, own_rank: Process, limit_s: float) -> list[Hello]:
    """What all ranks say of themselves, in order.

    Raises:
        InvalidConfig: not all of them came within `limit_s`.
        RankFailed: one of them gave up, or this host's ended.
    """
    deadline = time.monotonic() + limit_s
    while True:
        there = rendezvous.hellos(range(ranks))
        missing = [rank for rank in range(ranks) if rank not in there]
        if not missing:
            return [there[rank] for rank in range(ranks)]
        check_coming(rendezvous, own_rank, came=0 in there)
        if time.monotonic() > deadline:
            raise InvalidConfig(
                f"Ranks {missing} did not come within {limit_s:.0f} s: see what torchrun says on their hosts, and give "
                "all hosts the same command but for --node-rank."
            )
        time.sleep(LOOK_EVERY_S)


def check_coming(rendezvous: Rendezvous, own_rank: Process, came: bool) -> None:
    """Look whether a rank has failed that is still to come.

    Args:
        came: whether this host's own has come; what ends it then, its connection tells.

    Raises:
        RankFailed: one has.
    """
    farewell = rendezvous.farewell()
    if farewell is not None:
        raise RankFailed(farewell.rank, farewell.cause.removesuffix("."))
    if own_rank.poll() is not None and not came:
        raise RankFailed(0, f"the process ended with exit code {own_rank.poll()} before it called the engine")


def check_versions(hellos: Sequence[Hello]) -> None:
    """Refuse hosts whose libraries differ.

    Raises:
        InvalidConfig: they do.
    """
    first = hellos[0]
    for hello in hellos:
        for library, version in first.versions.items():
            other = hello.versions.get(library)
            if other != version:
                raise InvalidConfig(
                    f"Rank {hello.rank} on {shown(hello.host)} has {library} {shown(other)}, and rank 0 on "
                    f"{shown(first.host)} has {shown(version)}: install the same on all hosts."
                )


def is_here(address: str) -> bool:
    """Whether an address is this host's own."""
    named = ipaddress.ip_address(address.partition("%")[0])
    own_ones = (one.address.partition("%")[0] for all_of in psutil.net_if_addrs().values() for one in all_of)
    return named.is_loopback or address.partition("%")[0] in own_ones


def addresses_of(hellos: Sequence[Hello]) -> dict[int, str]:
    """Of each rank, by number, the address at which the others reach it: on rank 0's host, where MASTER_ADDR may be
    a loopback address, the one that other hosts call."""
    called = next((hello.dials for hello in hellos if not is_here(hello.address)), None)
    return {hello.rank: called if called and is_here(hello.address) else hello.address for hello in hellos}


def meet(rendezvous: Rendezvous, hellos: Sequence[Hello], own_rank: Process, limit_s: float) -> dict[int, Connection]:
    """Listen where they call, have them call, and prove with each that both have one key; their connections.

    Raises:
        InvalidConfig: they call at no address of this host, or not all within `limit_s`.
        RankFailed: one of them failed before.
    """
    secret = secrets.token_bytes(32)
    key = key_of(secret)
    with contextlib.ExitStack() as stack:
        servers: dict[str, socket.socket] = {}
        for hello in hellos:
            if hello.dials not in servers:
                servers[hello.dials] = stack.enter_context(open_server(hello.dials))
        away = sorted({hello.host for hello in hellos if not is_here(hello.address)})
        if away and given_key() is None:
            log.warning(
                "No %s and no %s: whoever can reach %s could join this line as a rank, or read what is in torchrun's "
                "store; give all hosts one, made by openssl rand -hex 32.",
                *(KEY, KEY_FILE, " and ".join(servers)),
            )
        for hello in hellos:
            port = servers[hello.dials].getsockname()[1]
            rendezvous.invite(hello.rank, Invitation(port=port, secret=secret.hex()))

        def look(met: Collection[int]) -> None:
            check_coming(rendezvous, own_rank, came=0 in met)

        return accept(list(servers.values()), key, len(hellos), look, limit_s)


def accept(
    servers: Sequence[socket.socket], key: bytes, ranks: int, look: Callable[[Collection[int]], None], limit_s: float
) -> dict[int, Connection]:
    """Those of all ranks, by number; whoever else calls, or calls and says nothing, is not waited for.

    Args:
        look: called again and again, with the ranks that are met; what it raises ends this.

    Raises:
        InvalidConfig: not all of them called within `limit_s`.
    """
    connections: dict[int, Connection] = {}
    deadline = time.monotonic() + limit_s
    for server in servers:
        server.setblocking(False)
    try:
        while missing := sorted(set(range(ranks)) - connections.keys()):
            for server in select.select(servers, [], [], LOOK_EVERY_S)[0]:
                with contextlib.suppress(OSError):  # whoever called has hung up again
                    call = server.accept()[0]
                    threading.Thread(target=_meet, args=(call, key, ranks, connections), daemon=True).start()
            look(connections.keys())
            if time.monotonic() > deadline:
                raise InvalidConfig(f"Ranks {missing} did not call within {limit_s:.0f} s: check their hosts' output.")
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return connections


def _meet(call: socket.socket, key: bytes, ranks: int, connections: dict[int, Connection]) -> None:
    """Keep the connection of whoever knows the key and says a rank's number."""
    call.setblocking(True)
    limit_receives(call.fileno(), MEET_LIMIT_S)
    notice_loss(call.fileno(), UNANSWERED_S)
    connection = Connection(call.detach())
    try:
        prove(connection, key, asks=True)
        rank = int(connection.recv_bytes(NUMBER_LIMIT))
        if rank not in range(ranks) or rank in connections:
            raise ValueError(rank)
    except (EOFError, OSError, AuthenticationError, ValueError):  # somebody else's call
        connection.close()
        return
    limit_receives(connection.fileno(), 0)
    connections[rank] = connection


def serve_torchrun_rank(environment: Mapping[str, str]) -> int:
    """Any other rank of a torchrun world: run the rank's process to its end; its exit code."""
    process = popen_rank(environment)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
