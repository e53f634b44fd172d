"""The words of a script: what a rank does for a work item is a list of actions (no torch)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from cineline.core.request import Value as Value
from cineline.core.request import WorkItem

RECEIVES_AHEAD = 2
"""Items whose receives are posted before the first of them is executed: tensors travel while the stage computes."""

SENDS_UNDERWAY = 2
"""Sends that may be unfinished on an edge before the sender waits for the oldest one; each keeps its tensors alive."""


class Way(enum.Enum):
    """What an edge is for: AHEAD, what the target needs for the same group of items; BACK, for a later one."""

    AHEAD = "ahead"
    BACK = "back"


class Edge(NamedTuple):
    """A one-way connection of two ranks, with a communicator of its own.

    Over one that leads ahead the receive is posted when the target looks at the item, over one that leads back when
    the target is through with the item that makes the message. Both follow the stream, so that each edge has one
    order, whatever travels over it.
    """

    way: Way
    source: int
    target: int

    def __str__(self) -> str:
        return f"edge {self.way.value} {self.source}-{self.target}"


@dataclass(frozen=True, slots=True)
class Message:
    """A value on an edge; `item` is the one that makes it."""

    edge: Edge
    item: WorkItem
    value: Value


class Post(Message):
    """Get ready for the edge's next message, which should be this one."""


class Wait(Message):
    """Until this message is here."""


class Send(Message):
    """Put it on the edge."""


class Keep(Message):
    """It is for this rank itself."""


class Free(Message):
    """Nothing needs it any more: its buffer may be used again."""


@dataclass(frozen=True, slots=True)
class Meet:
    """Until all of these ranks have come to the same collective."""

    ranks: tuple[int, ...]
    item: WorkItem
    name: str


@dataclass(frozen=True, slots=True)
class Compute:
    """The rank's slice: nothing was handed to it (`starts`), it is the chain's last one (`ends`), or both."""

    starts: bool
    ends: bool


class Do(enum.Enum):
    """What a rank does by itself.

    START: what the item needs is here. FINISH: guidance and solver, at the end of a step. The engine hears that the
    group has begun (BEGUN), that it is done (DONE), or done and the request goes on in another group of stages
    (MOVES). DENOISED: what only denoising needs is freed. FORGET: the request is over on this rank.
    """

    START = 0
    FINISH = 1
    BEGUN = 2
    DONE = 3
    MOVES = 4
    DENOISED = 5
    FORGET = 6


Action = Post | Wait | Send | Keep | Free | Meet | Compute | Do


@dataclass(frozen=True, slots=True)
class Script:
    """One item on one rank.

    Attributes:
        item: with the branch that this rank's line runs.
        ahead: receives posted when the item is looked at.
        run: what is done when it is its turn, in order.
    """

    item: WorkItem
    ahead: tuple[Post, ...]
    run: tuple[Action, ...]

    @property
    def computes(self) -> bool:
        """Whether there is something to compute, as opposed to a step of other stages that is only followed."""
        return any(isinstance(action, Compute) for action in self.run)
