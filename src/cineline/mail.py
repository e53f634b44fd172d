"""Receives that outlive the items that posted them: latents on their way back, and others that a drop may overtake."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cineline.channel import Pending, Receiver, TensorSpec


class Mail:
    """One edge whose messages may be of no use any more when they come, because their request was dropped.

    Both ends follow the stream, so a receive is posted even where a drop comes before its use; its buffer
    must live until the message is in it. The edge is in order: with a message, those due before are here.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._posts = 0
        self._dropped: deque[tuple[int, Pending]] = deque()

    def post(self, specs: Sequence[TensorSpec]) -> Letter:
        """The next message's receive."""
        self._posts += 1
        return Letter(self, self._posts, self.receiver.post(specs))

    def reap(self, before: int) -> None:
        """Give back the buffers of dropped messages that were due before that one."""
        while self._dropped and self._dropped[0][0] < before:
            pending = self._dropped.popleft()[1]
            pending.wait()
            pending.release()

    def drop(self, number: int, pending: Pending) -> None:
        """Keep a receive, the `number`-th, that nobody wants any more, until its message is here."""
        self._dropped.append((number, pending))


@dataclass
class Letter:
    """A posted receive on such an edge."""

    mail: Mail
    number: int
    pending: Pending
    is_here: bool = False

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The message, once it is here."""
        tensors = self.pending.wait()
        self.is_here = True
        self.mail.reap(self.number)
        return tensors

    def release(self) -> None:
        """Give the buffer back."""
        self.pending.release()

    def drop(self) -> None:
        """Nobody wants it any more; a receive must not be waited for twice."""
        if self.is_here:
            self.release()
        else:
            self.mail.drop(self.number, self.pending)
