"""TCP connections between hosts, made to notice within seconds that the other end cannot be reached any more."""

from __future__ import annotations

import os
import socket

LOST_S = 10
"""From the last sign of the other end until it counts as lost, whether something is to be sent or not."""

IDLE_S, EVERY_S, PROBES = 4, 2, 3
"""Keepalive: the first probe of a connection that is idle, the further ones, and how many are not answered."""


def notice_loss(descriptor: int) -> None:
    """Have a connection end with an error within `LOST_S`; what is no TCP connection is left alone."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", IDLE_S),
            ("TCP_KEEPINTVL", EVERY_S),
            ("TCP_KEEPCNT", PROBES),
            ("TCP_USER_TIMEOUT", LOST_S * 1000),
        ):
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def notice_loss_of_all() -> None:
    """The same for all of this process's connections, those that libraries have made."""
    import psutil

    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED and connection.fd >= 0:
            notice_loss(connection.fd)
