"""A component of a model on one rank: text encoder, experts, decoder, what conditions them."""

from __future__ import annotations

from typing import Protocol, TypeVar

from cineline.core.request import WorkItem
from cineline.families.pipeline_parallel import RequestState

PartState = TypeVar("PartState", bound=RequestState, contravariant=True)


class Part(Protocol[PartState]):
    """A chain of units (layers, blocks) of which this rank holds those of its stage's cut, maybe none.

    It is made of the family's spec and the rank's `StagePart`, and reads its own weights then, and no others.
    """

    bytes_read: int
    """Of the weights."""

    def compute(self, state: PartState, item: WorkItem, starts: bool, ends: bool) -> None:
        """The rank's units over an item of its kind, as `PipelineParallelMixin.compute`."""
        ...
