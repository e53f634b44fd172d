"""Receive buffers over a backend that is only pretended: what is lent comes back, once its message is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cineline.transport.channel import TensorSpec, TorchReceiver
from cineline.transport.queue import HostQueue

SPECS = (TensorSpec((16,), torch.float32),)


class Work:
    """A receive: its message, the n-th of the edge, is in the buffer when it is waited for."""

    def __init__(self, buffer: torch.Tensor, number: int) -> None:
        self.buffer, self.number, self.waits = buffer, number, 0

    def wait(self) -> None:
        self.waits += 1
        assert self.waits == 1, "waited for twice"
        self.buffer.view(torch.float32).fill_(self.number)


class Group:
    def __init__(self) -> None:
        self.works: list[Work] = []

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        self.works.append(Work(tensors[0], len(self.works)))
        return self.works[-1]


Edge = tuple[TorchReceiver, Group]


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch) -> Edge:
    monkeypatch.setattr("torch.distributed.get_group_rank", lambda group, peer: 0)
    group: Any = Group()
    receiver = TorchReceiver(0, group, HostQueue(), staged=False)
    receiver.reserve(SPECS, 2)
    return receiver, group


def test_a_buffer_is_used_again_when_it_is_given_back(edge: Edge) -> None:
    receiver, group = edge
    first = receiver.post(SPECS)
    assert first.wait()[0].tolist() == [0.0] * 16
    first.release()
    receiver.post(SPECS)
    second = receiver.post(SPECS)
    buffers = {work.buffer.data_ptr() for work in group.works}
    assert len(buffers) == 2
    assert second.wait()[0][0] == 2


def test_a_dropped_receive_keeps_its_buffer_until_a_later_one_is_here(edge: Edge) -> None:
    receiver, group = edge
    dropped, wanted = receiver.post(SPECS), receiver.post(SPECS)
    dropped.release()
    third = receiver.post(SPECS)  # a buffer of its own: the first message may still come
    assert group.works[2].buffer.data_ptr() not in {work.buffer.data_ptr() for work in group.works[:2]}
    assert wanted.wait()[0][0] == 1
    assert group.works[0].waits == 1
    receiver.post(SPECS)
    assert group.works[3].buffer.data_ptr() == group.works[0].buffer.data_ptr()
    assert third.wait()[0][0] == 2


def test_what_is_kept_is_never_lent(edge: Edge) -> None:
    receiver, group = edge
    kept = receiver.post(SPECS, keep=True)
    kept.release()  # dropped before it came
    lent = [receiver.post(SPECS) for _ in range(2)]
    assert [pending.wait()[0][0].item() for pending in lent] == [1, 2]
    for pending in lent:
        pending.release()
    receiver.reserve(SPECS, 2)
    addresses = {work.buffer.data_ptr() for work in group.works[1:3]}
    again = [receiver.post(SPECS) for _ in range(2)]
    assert {work.buffer.data_ptr() for work in group.works[3:]} == addresses
    assert all(pending.wait()[0].numel() == 16 for pending in again)


def test_larger_messages_get_larger_buffers(edge: Edge) -> None:
    receiver, _ = edge
    old = receiver.post(SPECS)
    larger = (TensorSpec((3, 50), torch.float32),)
    receiver.reserve(larger, 2)
    assert receiver.post(larger).wait()[0].shape == (3, 50)
    old.wait()
    old.release()  # too small by now
    assert receiver.post(larger).wait()[0].shape == (3, 50)
