"""A rank's process that calls its engine, from whatever host: `python -m cineline.rank.remote --parent PID --rank R
--ranks N --host ADDRESS`. It ends with its parent.

The environment says where the engine is (`ray_actor.ENGINE`). Both ends prove the key that is there, then the
rank says its number, and each what the other lacks, as JSON: rank 0, which has opened the ranks' rendezvous on its
host, on which port that is; the engine to the others, where.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

from cineline.core import streams
from cineline.core.key import prove
from cineline.core.sockets import UNANSWERED_S, notice_loss
from cineline.errors import InvalidConfig, reason
from cineline.rank import worker
from cineline.rank.owner import die_with, end_with
from cineline.rank.ray_actor import ENGINE

CALL_LIMIT_S = 20
"""For the engine to take the call."""

WORDS_LIMIT = 1000
"""Bytes of what is said before the rank is served."""


def main() -> None:
    """Call the engine and serve it."""
    streams.secure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bound", action="store_true", help="the parent's main thread has started it")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--host", required=True, help="of this rank, as others reach it")
    options = parser.parse_args()
    (die_with if options.bound else end_with)(options.parent)
    connection, store = _meet(options.rank, options.ranks, options.host)
    worker.serve(connection, store)


def _meet(rank: int, ranks: int, host: str) -> tuple[Connection, Any]:
    """A connection to the engine, and the ranks' rendezvous; None for a rank that is alone."""
    # Late, as it is large; before the engine is called, which waits for no more than words then.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from cineline.transport.mesh import JOIN_LIMIT

    store = TCPStore(host, 0, ranks, True, JOIN_LIMIT, wait_for_workers=False) if rank == 0 and ranks > 1 else None
    connection = _call(rank)
    if store is not None:
        connection.send_bytes(json.dumps(store.port).encode())
    elif rank:
        where = json.loads(connection.recv_bytes(WORDS_LIMIT))
        store = TCPStore(where["host"], where["port"], ranks, False, JOIN_LIMIT)
    return connection, store


def _call(rank: int) -> Connection:
    host, port, key = os.environ.pop(ENGINE).split(",")
    try:
        connection = Connection(socket.create_connection((host, int(port)), CALL_LIMIT_S).detach())
        os.set_blocking(connection.fileno(), True)
        notice_loss(connection.fileno(), UNANSWERED_S)
        prove(connection, bytes.fromhex(key), asks=False)
        connection.send_bytes(str(rank).encode())
    except (OSError, EOFError, AuthenticationError) as error:
        raise InvalidConfig(
            f"Rank {rank} cannot reach the engine at {host}:{port} ({reason(error)}): see that the cluster's nodes "
            "reach each other on any port."
        ) from None
    return connection


if __name__ == "__main__":
    main()
