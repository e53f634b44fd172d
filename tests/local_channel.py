"""An edge inside one process: the in-memory twin of `cineline.transport.channel`'s two ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from cineline.schedule.words import Value
from cineline.transport.channel import Pending, TensorSpec

LIMIT_S = 30.0


class LocalChannel:
    """Both ends of an edge. As on any edge, the n-th receive that is posted gets the n-th message that is sent.

    As strict as gloo: a second wait for the same receive would hang.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: deque[tuple[torch.Tensor, ...]] = deque()
        self._posted: deque[LocalPending] = deque()

    def send(self, tensors: Sequence[torch.Tensor], value: Value) -> None:
        with self._lock:
            self._sent.append(tuple(tensors))
            self._match()

    def reserve(self, specs: Sequence[TensorSpec], count: int) -> None:
        pass  # a message is the sender's own tensors

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        pending = LocalPending(specs)
        with self._lock:
            self._posted.append(pending)
            self._match()
        return pending

    def settle(self) -> None:
        pass  # nothing is ever under way

    def _match(self) -> None:
        while self._sent and self._posted:
            self._posted.popleft().message.set_result(self._sent.popleft())


class LocalPending:
    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = [TensorSpec(tuple(spec.shape), spec.dtype) for spec in specs]
        self._released = False
        self.message: Future[tuple[torch.Tensor, ...]] = Future()
        self.tensors: tuple[torch.Tensor, ...] = ()

    def wait(self) -> tuple[torch.Tensor, ...]:
        assert not self.tensors, "a receive is waited for twice"
        assert not self._released, "a receive is waited for that nobody wanted any more"
        self.tensors = self.message.result(LIMIT_S)
        found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in self.tensors]
        assert found == self._specs, f"an edge was sent {found} where {self._specs} was due"
        return self.tensors

    def release(self) -> None:
        assert not self._released, "a buffer is given back twice"
        self._released = True


class RendezvousChannel(LocalChannel):
    """Sends wait until the other end has posted its receive: the least that any backend does, and so the
    one under which a wrong order of sends and receives is a deadlock."""

    def __init__(self) -> None:
        super().__init__()
        self._posts = threading.Semaphore(0)

    def post(self, specs: Sequence[TensorSpec], keep: bool = False) -> Pending:
        pending = super().post(specs, keep)
        self._posts.release()
        return pending

    def send(self, tensors: Sequence[torch.Tensor], value: Value) -> None:
        assert self._posts.acquire(timeout=LIMIT_S), "deadlock: nobody receives"
        super().send(tensors, value)
