"""Ranks, devices and the edges between stages.

Every edge has a group, and so a communicator, of its own: a backend matches messages by their order,
and with two stages both edges join the same two ranks.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from cineline.channel import WAIT_LIMIT, Edges, LocalChannel, TorchReceiver, TorchSender
from cineline.errors import InvalidConfig

JOIN_LIMIT = timedelta(minutes=30)
"""How long a rank waits for the others at start; they may be loading weights."""


def open_store(port: int | None, ranks: int) -> TCPStore:
    """The rendezvous of ranks on one host: opened on a free port (None), or joined."""
    is_master = port is None
    return TCPStore("127.0.0.1", port or 0, ranks, is_master, JOIN_LIMIT, wait_for_workers=False)


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank: ranks share the accelerators in turn when there are fewer.

    Raises:
        InvalidConfig: torch sees no such device here.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidConfig(f"device={name!r}: torch {torch.__version__} finds no CUDA device here: use --device cpu.")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join(store: Store | None, stage: int, stages: int, device: torch.device, ranks_on_host: int) -> Edges:
    """Meet the other ranks and make this stage's ends of the edges.

    Each communicator is used once before it is returned, all in one order on every rank, because a
    backend may connect two ends only when both first use it.

    Args:
        store: the rendezvous; None with a single stage, whose return edge leads to itself.
        stage, stages: this rank's place in the line.
        device: where it computes.
        ranks_on_host: how many share this host's devices.
    """
    if stages == 1:
        itself = LocalChannel()
        return Edges(return_in=itself, return_out=itself)
    on_gpu = device.type == "cuda"
    nccl = on_gpu and dist.is_nccl_available() and ranks_on_host <= torch.cuda.device_count()
    staged = on_gpu and not nccl
    assert store is not None
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=stage, world_size=stages, timeout=WAIT_LIMIT)
    pairs = [(first, first + 1) for first in range(stages - 1)] + [(stages - 1, 0)]
    senders: dict[tuple[int, int], TorchSender] = {}
    receivers: dict[tuple[int, int], TorchReceiver] = {}
    for source, target in pairs:
        group = dist.new_group([source, target], timeout=WAIT_LIMIT)
        assert isinstance(group, dist.ProcessGroup) or stage not in (source, target)
        probe = torch.zeros(1, device="cpu" if staged else device)
        if stage == source:
            dist.send(probe, target, group=group)
            senders[source, target] = TorchSender(target, group, staged)
        elif stage == target:
            dist.recv(probe, source, group=group)
            receivers[source, target] = TorchReceiver(source, group, device, staged)
    last = stages - 1
    return Edges(
        forward_in=receivers.get((stage - 1, stage)),
        forward_out=senders.get((stage, stage + 1)),
        return_in=receivers.get((last, 0)),
        return_out=senders.get((last, 0)),
    )
