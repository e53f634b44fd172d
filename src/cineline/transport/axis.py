"""What the ranks of one axis do together, and how many bytes each of them sends for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cineline.errors import EdgeBroken

Traffic = Counter[str]
"""Bytes sent by this rank, by axis."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def broken_by(what: str) -> Iterator[None]:
    """What goes wrong inside is a neighbour's end, but for this rank's own device, which may say here what went wrong
    before.

    Raises:
        EdgeBroken: with `what` broke.
    """
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise EdgeBroken(f"{what} broke ({error})") from None


def _together(meet: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @wraps(meet)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with broken_by("what this rank does together with others of its stage"):
            return meet(*args, **kwargs)

    return checked


class Axis:
    """One axis of the mesh, seen from this rank.

    Args:
        mesh: the mesh of all ranks; None for a world of one.
        name: of the axis.
        traffic: where its bytes are counted.

    Attributes:
        size: ranks on it. index: this one's number among them.
    """

    def __init__(self, mesh: DeviceMesh | None, name: str, traffic: Traffic) -> None:
        self.name = name
        self.size = 1 if mesh is None else mesh[name].size()
        self.index = 0 if mesh is None else mesh.get_local_rank(name)
        self._group = None if self.size == 1 or mesh is None else mesh.get_group(name)
        self._traffic = traffic

    def share(self, total: int) -> list[int]:
        """That many things shared out as evenly as can be, in order: how many each rank gets."""
        return [total // self.size + (index < total % self.size) for index in range(self.size)]

    @_together
    def all_to_all(self, sent: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """Rows [sum of send_sizes, ...] to the ranks in order; the rows they sent here, [sum of receive_sizes, ...]."""
        if self.size == 1:
            return sent
        received = sent.new_empty(sum(receive_sizes), *sent.shape[1:])
        dist.all_to_all_single(received, sent.contiguous(), list(receive_sizes), list(send_sizes), group=self._group)
        own = send_sizes[self.index]
        self._count(sent.nbytes * (sum(send_sizes) - own) // max(1, sum(send_sizes)))
        return received

    @_together
    def all_reduce(self, summand: Tensor) -> Tensor:
        """The sum over the ranks, in place. Counted as a ring's: 2 (n - 1) / n of the tensor."""
        if self.size > 1:
            dist.all_reduce(summand, group=self._group)
            self._count(2 * (self.size - 1) * summand.nbytes // self.size)
        return summand

    @_together
    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows [sizes[i], ...] of each rank i, one after another. What is sent is as long as the longest."""
        if self.size == 1:
            return own
        longest = max(sizes)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        self._count(padded.nbytes * (self.size - 1))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @_together
    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """That rank's tensor, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self._group, group_src=source)
            self._count(tensor.nbytes if self.index == source else 0)
        return tensor

    @_together
    def pass_on(self, sent: Tensor, received: Tensor) -> list[dist.Work]:
        """Start to send to the next rank and to receive from the one before."""
        assert self._group is not None
        following, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        self._count(sent.nbytes)
        operations = [
            dist.P2POp(dist.isend, sent, group=self._group, group_peer=following),
            dist.P2POp(dist.irecv, received, group=self._group, group_peer=before),
        ]
        return dist.batch_isend_irecv(operations)

    @_together
    def exchange(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> None:
        """Tensors to other ranks, and from others into these (contiguous) ones; each by the rank's number here.

        Both ends of a pair exchange in the same order. Returns when all is here and gone.
        """
        assert self._group is not None
        # Gloo's messages go through host memory.
        staged = dist.get_backend(self._group) == "gloo" and any(
            tensor.device.type != "cpu" for tensor in (*sent.values(), *received.values())
        )
        outgoing = {rank: (tensor.cpu() if staged else tensor).contiguous() for rank, tensor in sent.items()}
        incoming = {
            rank: torch.empty_like(tensor, device="cpu") if staged else tensor for rank, tensor in received.items()
        }
        operations = [
            *(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=rank) for rank, tensor in outgoing.items()),
            *(dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=rank) for rank, tensor in incoming.items()),
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for rank, tensor in received.items():
            if incoming[rank] is not tensor:
                tensor.copy_(incoming[rank])
        self._count(sum(tensor.nbytes for tensor in outgoing.values()))

    def _count(self, nbytes: int) -> None:
        self._traffic[self.name] += nbytes
