"""Edges between stages: tensors in one direction, in order, one message a work item.

A message is one or more tensors whose shapes both ends know, so nothing precedes it. Sends never
wait for the receiver (up to `SENDS_UNDERWAY`); a receive is posted ahead of its use.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from cineline.schedule.words import SENDS_UNDERWAY, Edge, Value
from cineline.transport.axis import Traffic, broken_by
from cineline.transport.queue import DeviceQueue, Mark

WAIT_LIMIT = timedelta(hours=2)
"""Last limit of a wait for a tensor; a peer's death is noticed through its process long before."""

ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Pending(Protocol):
    """A posted receive."""

    tensors: tuple[torch.Tensor, ...]
    """Once they have been waited for."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, once they are here; not to be called twice."""
        ...

    def release(self) -> None:
        """Nothing needs it (any more): its buffer may be used again, as soon as the message is in it."""
        ...


class Sender(Protocol):
    """The near end of an edge."""

    def send(self, tensors: Sequence[torch.Tensor], value: Value) -> None:
        """Send a message, which is this value. The tensors must not be written to afterwards."""
        ...

    def settle(self) -> None:
        """Wait until all messages are sent."""
        ...


class Receiver(Protocol):
    """The far end of an edge."""

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        """Have `count` buffers that are large enough for such a message."""
        ...

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        """Get ready for the next message, whose tensors have these shapes.

        Its buffer is one of those reserved and wants to be released, or (`keep`) a new one.
        """
        ...

    def settle(self) -> None:
        """Wait until the messages are here that nobody wants any more."""
        ...


@dataclass(frozen=True)
class Edges:
    """A rank's ends of the edges it is joined to."""

    incoming: Mapping[Edge, Receiver]
    outgoing: Mapping[Edge, Sender]

    def settle(self) -> None:
        """Leave nothing under way; when all ranks do, nobody waits for ever."""
        for sender in self.outgoing.values():
            sender.settle()
        for receiver in self.incoming.values():
            receiver.settle()


class TorchSender:
    """Sends over `torch.distributed`, to one peer.

    Args:
        peer: the receiver's rank in the world.
        group: of these two ranks, used for this edge alone (a backend matches by order).
        device: the queue of the device where the tensors are.
        staged: copy to the host's memory first, for a backend that cannot read the device's.
        traffic: where the bytes of each message are counted, by what it is.
    """

    def __init__(
        self, peer: int, group: dist.ProcessGroup, device: DeviceQueue, staged: bool, traffic: Traffic
    ) -> None:
        self._traffic = traffic
        self._device = device
        self._peer, self._place = peer, dist.get_group_rank(group, peer)
        self._group = group  # used without the wrappers of `dist`, which take a tenth of a millisecond
        self._staged = staged
        self._underway: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._free: list[torch.Tensor] = []

    def send(self, tensors: Sequence[torch.Tensor], value: Value) -> None:
        message = memory = _pack(tensors)
        size = message.numel()
        if self._staged:
            memory = self._host_memory(size)
            message = self._device.to_host(message, memory[:size])
            self._device.mark().synchronize()
        with _edge(self._peer):
            work = self._group.send([message], self._place, 0)
        self._traffic[value.value] += size
        self._underway.append((work, memory))
        if len(self._underway) > SENDS_UNDERWAY:
            self._end_oldest()

    def settle(self) -> None:
        while self._underway:
            self._end_oldest()

    def _end_oldest(self) -> None:
        work, memory = self._underway.popleft()
        with _edge(self._peer):
            work.wait()
        if self._staged:
            self._free.append(memory)

    def _host_memory(self, size: int) -> torch.Tensor:
        """Memory of a send that is done; if that is too small, more, and it is given up."""
        memory = self._free.pop() if self._free else None
        return memory if memory is not None and memory.numel() >= size else self._device.host_memory(size)


class TorchReceiver:
    """Receives over `torch.distributed`, from one peer, into buffers that are made once and used again.

    Args: as `TorchSender`'s; the tensors are wanted on the queue's device.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup, device: DeviceQueue, staged: bool) -> None:
        self._peer, self._place = peer, dist.get_group_rank(group, peer)
        self._group = group  # used without the wrappers of `dist`, which take a tenth of a millisecond
        self._device = device
        self._staged = staged
        self._free: deque[tuple[torch.Tensor, Mark]] = deque()
        self._lent = 0
        self._size = 0
        self._posts = 0
        self._dropped: deque[_TorchPending] = deque()

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        self._size = max(self._size, _message_size(specs))
        self._free = deque((buffer, mark) for buffer, mark in self._free if buffer.numel() >= self._size)
        while self._lent + len(self._free) < count:
            self._free.append(self._allocate(self._size))

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        size = _message_size(specs)
        if keep:
            buffer, free = self._allocate(size)
        else:
            assert size <= self._size, "reserve comes first"
            buffer, free = self._free.popleft() if self._free else self._allocate(self._size)
            self._lent += 1
        with _edge(self._peer):
            work = self._device.receive(lambda: self._group.recv([buffer[:size]], self._place, 0), free)
        self._posts += 1
        return _TorchPending(self, self._posts, work, buffer, tuple(specs), keep)

    def wait(self, pending: _TorchPending) -> tuple[torch.Tensor, ...]:
        """Its message. The edge is in order: what was due before and is not wanted any more is here, too."""
        with _edge(self._peer):
            self._device.arrived(pending.work)
        self._take_in_dropped(pending.number)
        message = pending.buffer[: _message_size(pending.specs)]
        return _unpack(self._device.to_device(message) if self._staged else message, pending.specs)

    def settle(self) -> None:
        self._take_in_dropped(self._posts + 1)

    def _take_in_dropped(self, before: int) -> None:
        with _edge(self._peer):
            while self._dropped and self._dropped[0].number < before:
                self._dropped[0].work.wait()
                self._take_back(self._dropped.popleft())

    def release(self, pending: _TorchPending) -> None:
        """Take its buffer back, later if its message is not here."""
        if pending.tensors:
            self._take_back(pending)
        else:
            self._dropped.append(pending)

    def _take_back(self, pending: _TorchPending) -> None:
        """A buffer that was lent; it goes where a larger one has been asked for since."""
        self._lent -= not pending.kept
        if not pending.kept and pending.buffer.numel() >= self._size:
            self._free.append((pending.buffer, self._device.mark()))

    def _allocate(self, size: int) -> tuple[torch.Tensor, Mark]:
        """A new buffer; its memory may have been another tensor's, which the device has not done with."""
        if self._staged:
            return self._device.host_memory(size), self._device.mark()
        return torch.empty(size, dtype=torch.uint8, device=self._device.device), self._device.mark()


@dataclass(eq=False)
class _TorchPending:
    """The `number`-th receive of an edge."""

    receiver: TorchReceiver
    number: int
    work: dist.Work
    buffer: torch.Tensor
    specs: tuple[TensorSpec, ...]
    kept: bool
    tensors: tuple[torch.Tensor, ...] = ()

    def wait(self) -> tuple[torch.Tensor, ...]:
        self.tensors = self.receiver.wait(self)
        return self.tensors

    def release(self) -> None:
        self.receiver.release(self)


def _edge(peer: int) -> AbstractContextManager[None]:
    """What goes wrong inside is the edge's. The backend's limit is `WAIT_LIMIT`."""
    return broken_by(f"the edge to or from rank {peer}")


def _message_size(specs: Sequence[TensorSpec]) -> int:
    return sum(_padded(spec.nbytes) for spec in specs)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors as one row of bytes, each at a multiple of `ALIGNMENT`."""
    rows = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    if len(rows) == 1 and rows[0].numel() % ALIGNMENT == 0:
        return rows[0]
    message = torch.zeros(sum(_padded(row.numel()) for row in rows), dtype=torch.uint8, device=rows[0].device)
    start = 0
    for row in rows:
        message[start : start + row.numel()] = row
        start += _padded(row.numel())
    return message


def _unpack(message: torch.Tensor, specs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
    tensors = []
    start = 0
    for spec in specs:
        tensors.append(message[start : start + spec.nbytes].view(spec.dtype).view(spec.shape))
        start += _padded(spec.nbytes)
    return tuple(tensors)
