"""torchrun's store: where ranks say how they are reached, where the engine listens for each, and who gave up (no torch
before it is opened)."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cineline.core.sockets import UNANSWERED_S, notice_loss_of_all
from cineline.errors import InvalidConfig, reason, shown

LOOK_EVERY_S = 0.2

OPEN_LIMIT = timedelta(seconds=15)
"""For torchrun's store to take a call: it is there before any rank is started, and may have gone since."""

VISIT_LIMIT = timedelta(minutes=5)
"""The same for one that rank 0's own process opens, once it has loaded torch."""

WAIT_LIMIT = timedelta(minutes=30)
"""For what others are to put there, while ranks meet each other."""

NAME_LIMIT = 255
"""Characters of what a rank says of its host."""


Address = Annotated[str, AfterValidator(lambda text: str(ipaddress.ip_address(text)))]
"""IPv4 or IPv6."""


class Note(BaseModel):
    """What somebody leaves in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hello(Note):
    """What a rank says of itself.

    Attributes:
        rank: its number. local_rank: its number on its host.
        host: that host's name. dials: what MASTER_ADDR is there, at which the rank will call the engine.
        address: its own, on the way there.
        versions: of what must be alike on all hosts, by library.
    """

    rank: int = Field(ge=0)
    local_rank: int = Field(ge=0)
    host: str = Field(max_length=NAME_LIMIT)
    dials: Address
    address: Address
    versions: Mapping[str, str]


class Invitation(Note):
    """Where the engine listens for a rank: a port of the address that it dials. secret: of this start, hexadecimal."""

    port: int = Field(ge=1, le=65535)
    secret: str = Field(max_length=NAME_LIMIT)


class Farewell(Note):
    """Why a rank does not come, or the engine asks for none any more (rank 0), in words."""

    rank: int = Field(ge=0)
    cause: str


Left = TypeVar("Left", bound=Note)
Answer = TypeVar("Answer")


class Rendezvous:
    """One start of a torchrun world.

    Args:
        store: torch's, of this start alone.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    @classmethod
    def join(cls) -> Rendezvous:
        """As one of its ranks.

        Raises:
            InvalidConfig: it cannot be reached.
        """
        from torch.distributed.rendezvous import rendezvous

        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        joined = cls._open(lambda: next(rendezvous("env://", timeout=OPEN_LIMIT if shared else WAIT_LIMIT))[0])
        joined.store.set_timeout(WAIT_LIMIT)
        return joined

    @classmethod
    def visit(cls) -> Rendezvous:
        """Beside its ranks.

        Raises:
            InvalidConfig: it cannot be reached.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return cls._open(lambda: TCPStore(*address, timeout=VISIT_LIMIT, wait_for_workers=False))

    @classmethod
    def _open(cls, store: Callable[[], Any]) -> Rendezvous:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        # The store outlives a start of the world, and with it where the ranks were.
        start = f"cineline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        opened = _asked(lambda: PrefixStore(start, store()))
        notice_loss_of_all(int(os.environ["MASTER_PORT"]), UNANSWERED_S)
        return cls(opened)

    def say(self, hello: Hello) -> None:
        """Be heard of by the engine."""
        self._leave(f"hello/{hello.rank}", hello)

    def hellos(self, ranks: Sequence[int]) -> dict[int, Hello]:
        """What these ranks have said so far."""
        names = {rank: f"hello/{rank}" for rank in ranks}
        if _asked(lambda: self.store.check(list(names.values()))):
            return {rank: self._read(name, Hello) for rank, name in names.items()}
        there = {rank: self._found(name, Hello) for rank, name in names.items()}
        return {rank: hello for rank, hello in there.items() if hello is not None}

    def invite(self, rank: int, invitation: Invitation) -> None:
        """Have a rank call."""
        self._leave(f"engine/{rank}", invitation)

    def invited(self, rank: int) -> Invitation:
        """Where the rank is to call; waits for that as long as torchrun's world is there.

        Raises:
            InvalidConfig: it is gone, or somebody has given up.
        """
        while (invitation := self._found(f"engine/{rank}", Invitation)) is None:
            if (farewell := self.farewell()) is not None:
                raise InvalidConfig(f"Rank {rank} is not asked for any more: {farewell.cause}")
            time.sleep(LOOK_EVERY_S)
        return invitation

    def give_up(self, farewell: Farewell) -> None:
        """Tell all others, those of other hosts too."""
        self._leave("farewell", farewell)

    def farewell(self) -> Farewell | None:
        """The last one, if somebody has given up."""
        return self._found("farewell", Farewell)

    def _leave(self, name: str, note: Note) -> None:
        _asked(lambda: self.store.set(name, note.model_dump_json()))

    def _found(self, name: str, kind: type[Left]) -> Left | None:
        return self._read(name, kind) if _asked(lambda: self.store.check([name])) else None

    def _read(self, name: str, kind: type[Left]) -> Left:
        try:
            return kind.model_validate_json(_asked(lambda: self.store.get(name)))
        except ValidationError as error:
            raise InvalidConfig(
                f"torchrun's store has no {kind.__name__.lower()} at {shown(name)} ({reason(error)}): give each run a "
                "--master-port of its own, and run one version of Cineline on all hosts."
            ) from None


def _asked(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except RuntimeError as error:  # torch's own are of this kind
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InvalidConfig(
            f"torchrun's store at {shown(where)} cannot be reached, or is gone ({reason(error)}): see what rank 0's "
            "host says."
        ) from None


def own_address(host: str, port: int) -> str:
    """This host's address on the way to another one, by its routes; nothing is sent.

    Raises:
        InvalidConfig: there is no way.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InvalidConfig(
            f"There is no route to MASTER_ADDR, {shown(host)} here ({reason(error)}): check the network."
        ) from None
