"""How a rank of a torchrun world comes to its engine, on this host or another one."""

from __future__ import annotations

import os
import socket
from importlib import metadata
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

from cineline.core.hosts import ALIKE, address_of_master
from cineline.core.key import KEY, KEY_FILE, key_of, prove
from cineline.core.sockets import UNANSWERED_S, limit_receives, notice_loss
from cineline.errors import CinelineError, InvalidConfig, reason, shown
from cineline.transport.rendezvous import NAME_LIMIT, Farewell, Hello, Invitation, Rendezvous, own_address

CALL_LIMIT_S = 20
"""For the engine to take the call, and for each of its answers while both prove the key."""


def meet_engine() -> tuple[Any, Connection]:
    """torchrun's store, and a connection to the engine; a rank that fails says so in the store first.

    Raises:
        InvalidConfig: there is no engine to be met.
    """
    rank, rendezvous = int(os.environ["RANK"]), Rendezvous.join()
    try:
        host = address_of_master()
        rendezvous.say(_hello(rank, host))
        return rendezvous.store, _call(rank, host, rendezvous.invited(rank))
    except Exception as error:  # whatever it was, rank 0 would wait for this one
        cause = str(error) if isinstance(error, CinelineError) else f"{type(error).__name__}: {reason(error)}"
        rendezvous.give_up(Farewell(rank=rank, cause=cause))
        raise


def _hello(rank: int, host: str) -> Hello:
    return Hello(
        rank=rank,
        local_rank=int(os.environ["LOCAL_RANK"]),
        host=socket.gethostname()[:NAME_LIMIT],
        dials=host,
        address=own_address(host, int(os.environ["MASTER_PORT"])),
        versions={library: metadata.version(library) for library in ALIKE},
    )


def _call(rank: int, host: str, invitation: Invitation) -> Connection:
    """Call the engine, and prove to it, as it does to this rank, that both have one key."""
    here = f"Rank {rank} on {shown(socket.gethostname())}"
    try:
        connection = Connection(socket.create_connection((host, invitation.port), CALL_LIMIT_S).detach())
    except OSError as error:
        raise InvalidConfig(
            f"{here} cannot reach the engine at {host}:{invitation.port} ({reason(error)}): let hosts call each other "
            "at any port, or see what rank 0's host says."
        ) from None
    os.set_blocking(connection.fileno(), True)
    limit_receives(connection.fileno(), CALL_LIMIT_S)
    notice_loss(connection.fileno(), UNANSWERED_S)
    try:
        prove(connection, key_of(bytes.fromhex(invitation.secret)), asks=False)
        connection.send_bytes(str(rank).encode())
    except (AuthenticationError, EOFError, OSError) as error:
        connection.close()
        raise InvalidConfig(
            f"{here} and the engine have not one key ({reason(error)}): give all hosts the same {KEY}, or {KEY_FILE}."
        ) from None
    limit_receives(connection.fileno(), 0)
    return connection
