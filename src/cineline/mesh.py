"""Ranks, devices, the mesh of axes and the edges between stages.

Every edge has a group, and so a communicator, of its own: a backend matches messages by their order,
and with two stages both edges join the same two ranks. What the ranks of one stage do together goes
over the groups of the mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cineline.axis import Traffic
from cineline.channel import WAIT_LIMIT, Edges, LocalChannel, Receiver, Sender, TorchReceiver, TorchSender
from cineline.config import AXES, ParallelConfig
from cineline.errors import InvalidConfig

JOIN_LIMIT = timedelta(minutes=30)
"""How long a rank waits for the others at start."""


@dataclass(frozen=True)
class Edge:
    """A one-way connection of two ranks.

    Attributes:
        kind: forward (hidden states), return (latents), loop (embeddings, latents to decode), guidance (the second
            branch's prediction), handover (latents to the second expert's head), history (latents and solver to its
            tail).
        source, target: ranks.
    """

    kind: str
    source: int
    target: int


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
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != name:
        here = "none" if found is None else repr(found.type)
        raise InvalidConfig(
            f"device={name!r}: torch {torch.__version__} finds {here} here as an accelerator: use --device cpu."
        )
    device = torch.device(name, local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device.index)
    return device


def pick_backend(device: torch.device, ranks_on_host: int) -> tuple[str, bool]:
    """The backend of torch.distributed, and whether tensors go through host memory: where the device's own
    backend (NCCL, HCCL, XCCL) is missing, or ranks share a device, which it does not allow."""
    if device.type == "cpu":
        return "gloo", False
    own = dist.get_default_backend_for_device(device)
    if dist.is_backend_available(own) and ranks_on_host <= torch.accelerator.device_count():
        return own, False
    return "gloo", True


def edges_of(parallel: ParallelConfig) -> Iterator[Edge]:
    """All edges, in the one order in which every rank makes them.

    A lane is the ranks of equal ring, ulysses and tp coordinates, one a stage. Each lane of each branch's
    line has the edges of a pipeline; the first line's tails return latents to the heads of both. The loop, from a
    line's last stage to its first, is the first lane's alone.
    """
    for lane in range(parallel.lanes):
        lines = [
            [parallel.rank(replace(parallel.place(lane), cfg=cfg, pp=stage)) for stage in range(parallel.pp)]
            for cfg in range(parallel.cfg)
        ]
        for ranks in lines:
            yield from (Edge("forward", source, target) for source, target in pairwise(ranks))
            for group in parallel.groups:
                yield Edge("return", lines[0][group[-1]], ranks[group[0]])
            for before, after in pairwise(parallel.groups):
                yield Edge("handover", lines[0][before[-1]], ranks[after[0]])
            if lane == 0:
                yield Edge("loop", ranks[-1], ranks[0])
        for group in parallel.groups if parallel.cfg == 2 else ():
            yield Edge("guidance", lines[1][group[-1]], lines[0][group[-1]])
        for before, after in pairwise(parallel.groups):
            yield Edge("history", lines[0][before[-1]], lines[0][after[-1]])


def join(
    store: Store | None,
    rank: int,
    parallel: ParallelConfig,
    device: torch.device,
    ranks_on_host: int,
    traffic: Traffic,
) -> tuple[Edges, DeviceMesh | None]:
    """Meet the other ranks; this rank's ends of the edges, and the mesh (None for a single rank).

    Each communicator is used once before it is returned, all in one order on every rank, because a
    backend may connect two ends only when both first use it.

    Args:
        store: the rendezvous; None for a single rank, whose return and loop lead to itself.
        device: where this rank computes.
        ranks_on_host: how many share this host's devices.
        traffic: where the bytes sent over the edges are counted, by the edge's kind.

    Raises:
        InvalidConfig: ranks of a stage would have to share an accelerator.
    """
    if parallel.ranks == 1:
        return _open_edges(rank, parallel, device, False, traffic), None
    backend, staged = pick_backend(device, ranks_on_host)
    if staged and parallel.lanes > 1:
        raise InvalidConfig(
            f"{parallel} needs an accelerator for each rank and its own backend: {ranks_on_host} ranks have "
            f"{torch.accelerator.device_count()} here, where only pp and cfg work."
        )
    assert store is not None
    dist.init_process_group(backend, store=store, rank=rank, world_size=parallel.ranks, timeout=WAIT_LIMIT)
    mesh = init_device_mesh("cpu" if staged else device.type, parallel.sizes, mesh_dim_names=AXES)
    for axis, size in zip(AXES, parallel.sizes, strict=True):
        if size > 1:
            dist.all_reduce(torch.zeros(1, device="cpu" if staged else device), group=mesh.get_group(axis))
    return _open_edges(rank, parallel, device, staged, traffic), mesh


def _open_edges(rank: int, parallel: ParallelConfig, device: torch.device, staged: bool, traffic: Traffic) -> Edges:
    """This rank's ends of all edges, each with a group of its own that has been used once."""
    incoming: dict[str, Receiver] = {}
    outgoing: dict[str, list[Sender]] = defaultdict(list)
    for edge in edges_of(parallel):
        if edge.source == edge.target:  # a single stage's return
            if rank == edge.source:
                itself = LocalChannel()
                incoming[edge.kind] = itself
                outgoing[edge.kind].append(itself)
            continue
        group = dist.new_group([edge.source, edge.target], timeout=WAIT_LIMIT)
        if rank not in (edge.source, edge.target):
            continue
        assert isinstance(group, dist.ProcessGroup)
        probe = torch.zeros(1, device="cpu" if staged else device)
        if rank == edge.source:
            dist.send(probe, edge.target, group=group)
            outgoing[edge.kind].append(TorchSender(edge.target, group, staged, partial(_count, traffic, edge.kind)))
        else:
            dist.recv(probe, edge.source, group=group)
            incoming[edge.kind] = TorchReceiver(edge.source, group, device, staged)
    return Edges(
        forward_in=incoming.get("forward"),
        forward_out=next(iter(outgoing["forward"]), None),
        return_in=incoming.get("return"),
        return_out=tuple(outgoing["return"]),
        loop_in=incoming.get("loop"),
        loop_out=next(iter(outgoing["loop"]), None),
        handover_in=incoming.get("handover"),
        handover_out=tuple(outgoing["handover"]),
        history_in=incoming.get("history"),
        history_out=next(iter(outgoing["history"]), None),
        guidance_in=incoming.get("guidance"),
        guidance_out=next(iter(outgoing["guidance"]), None),
    )


def _count(traffic: Traffic, edge_kind: str, nbytes: int, kind: str | None) -> None:
    traffic[kind or edge_kind] += nbytes
