"""What the engine and a rank say to each other, beside the tensors.

One ordered connection joins the engine to each rank; its end is how either notices the other's death.
A group of work items travels as a header of fixed size, all else as a pickle of the classes below.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

from cineline.core.config import Cut, DeviceConfig, ParallelConfig
from cineline.core.family import FamilySpec
from cineline.core.faults import Fault
from cineline.core.request import Group, Job
from cineline.core.trace import Slice
from cineline.errors import CinelineError

ENGINE_ADDRESS = "CINELINE_ENGINE"
"""Environment of torchrun's rank 0: host, port and key (hexadecimal) of the engine, separated by commas."""

FORKED = "forked"
"""What the process that forks ranks says when all are there; then it says (number, exit code) of each that ends."""


@dataclass(frozen=True)
class Setup:
    """Engine to rank, first: what it is to be.

    Attributes:
        rank: its number, from 0. parallel: the sizes of the axes. cut: what each stage holds.
        local_rank: its number on its host.
        store_port: of the rendezvous on this host; None tells rank 0 to open one and announce it,
            and is not used under torchrun, which has its own.
        trace: whether to keep a timeline.
        faults: on purpose, of all ranks. start: which start of the ranks this is, from 0.
    """

    spec: FamilySpec
    rank: int
    parallel: ParallelConfig
    cut: tuple[Cut, ...]
    config: DeviceConfig
    local_rank: int
    store_port: int | None
    trace: bool
    faults: tuple[Fault, ...] = ()
    start: int = 0


@dataclass(frozen=True)
class StoreOpen:
    """Rank 0 to engine: the rendezvous is open."""

    port: int


@dataclass(frozen=True)
class Ready:
    """Rank to engine: loaded and joined; `bytes_read` of weights."""

    bytes_read: int


@dataclass(frozen=True)
class Admit:
    """Engine to rank: a request whose items follow; the image goes to the head alone."""

    job: Job
    image: Image.Image | None = None


@dataclass(frozen=True)
class Begun:
    """Tail to engine: all that a group's last item needs is here."""

    group: Group


@dataclass(frozen=True)
class Done:
    """Tail to engine: a group of items is done.

    Attributes:
        result: latents float32 [C, F', H', W'] with the last step, frames uint8 [F, H, W, 3] with a chunk.
        moves: the next step is another group's of stages (split experts).
    """

    group: Group
    result: np.ndarray | None = None
    moves: bool = False


@dataclass(frozen=True)
class Failed:
    """Rank to engine: it raised and ends. `error` is set when it is one of Cineline's own.

    The engine also makes one of the end of a rank's connection.
    """

    cause: str
    error: CinelineError | None = None


@dataclass(frozen=True)
class Timeline:
    """Rank to engine, before it ends: its slices, and the bytes it has sent by axis."""

    slices: tuple[Slice, ...]
    traffic: Mapping[str, int]


@dataclass(frozen=True)
class Stop:
    """Engine to rank: end."""


Message = Setup | StoreOpen | Ready | Admit | Group | Begun | Done | Failed | Timeline | Stop

_GROUP, _PICKLE = b"g", b"p"


def send(connection: Connection, message: Message) -> None:
    """Send one message."""
    body = _GROUP + message.pack() if isinstance(message, Group) else _PICKLE + pickle.dumps(message)
    connection.send_bytes(body)


def receive(connection: Connection) -> Message:
    """The next message.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    body = connection.recv_bytes()
    if body[:1] == _GROUP:
        return Group.unpack(body[1:])
    message: Message = pickle.loads(body[1:])
    return message
