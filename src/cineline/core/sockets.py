"""TCP connections between hosts, made to notice within seconds that the other end cannot be reached any more."""

from __future__ import annotations

import os
import socket
import struct

IDLE_S, EVERY_S, PROBES = 4, 2, 3
"""Keepalive: the first probe of a connection that is idle, the further ones, and how many are not answered."""

UNANSWERED_S = 20
"""For what is sent to be taken in, by an end that always takes in what comes: after that it is lost, or stopped."""


def notice_loss(descriptor: int, unanswered_s: int | None = None) -> None:
    """Have a connection that is idle end with an error within 10 s; what is no TCP connection is left alone.

    Args:
        unanswered_s: the same where something is to be sent. Not for an end that takes in a message when it wants it:
            the kernel does not tell one that is busy from one that is lost.
    """
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_KEEPIDLE": IDLE_S, "TCP_KEEPINTVL": EVERY_S, "TCP_KEEPCNT": PROBES}
        if unanswered_s is not None:
            options["TCP_USER_TIMEOUT"] = unanswered_s * 1000
        for name, value in options.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def notice_loss_of_all(port: int | None = None, unanswered_s: int | None = None) -> None:
    """The same for all of this process's connections, those that libraries have made.

    Args:
        port: of the other end, for those to it alone.
    """
    import psutil

    for connection in psutil.Process().net_connections("tcp"):
        of_these = port is None or (connection.raddr and connection.raddr.port == port)
        if of_these and connection.status == psutil.CONN_ESTABLISHED and connection.fd >= 0:
            notice_loss(connection.fd, unanswered_s)


def limit_receives(descriptor: int, seconds: int) -> None:
    """Have a wait for what the other end sends end with an error after so long; 0 for no limit."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
