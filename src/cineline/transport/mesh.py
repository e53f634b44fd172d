"""Ranks, devices, the mesh of axes and the edges between stages.

Every edge has a group, and so a communicator, of its own: a backend matches messages by their order, and the edges
ahead and back may join the same two ranks. What the ranks of one stage do together goes over the groups of the mesh.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from datetime import timedelta
from socket import AF_INET, AF_INET6
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cineline.core.config import AXES, ParallelConfig
from cineline.errors import InvalidConfig, shown
from cineline.schedule.rule import edges_of
from cineline.schedule.words import Edge
from cineline.transport.axis import Traffic
from cineline.transport.channel import WAIT_LIMIT, Edges, Receiver, Sender, TorchReceiver, TorchSender
from cineline.transport.queue import DeviceQueue

log = logging.getLogger(__name__)

JOIN_LIMIT = timedelta(minutes=30)
"""How long a rank waits for the others at start."""

INTERFACES = "GLOO_SOCKET_IFNAME"
"""The variable that says over which interfaces gloo talks."""

EDGE_CTAS = 2
"""Thread blocks of NCCL on an edge: one a multiprocessor, each good for some 20 GB/s (not measured here)."""


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
            f"device={shown(name)}: torch {torch.__version__} finds {here} here as an accelerator: use --device cpu."
        )
    device = torch.device(name, local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device.index)
    return device


def identity(device: torch.device) -> str:
    """What no other device is called, by whatever number a rank sees it (with `CUDA_VISIBLE_DEVICES` all may be 0);
    where torch tells no UUID the host's name and that number."""
    ask = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    unique = getattr(ask(device), "uuid", None) if ask else None
    return str(unique) if unique else f"{socket.gethostname()}/{device.type}:{device.index}"


def pick_backend(device: torch.device, shared: bool) -> tuple[str, bool]:
    """The backend of torch.distributed, and whether tensors go through host memory: where the device's own
    backend (NCCL, HCCL, XCCL) is missing, or ranks share a device (`shared`), which it does not allow."""
    if device.type == "cpu":
        return "gloo", False
    try:
        own = dist.get_default_backend_for_device(device)
    except ValueError:  # torch knows of none
        own = "gloo"
    if own != "gloo" and dist.is_backend_available(own) and not shared:
        return own, False
    return "gloo", True


def choose_backend(store: Store, rank: int, parallel: ParallelConfig, device: torch.device) -> tuple[str, bool]:
    """What `pick_backend` says once each rank has said in the store which device is its own; rank 0 logs it.

    Raises:
        InvalidConfig: ranks of a stage would have to go through host memory.
    """
    ranks = range(parallel.ranks)
    store.set(f"cineline/device/{rank}", identity(device))
    devices = len({store.get(f"cineline/device/{other}") for other in ranks})
    backend, staged = pick_backend(device, shared=devices < len(ranks))
    if staged and parallel.lanes > 1:
        raise InvalidConfig(
            f"{parallel} needs an accelerator for each rank and its own backend: {len(ranks)} ranks have {devices} "
            f"here, and talk over {backend}, where only pp and cfg work."
        )
    if rank == 0 and device.type != "cpu":
        way = ", through host memory: each message waits for the device" if staged else ""
        level = logging.WARNING if staged else logging.INFO
        log.log(level, "%d ranks on %d devices talk over %s%s.", len(ranks), devices, backend, way)
    return backend, staged


def choose_interface(rank: int, address: str) -> None:
    """Have gloo talk over the interface that has this address of the host's, and say so, unless the environment names
    others."""
    if os.environ.get(INTERFACES):
        return
    named = [name for name, own in psutil.net_if_addrs().items() if address in {one.address for one in own}]
    if named:
        os.environ[INTERFACES] = named[0]
        if not ipaddress.ip_address(address).is_loopback:
            words = f"Rank {rank} talks to the others over {named[0]} ({address}); {INTERFACES} would name another."
            print(words, file=sys.stderr)


def check_interfaces(given: str) -> None:
    """Refuse names of interfaces, separated by commas, over which gloo could reach nobody.

    Raises:
        InvalidConfig: one of them is not there, not up, or without an address.
    """
    up = [name for name, state in psutil.net_if_stats().items() if state.isup]
    addresses = psutil.net_if_addrs()
    usable = [name for name in up if {one.family for one in addresses.get(name, ())} & {AF_INET, AF_INET6}]
    for name in filter(None, given.split(",")):
        if name not in usable:
            raise InvalidConfig(
                f"{INTERFACES}={shown(given)}: {shown(name)} is no network interface that is up and has an address "
                f"(here: {', '.join(usable) or 'none'}): name one that is, or unset it."
            )


def join(
    store: Store | None,
    rank: int,
    parallel: ParallelConfig,
    device: DeviceQueue,
    traffic: Traffic,
) -> tuple[Edges, DeviceMesh | None]:
    """Meet the other ranks; this rank's ends of the edges, and the mesh (None for a single rank).

    Each communicator is used once before it is returned, all in one order on every rank, because a
    backend may connect two ends only when both first use it.

    Args:
        store: the rendezvous; None for a single rank, which has no edges.
        device: the queue of where this rank computes.
        traffic: where the bytes sent over the edges are counted, by what is sent.

    Raises:
        InvalidConfig: ranks of a stage would have to go through host memory, or gloo has no way.
    """
    if parallel.ranks == 1:
        return Edges({}, {}), None
    assert store is not None
    backend, staged = choose_backend(store, rank, parallel, device.device)
    where = torch.device("cpu") if staged else device.device
    if backend == "gloo":
        check_interfaces(os.environ.get(INTERFACES, ""))
    dist.init_process_group(backend, store=store, rank=rank, world_size=parallel.ranks, timeout=WAIT_LIMIT)
    mesh = init_device_mesh(where.type, parallel.sizes, mesh_dim_names=AXES)
    for axis, size in zip(AXES, parallel.sizes, strict=True):
        if size > 1:
            dist.all_reduce(torch.zeros(1, device=where), group=mesh.get_group(axis))
    return _open_edges(rank, parallel, device, staged, traffic), mesh


def _open_edges(rank: int, parallel: ParallelConfig, device: DeviceQueue, staged: bool, traffic: Traffic) -> Edges:
    """This rank's ends of all edges, each with a group of its own that has been used once."""
    incoming: dict[Edge, Receiver] = {}
    outgoing: dict[Edge, Sender] = {}
    for edge in edges_of(parallel):
        group = dist.new_group(
            [edge.source, edge.target], timeout=WAIT_LIMIT, pg_options=edge_options(dist.get_backend())
        )
        if rank not in (edge.source, edge.target):
            continue
        assert isinstance(group, dist.ProcessGroup)
        probe = torch.zeros(1, device="cpu" if staged else device.device)
        if rank == edge.source:
            dist.send(probe, edge.target, group=group)
            outgoing[edge] = TorchSender(edge.target, group, device, staged, traffic)
        else:
            dist.recv(probe, edge.source, group=group)
            incoming[edge] = TorchReceiver(edge.source, group, device, staged)
    return Edges(incoming, outgoing)


def edge_options(backend: str) -> Any:
    """NCCL's receives are posted ahead and wait on the device: they are to hold few of its multiprocessors."""
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas, options._timeout = EDGE_CTAS, WAIT_LIMIT
    return options
