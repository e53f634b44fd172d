"""What `cineline serve` is told, checked at birth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cineline.errors import InvalidConfig, shown

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

HOST = re.compile(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)*")
NAME = re.compile(r"[\w.:/-]{1,100}", re.ASCII)


def _quantity(name: str, text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]+)", text.strip())
    unit = next((unit for unit in units if found and unit.lower() == found[2].lower()), None)
    if found is None or unit is None or not float(found[1]) > 0:
        raise InvalidConfig(
            f"{name}={shown(text)} is no amount above 0: give a number and {', '.join(units)}, such as {example}."
        )
    return float(found[1]) * units[unit]


@dataclass(frozen=True)
class ServeConfig:
    """The service.

    Attributes, beyond what the options' texts say:
        data_dir: made if its parent is there; one service has it at a time.
        keep_for, keep_bytes: finished videos go when they are older, or, the oldest first, when all take more.
        aliases: further names of the model. image_hosts: whose images may be fetched; of no other host any is.

    Raises:
        InvalidConfig: a value that cannot be used.
    """

    host: Annotated[str, "Address to listen on"] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 for one that is free"] = 8000
    data_dir: Annotated[Path, "Folder of jobs, videos and snapshots"] = Path("cineline-data")
    api_keys: Annotated[Path | None, "File of keys (TOML); without it nobody needs one"] = None
    keep_for: Annotated[str, "How long finished jobs stay, such as 12h"] = "7d"
    keep_bytes: Annotated[str, "How much finished videos may take"] = "50GB"
    grace: Annotated[str, "How long the end may take after SIGTERM"] = "30s"
    queue_limit: Annotated[int, "Jobs that may wait or run; more are told to come back later"] = 1000
    fit_sizes: Annotated[bool, "Take the nearest size of the model's grid instead of refusing"] = False
    aliases: Sequence[str] = ()
    image_hosts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, least, most in (("port", 0, 65535), ("queue_limit", 1, 1_000_000)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InvalidConfig(f"{name}={shown(value)} is out of range: use {least} to {most}.")
        _ = self.keep_for_s, self.keep_for_bytes, self.grace_s
        for alias in self.aliases:
            if not NAME.fullmatch(alias):
                raise InvalidConfig(f"alias={shown(alias)} is no name: use letters, digits and . : / - _, 100 at most.")
        for host in self.image_hosts:
            if not HOST.fullmatch(host):
                raise InvalidConfig(
                    f"allow_image_hosts={shown(host)} is no host's name: give one such as images.example.org."
                )

    @property
    def keep_for_s(self) -> float:
        """Seconds."""
        return _quantity("keep_for", self.keep_for, SECONDS, "7d")

    @property
    def keep_for_bytes(self) -> float:
        """Bytes."""
        return _quantity("keep_bytes", self.keep_bytes, BYTES, "50GB")

    @property
    def grace_s(self) -> float:
        """Seconds."""
        return _quantity("grace", self.grace, SECONDS, "30s")
