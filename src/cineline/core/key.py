"""The key that both ends of a connection between hosts prove to have, where the user gives one."""

from __future__ import annotations

import hashlib
import hmac
import os
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from cineline.errors import InvalidConfig, reason, shown

KEY, KEY_FILE = "CINELINE_KEY", "CINELINE_KEY_FILE"
"""Of the environment: the key itself, or the file that holds it."""

LEAST = 16
"""Characters of a key: who listens on the network could find a shorter one by trying."""


def given_key() -> bytes | None:
    """The user's, without white space around it; None where there is none.

    Raises:
        InvalidConfig: it is too short, there are two, or its file cannot be read.
    """
    key, path = os.environ.get(KEY, ""), os.environ.get(KEY_FILE, "")
    if key and path:
        raise InvalidConfig(f"Both {KEY} and {KEY_FILE}={shown(path)} are set: set one of them.")
    try:
        found = Path(path).read_bytes() if path else os.fsencode(key)
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{KEY_FILE}={shown(path)} cannot be read ({reason(error)}): give a file.") from None
    if not key and not path:
        return None
    if len(found.strip()) < LEAST:
        raise InvalidConfig(
            f"{KEY_FILE if path else KEY} has a key of {len(found.strip())} characters, and {LEAST} are the least: "
            "make one by openssl rand -hex 32."
        )
    return found.strip()


def key_of(secret: bytes) -> bytes:
    """What both ends are to have: the secret of this start alone, or with it the user's key.

    Raises:
        InvalidConfig: as `given_key`.
    """
    key = given_key()
    return secret if key is None else hmac.digest(key, secret, hashlib.sha256)


def prove(connection: Connection, key: bytes, asks: bool) -> None:
    """Have the other end prove that it knows the key, and prove it to it.

    Args:
        asks: whether this end asks first: one of the two does.

    Raises:
        AuthenticationError: the other end does not know it, or says that this one does not.
        OSError, EOFError: the connection ended.
    """
    try:
        for asking in (asks, not asks):
            (deliver_challenge if asking else answer_challenge)(connection, key)
    except (AssertionError, ValueError) as error:  # what came is no challenge, or no answer
        raise AuthenticationError(str(error)) from None
