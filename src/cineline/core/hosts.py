"""What hosts of one torchrun world have in common (no torch)."""

from __future__ import annotations

import os
import socket

from cineline.errors import InvalidConfig, reason, shown

ALIKE = ("cineline", "torch", "diffusers", "transformers")
"""Libraries whose versions are to be the same on all hosts: messages, or bits, depend on them."""

SIGNS = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
"""Set by torchrun alone; others set the rest of its variables too."""

LEAVE = f"start with torchrun, or unset {' and '.join(SIGNS)}."
"""The remedy where the environment is not torchrun's."""


def address_of_master() -> str:
    """What `MASTER_ADDR` is here: on rank 0's host a name may well be a loopback address, and is another one elsewhere.

    Raises:
        InvalidConfig: it cannot be found.
    """
    name = os.environ["MASTER_ADDR"]
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])  # of both kinds IPv4, as gloo's own
    except (OSError, UnicodeError) as error:
        raise InvalidConfig(
            f"MASTER_ADDR={shown(name)} is no host that can be found ({reason(error)}): {LEAVE}"
        ) from None
