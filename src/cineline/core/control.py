"""What the engine and a rank say to each other, beside the tensors.

One ordered connection joins the engine to each rank. A group of work items travels as a header of fixed size, all else
as data of the classes below (`codec`): what a rank says can be nothing else, and runs no code in the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import get_args

import numpy as np

from cineline.core.codec import Codec
from cineline.core.config import Cut, DeviceConfig, ParallelConfig
from cineline.core.family import FamilySpec
from cineline.core.faults import Fault
from cineline.core.image import KeyFrames
from cineline.core.lora import Lora
from cineline.core.request import Branch, Group, Job, Kind, Remembered, WorkItem
from cineline.core.trace import Slice
from cineline.errors import CinelineError, reason, shown

BEAT_EVERY_S = 0.5
"""From one beat of a rank to the next, whatever it does."""

MESSAGE_LIMIT = 2**30
"""Bytes of a message; more is taken for what is none."""


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
        snapshot_every: solver steps of a request from one snapshot to the next; 0 for none.
        address: under torchrun, that of this rank's host at which others reach it.
        identity: of the model on the engine's host, where ranks of others are to have the same.
        live: whether to say the timeline's slices as they come.
    """

    spec: FamilySpec
    rank: int
    parallel: ParallelConfig
    cut: tuple[Cut, ...]
    config: DeviceConfig
    local_rank: int
    store_port: int | None
    trace: bool
    faults: tuple[Fault, ...]
    start: int
    snapshot_every: int = 0
    address: str | None = None
    identity: str | None = None
    live: bool = False


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
    """Engine to rank: a request whose items follow.

    Attributes:
        image: goes to the heads alone.
        resume: `Snapshot.state`, where the job does not begin at its first step.
    """

    job: Job
    image: KeyFrames | None = None
    resume: bytes | None = None


@dataclass(frozen=True)
class Begun:
    """Tail to engine: all that a group's last item needs is here."""

    group: Group


@dataclass(frozen=True)
class Done:
    """Tail to engine: a group of items is done, or a cancelled request is gone.

    Attributes:
        result: latents float32 [C, F', H', W'] with the last step, frames uint8 [F, H, W, 3] with a chunk, a preview
            uint8 [F', H', W', 3] with another step.
        moves: the next step is another group's of stages (split experts).
        spoiled: NaN or infinity came to the tail, so that there is no result; whose it is the rank says that made it.
    """

    group: Group
    result: np.ndarray | None = None
    moves: bool = False
    spoiled: bool = False


@dataclass(frozen=True)
class Spoiled:
    """Rank to engine: in this item its stage made NaN or infinity of what was finite."""

    item: WorkItem
    stage: int


@dataclass(frozen=True)
class Snapshot:
    """The rank that answers to engine, in `Piece`s: the request can begin again here, on any division of the model.

    Any `Done` may come before it, the request's last one too; a newer one takes the place of one that waits, which is
    never said then. With split experts two ranks report, and the later step's may come first.

    Attributes:
        request: the job's id.
        step: steps that are done, the job's `first_step` from here. expert: its `first_expert`.
        state: the family's, the content of a safetensors file.
    """

    request: int
    step: int
    expert: int
    state: bytes


@dataclass(frozen=True)
class Piece:
    """A part of a `Snapshot`; other messages may come between two of them, other snapshots' pieces may not.

    Attributes:
        at: bytes of the state before this piece. of: of the whole state.
        content: its bytes from there.
    """

    request: int
    step: int
    expert: int
    at: int
    of: int
    content: bytes


@dataclass(frozen=True)
class Unkept:
    """Rank to engine, once a request: no snapshots of it can be made, and none will follow."""

    request: int
    cause: str


@dataclass(frozen=True)
class Beat:
    """Rank to engine, again and again: it is alive.

    Attributes:
        item: what it computes, in words; empty while it waits, or loads.
        computing_s: seconds since that item began.
        limit_s: seconds that it may take, by the longest of its kind and size so far; None where there was none.
        request: whose turn it is.
        busy_s: seconds that it has computed since it began, all items together.
        since_ns: wall-clock time at which the item began; None while it waits.
    """

    item: str = ""
    computing_s: float = 0.0
    limit_s: float | None = None
    request: int | None = None
    busy_s: float = field(default=0.0, compare=False)
    since_ns: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Slices:
    """Rank to engine, beside its beats: what it has computed since the last time; the slices of its
    `Timeline`, where it keeps one."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Failed:
    """Rank to engine: it raised and ends. `error` is set when it is one of Cineline's own.

    The engine also makes one of the end of a rank's connection.

    Attributes:
        request: the one whose turn it was, where that is known. out_of_memory: for want of it.
    """

    cause: str
    error: CinelineError | None = None
    request: int | None = None
    out_of_memory: bool = False


@dataclass(frozen=True)
class Timeline:
    """Rank to engine, before it ends: its slices, and the bytes it has sent by axis."""

    slices: tuple[Slice, ...]
    traffic: Mapping[str, int]


@dataclass(frozen=True)
class Stop:
    """Engine to rank: do what is under way, hand in the timeline, and end when the connection does."""


Message = (
    Setup
    | StoreOpen
    | Ready
    | Admit
    | Group
    | Begun
    | Done
    | Spoiled
    | Snapshot
    | Piece
    | Unkept
    | Beat
    | Slices
    | Failed
    | Timeline
    | Stop
)

Say = Callable[[Message], None]
"""Has a message sent."""

KeepSnapshot = Callable[[int, Callable[[], Snapshot]], None]
"""Has a request's snapshot sent when nothing else is to be; it is made then, on the sender's thread, unless a newer one
has come."""

_GROUP, _DATA = b"g", b"d"

_OF_THE_ENGINE = (Setup, Admit, Stop)
_OF_RANKS = [kind for kind in get_args(Message) if kind not in _OF_THE_ENGINE]
_IN_THEM = (WorkItem, Kind, Branch, Slice)
_IN_THE_ENGINES = (ParallelConfig, Cut, DeviceConfig, Fault, Job, Remembered, KeyFrames, Lora)

FROM_RANK = Codec([*_OF_RANKS, *_IN_THEM])
"""Reads what ranks say."""

FROM_ENGINE = Codec([*_OF_RANKS, *_OF_THE_ENGINE, *_IN_THEM, *_IN_THE_ENGINES], imports=True)
"""Reads what the engine says, too: a family's own spec and jobs, whose module it names as that of the stages."""


class UnreadableMessage(Exception):
    """What came is no message."""


def pack(message: Message) -> bytes:
    """The message as it travels."""
    return _GROUP + message.pack() if isinstance(message, Group) else _DATA + FROM_ENGINE.encode(message)


def receive(connection: Connection, codec: Codec = FROM_RANK) -> Message:
    """The next message; `codec` reads it.

    Raises:
        EOFError, OSError: the other end is gone.
        UnreadableMessage: it is none.
    """
    try:
        body = connection.recv_bytes(MESSAGE_LIMIT)
    except OSError as error:
        if error.errno is None:  # too long; by then the connection is closed
            raise UnreadableMessage(f"it is over {MESSAGE_LIMIT} bytes") from None
        raise
    try:
        message = Group.unpack(body[1:]) if body[:1] == _GROUP else codec.decode(memoryview(body)[1:])
    except Exception as error:  # whatever the classes of what came may raise
        raise UnreadableMessage(f"{type(error).__name__}: {reason(error)}") from None
    if not isinstance(message, Message):
        raise UnreadableMessage(f"it is {shown(message)}")
    return message
