"""Faults that are planted in ranks on a pretended device: each must be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pretended_device import DeviceTensor
from torch import Tensor

from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Job
from cineline.families.wan.experts import Experts
from cineline.families.wan.stages import WanStages
from cineline.families.wan.state import WanState
from cineline.rank.loop import StageLoop
from cineline.transport import queue
from cineline.transport.channel import TorchReceiver


def _no_join() -> None:
    """A receive's wait is not made known to the compute stream."""

    def arrived(self: queue.AcceleratorQueue, work: dist.Work) -> None:
        with self._aside:
            work.wait()

    queue.AcceleratorQueue.arrived = arrived  # type: ignore[method-assign]


def _one_buffer() -> None:
    """All receives of an edge go into the same memory."""
    allocate = TorchReceiver._allocate

    def shared(self: Any, size: int) -> tuple[Tensor, queue.Mark]:
        known = vars(self).setdefault("only", None)
        if known is None or known[0].numel() < size:
            self.only = allocate(self, size)
        only: tuple[Tensor, queue.Mark] = self.only
        return only

    TorchReceiver._allocate = shared  # type: ignore[method-assign]


def _tensor_of_the_host() -> None:
    """Rotary embeddings that were left on the host reach a block."""
    admit = WanStages.admit

    def admit_with_host_rotary(self: WanStages, job: Job, image: KeyFrames | None) -> WanState:
        state = admit(self, job, image)
        state.rotary = state.rotary[0].cpu(), state.rotary[1].cpu()
        return state

    WanStages.admit = admit_with_host_rotary  # type: ignore[method-assign]


def _read_in_a_forward() -> None:
    run = Experts.run

    def run_and_look(self: Experts, state: WanState, step: int, branch: Branch, hidden: Tensor) -> Tensor:
        hidden = run(self, state, step, branch, hidden)
        assert hidden.isfinite().all()
        return hidden

    Experts.run = run_and_look  # type: ignore[method-assign]


def _synchronise_the_device() -> None:
    execute = StageLoop._execute

    def execute_and_wait(self: StageLoop, turn: Any) -> None:
        execute(self, turn)
        torch.accelerator.synchronize()

    StageLoop._execute = execute_and_wait  # type: ignore[method-assign]


def _give_up_early() -> None:
    """Host memory is given back while the device still copies from it, and taken for the next message."""
    take_back = TorchReceiver._take_back

    def to_device(self: queue.AcceleratorQueue, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def take_back_first(self: TorchReceiver, pending: Any) -> None:
        take_back(self, pending)
        self._free.rotate(1)

    queue.AcceleratorQueue.to_device = to_device  # type: ignore[method-assign]
    TorchReceiver._take_back = take_back_first  # type: ignore[method-assign]


def _send_early() -> None:
    """A copy to the host is sent, or reported, before it is there."""
    queue.AcceleratorQueue.mark = lambda self: queue._PASSED  # type: ignore[method-assign]


def _free_early() -> None:
    """Memory of the stream beside is not said to be used by the compute stream."""
    DeviceTensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "no join on wait": _no_join,
    "one receive buffer": _one_buffer,
    "tensor of the host in a block": _tensor_of_the_host,
    "host read in a forward": _read_in_a_forward,
    "device-wide synchronisation": _synchronise_the_device,
    "host memory used again early": _give_up_early,
    "host memory sent early": _send_early,
    "host memory reported early": _send_early,
    "memory freed early": _free_early,
}
