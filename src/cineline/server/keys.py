"""Who may use the service, and how much of it: a file of keys.

[keys.alice]
key = "sk-..."        # 16 characters or more
open_jobs = 20        # that may wait or run; as many as the service takes
priority = "normal"   # the highest that may be asked for; high
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cineline.errors import InvalidConfig, reason, shown
from cineline.server.orders import Priority
from cineline.server.refusal import Refusal

LEAST_KEY = 16
"""Characters: shorter ones are guessed."""

AS_SENT = r"^[!-~]([ -~]*[!-~])?$"
"""What a header carries whole: ASCII, without a space at an end."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(min_length=LEAST_KEY, max_length=1000, pattern=AS_SENT)]
    open_jobs: Annotated[int | None, Field(ge=1)] = None
    priority: Priority = "high"


@dataclass(frozen=True)
class Client:
    """Who asks.

    Attributes:
        name: whose jobs it sees; empty where there are no keys.
        open_jobs: that may wait or run; None for as many as the service takes. priority: the highest it may ask for.
    """

    name: str = ""
    open_jobs: int | None = None
    priority: Priority = "high"


ANYBODY = Client()


@dataclass(frozen=True)
class Keys:
    """The clients, by a hash of each key, so that no comparison tells how much of one was right."""

    clients: Sequence[tuple[bytes, Client]] = ()

    @classmethod
    def of(cls, path: Path | None) -> Keys:
        """From a file; None lets anybody in.

        Raises:
            InvalidConfig: it cannot be read, or two clients have the same key.
        """
        if path is None:
            return cls()
        try:
            tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
            entries = TypeAdapter(dict[str, dict[str, _Entry]]).validate_python(tables).get("keys", {})
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InvalidConfig(f"{shown(path)}: {where} cannot be used ({first['msg']}).") from None
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"{shown(path)} cannot be read ({reason(error)}): give a file of TOML.") from None
        if not entries or tables.keys() != {"keys"}:
            raise InvalidConfig(f"{shown(path)} has no keys alone: write tables such as [keys.alice], each with a key.")
        clients = [
            (_digest(entry.key), Client(name, entry.open_jobs, entry.priority)) for name, entry in entries.items()
        ]
        if len({digest for digest, _ in clients}) < len(clients):
            raise InvalidConfig(f"{shown(path)} has the same key twice: give each client its own.")
        return cls(tuple(clients))

    def client(self, authorization: str | None) -> Client:
        """Whose key a request has; every key is compared with, in constant time.

        Raises:
            Refusal: it has none of them.
        """
        if not self.clients:
            return ANYBODY
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = [client for other, client in self.clients if hmac.compare_digest(digest, other)]
        if scheme.lower() != "bearer" or not found:
            raise Refusal(401, "The API key is not known: send Authorization: Bearer KEY.", "invalid_api_key")
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
