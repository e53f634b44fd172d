"""The words of a schedule: what a rank does for a work item is a list of actions (no torch)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from cineline.request import WorkItem

RECEIVES_AHEAD = 2
"""Receives posted ahead of their use, so that tensors travel while the stage computes."""

SENDS_UNDERWAY = 2
"""Sends that may be unfinished on an edge before the sender waits for the oldest one; each keeps its tensors alive."""


class Edge(NamedTuple):
    """A one-way connection of two ranks: those of `mesh.edges_of`, and "loop" from a line's tail to its head."""

    kind: str
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.kind} edge {self.source}-{self.target}"


@dataclass(frozen=True)
class Message:
    """On an edge; `item` is the one that sends it."""

    edge: Edge
    item: WorkItem


class Post(Message):
    """Get ready for the edge's next message, which should be this one."""


class Wait(Message):
    """Until this message is here."""


class Send(Message):
    """Put it on the edge."""


@dataclass(frozen=True)
class Meet:
    """Until all of these ranks have come to the same collective."""

    ranks: tuple[int, ...]
    item: WorkItem
    name: str


class Do(enum.Enum):
    """What a rank does by itself. START: what the item needs first is here. COMPUTE: its own time. The engine hears
    that the item has begun (BEGUN), that its turn is done (DONE), or done and the request goes on in another group
    of stages (MOVES). FORGET: the request is over on this rank."""

    START = 0
    COMPUTE = 1
    BEGUN = 2
    DONE = 3
    MOVES = 4
    FORGET = 5


Action = Post | Wait | Send | Meet | Do


@dataclass(frozen=True)
class Script:
    """One item on one rank.

    Attributes:
        item: with the branch that this rank's line runs.
        ahead: receives posted when the item is looked at, `RECEIVES_AHEAD` at most before its turn.
        run: what is done when it is its turn, in order.
    """

    item: WorkItem
    ahead: tuple[Post, ...]
    run: tuple[Action, ...]

    @property
    def executed(self) -> bool:
        """Whether there is something to compute, as opposed to a step of other stages that is only followed."""
        return Do.COMPUTE in self.run
