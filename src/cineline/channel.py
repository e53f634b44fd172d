"""Edges between stages: tensors in one direction, in order, one message a work item.

A message is one or more tensors whose shapes both ends know, so nothing precedes it. Sends never
wait for the receiver (up to `SENDS_UNDERWAY`); a receive is posted ahead of its use.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from cineline.errors import CinelineError, EdgeBroken
from cineline.simulation.actions import SENDS_UNDERWAY

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

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, once they are here."""
        ...

    def release(self) -> None:
        """Give the buffer back for a later receive; the tensors must not be used any more."""
        ...


class Sender(Protocol):
    """The near end of an edge."""

    def send(self, tensors: Sequence[torch.Tensor], kind: str | None = None) -> None:
        """Send a message. The tensors must not be written to afterwards.

        Args:
            kind: what it is counted as, if not as the edge's own kind.
        """
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


@dataclass(frozen=True)
class Edges:
    """A stage's ends of the edges it is joined to; None where it has none.

    Attributes:
        forward_in, forward_out: from the stage before, to the stage after.
        return_in: on the head, latents from the tail.
        return_out: on the tail, latents to the head; with CFG parallelism to the heads of both lines.
        loop_in, loop_out: from a line's tail to its head, embeddings of prompts, and latents to be decoded.
        handover_in, handover_out: with split experts, latents from the first expert's tail to the second's head(s).
        history_in, history_out: the same with the solver's history, to the second's tail.
        guidance_in, guidance_out: with CFG parallelism the second branch's prediction, from its tail to the first's.
    """

    forward_in: Receiver | None = None
    forward_out: Sender | None = None
    return_in: Receiver | None = None
    return_out: tuple[Sender, ...] = ()
    loop_in: Receiver | None = None
    loop_out: Sender | None = None
    handover_in: Receiver | None = None
    handover_out: tuple[Sender, ...] = ()
    history_in: Receiver | None = None
    history_out: Sender | None = None
    guidance_in: Receiver | None = None
    guidance_out: Sender | None = None


class LocalChannel:
    """Both ends of an edge inside one process: a stage's edge to itself, and tests.

    As on any edge, the n-th receive that is posted gets the n-th message that is sent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: deque[tuple[torch.Tensor, ...]] = deque()
        self._posted: deque[_LocalPending] = deque()

    def send(self, tensors: Sequence[torch.Tensor], kind: str | None = None) -> None:
        with self._lock:
            self._sent.append(tuple(tensors))
            self._match()

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        pass  # a message is the sender's own tensors

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        pending = _LocalPending(specs)
        with self._lock:
            self._posted.append(pending)
            self._match()
        return pending

    def _match(self) -> None:
        while self._sent and self._posted:
            self._posted.popleft().message.set_result(self._sent.popleft())


class _LocalPending:
    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = [TensorSpec(tuple(spec.shape), spec.dtype) for spec in specs]
        self.message: Future[tuple[torch.Tensor, ...]] = Future()

    def wait(self) -> tuple[torch.Tensor, ...]:
        tensors = self.message.result(WAIT_LIMIT.total_seconds())
        found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if found != self._specs:
            raise CinelineError(f"An edge was sent {found} where {self._specs} was due: the two ends disagree.")
        return tensors

    def release(self) -> None:
        pass


class TorchSender:
    """Sends over `torch.distributed`, to one peer.

    Args:
        peer: the receiver's rank in the world.
        group: of these two ranks, used for this edge alone (a backend matches by order).
        staged: copy through host memory first, for a backend that cannot read the device's.
        count: called with the bytes of each message, and its kind where it has one of its own.
    """

    def __init__(
        self,
        peer: int,
        group: dist.ProcessGroup,
        staged: bool,
        count: Callable[[int, str | None], None] | None = None,
    ) -> None:
        self._count = count
        self._peer = peer
        self._group = group
        self._staged = staged
        self._underway: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensors: Sequence[torch.Tensor], kind: str | None = None) -> None:
        message = _pack(tensors)
        if self._staged:
            message = torch.empty_like(message, device="cpu", pin_memory=True).copy_(message)
        try:
            work = dist.isend(message, self._peer, group=self._group)
        except RuntimeError as error:
            raise EdgeBroken(f"the edge to rank {self._peer} broke ({error})") from None
        assert work is not None
        if self._count:
            self._count(message.numel(), kind)
        self._underway.append((work, message))
        if len(self._underway) > SENDS_UNDERWAY:
            _wait(self._underway.popleft()[0], self._peer)


class TorchReceiver:
    """Receives over `torch.distributed`, from one peer, into buffers that are made once and used again.

    Args: as `TorchSender`'s, and `device`, where the tensors are wanted.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup, device: torch.device, staged: bool) -> None:
        self._peer = peer
        self._group = group
        self._device = device
        self._staged = staged
        self._free: list[torch.Tensor] = []
        self._lent = 0
        self._size = 0

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        self._size = max(self._size, _message_size(specs))
        self._free = [buffer for buffer in self._free if buffer.numel() >= self._size]
        while self._lent + len(self._free) < count:
            self._free.append(self._allocate(self._size))

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        size = _message_size(specs)
        if keep:
            buffer = self._allocate(size)
        else:
            assert size <= self._size, "reserve comes first"
            buffer = self._free.pop() if self._free else self._allocate(self._size)
            self._lent += 1
        try:
            work = dist.irecv(buffer[:size], self._peer, group=self._group)
        except RuntimeError as error:
            raise EdgeBroken(f"the edge from rank {self._peer} broke ({error})") from None
        assert work is not None
        return _TorchPending(self, work, buffer, tuple(specs))

    def take_back(self, buffer: torch.Tensor) -> None:
        """A buffer that was lent; it goes where a larger one has been asked for since."""
        self._lent -= 1
        if buffer.numel() >= self._size:
            self._free.append(buffer)

    def deliver(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Received tensors, where they are wanted."""
        return tuple(tensor.to(self._device) for tensor in tensors) if self._staged else tensors

    def wait(self, work: dist.Work) -> None:
        """Wait for a receive."""
        _wait(work, self._peer)

    def _allocate(self, size: int) -> torch.Tensor:
        where = torch.device("cpu") if self._staged else self._device
        return torch.empty(size, dtype=torch.uint8, device=where, pin_memory=self._staged)


class _TorchPending:
    def __init__(
        self, receiver: TorchReceiver, work: dist.Work, buffer: torch.Tensor, specs: tuple[TensorSpec, ...]
    ) -> None:
        self._receiver = receiver
        self._work = work
        self._buffer = buffer
        self._specs = specs

    def wait(self) -> tuple[torch.Tensor, ...]:
        self._receiver.wait(self._work)
        return self._receiver.deliver(_unpack(self._buffer, self._specs))

    def release(self) -> None:
        self._receiver.take_back(self._buffer)


def _wait(work: dist.Work, peer: int) -> None:
    try:
        work.wait()  # as long as the group's limit; one given here would make NCCL block the host
    except RuntimeError as error:
        raise EdgeBroken(f"the edge to or from rank {peer} broke ({error})") from None


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
