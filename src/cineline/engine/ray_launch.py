"""Ranks on the nodes of a Ray cluster. Ray places and watches them; what they say to the engine goes over
connections of their own, and tensors over torch.distributed.

The ranks of one start have a placement group: a bundle a rank, near to each other where that can be. In each is an
actor (`rank.ray_actor`), which starts the rank's process. They go with the start's end, and whatever ends the engine's
process ends them (Ray's jobs end with their drivers).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from cineline.core.config import DEVICES, DeviceConfig
from cineline.core.extras import need
from cineline.core.hardware import Device
from cineline.engine.hosts import accept
from cineline.engine.launch import END_LIMIT_S, KILL_LIMIT_S, MOST_CALLS, QUIET, RankProcess
from cineline.engine.owned import own
from cineline.engine.torchrun import WORLD
from cineline.errors import InvalidConfig, RankFailed, reason, shown
from cineline.planning.hardware import device_named
from cineline.rank.ray_actor import ENGINE, Node, RankActor, gpu, versions

ADDRESS = "RAY_ADDRESS"
"""Ray's variable that says which cluster."""

NO_CLIENT = "launcher='ray' needs a node of the cluster, and this is Ray's client (ray://): start the engine on a node."

CONNECT_LIMIT_S = 5.0

PLACE_LIMIT_S = 60.0
"""For the cluster to have room for all ranks."""

START_LIMIT_S = 60.0
"""From then on, for their actors to be there."""

CALL_LIMIT_S = 120.0
"""From then on, for the ranks to have called: they load torch first."""

WORDS_LIMIT = 1000
"""Bytes of what it says."""

SETTINGS = ("MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Of a rank's environment, what the engine's alone says (Ray sets some on its nodes); the rest is the node's."""


def connect_ray() -> Any:
    """Ray's module, connected to a cluster: the one that the program uses already, or that `RAY_ADDRESS` names, or the
    last that was started on this machine. It stays connected until the process ends.

    Raises:
        MissingLibrary: there is no Ray. InvalidConfig: there is no cluster, or this machine is no node of it.
    """
    need("ray")
    with _own_end():
        ray: Any = import_module("ray")
    if not ray.is_initialized():
        _check_address(os.environ.get(ADDRESS, ""))
        try:
            with _own_end():
                ray.init("auto", logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InvalidConfig(
                f"launcher='ray' finds no cluster ({reason(error)}): run `ray start --head` here, or `ray start "
                "--address HOST:6379` to join one, or set RAY_ADDRESS."
            ) from None
    if ray.util.client.ray.is_connected():
        raise InvalidConfig(NO_CLIENT)
    return ray


def _check_address(address: str) -> None:
    """Refuse one that nobody answers at, which Ray would call for minutes."""
    if "://" in address:
        raise InvalidConfig(NO_CLIENT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_LIMIT_S).close()
    except (OSError, OverflowError) as error:
        raise InvalidConfig(
            f"{ADDRESS}={shown(address)} cannot be reached ({reason(error)}): give a cluster's, or unset it for "
            "this machine's."
        ) from None


@contextlib.contextmanager
def _own_end() -> Iterator[None]:
    """Ray has the program end by SIGTERM in its own way; it keeps its own here."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_ray(config: DeviceConfig) -> None:
    """Refuse what cannot be placed.

    Raises:
        MissingLibrary: there is no Ray. InvalidConfig: there is no cluster, or Ray does not know the device.
    """
    if config.device not in DEVICES:
        raise InvalidConfig(
            f"launcher='ray' places ranks on {' or '.join(DEVICES)}, not on device={shown(config.device)}: use one of "
            "these, or another launcher."
        )
    connect_ray()


def ray_devices() -> tuple[Sequence[Device], str]:
    """The cluster's GPUs, with the memory that they report, and the link between them: Ethernet's slowest where there
    are several nodes.

    Raises:
        MissingLibrary, InvalidConfig: as `connect_ray`; there is no GPU, one that is not in the planner's table, or
            none free.
    """
    ray = connect_ray()
    nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(gpu).options(num_cpus=0, num_gpus=1)
    try:
        found = ray.get([ask.remote() for _ in range(int(sum(nodes)))], timeout=PLACE_LIMIT_S)
    except ray.exceptions.RayError as error:
        raise InvalidConfig(
            f"replicas='auto' cannot ask the cluster's GPUs what they are ({reason(error)}): give axes and a number."
        ) from None
    if not found:
        raise InvalidConfig("replicas='auto' plans for GPUs, and the Ray cluster has none: give a number of replicas.")
    return [device_named(*each) for each in found], "pcie4" if sum(map(bool, nodes)) == 1 else "ethernet10"


def launch_ray(ranks: int, environment: Mapping[str, str], device: str) -> list[RankProcess]:
    """Place and start all ranks; each has called when this returns.

    Args:
        environment: of which they have `SETTINGS`. device: a rank has one GPU with cuda, else a core a thread.

    Raises:
        InvalidConfig: the cluster has no room for them, or another version of what they need.
        RankFailed: one of them could not be started, or has not called.
    """
    bundle = {"GPU": 1.0} if device == "cuda" else {"CPU": float(environment["OMP_NUM_THREADS"])}
    world = _World(connect_ray(), ranks, bundle)
    try:
        return world.start({name: environment[name] for name in SETTINGS if name in environment})
    except BaseException:
        world.end_all()
        raise


@dataclass(kw_only=True)
class _RayRank(RankProcess):
    """A rank whose process is its actor's.

    Attributes:
        world: of the same start.
    """

    world: _World

    def describe_end(self) -> str:
        return self.world.describe_end(self.rank)

    def end(self, deadline: float) -> None:
        self.world.end(self.rank, deadline)


class _World:
    """The ranks of one start.

    Args:
        ray: the module, connected. bundle: what each rank is to have.
    """

    def __init__(self, ray: Any, ranks: int, bundle: Mapping[str, float]) -> None:
        self._ray, self._bundle = ray, bundle
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._ended: list[Any] = []
        self._left = set(range(ranks))
        self._gone_by = math.inf
        self._group = ray.util.placement_group([dict(bundle) for _ in range(ranks)], strategy="PACK")

    def start(self, settings: Mapping[str, str]) -> list[RankProcess]:
        """Place them and have them call; see `launch_ray`."""
        ranks = len(self._left)
        self._place(ranks)
        self._actors = [self._actor(rank) for rank in range(ranks)]
        nodes = self._all([actor.node.remote() for actor in self._actors], START_LIMIT_S)
        _check_versions(nodes)
        key, host = secrets.token_bytes(32), str(self._ray.util.get_node_ip_address())
        with socket.create_server((host, 0), backlog=MOST_CALLS) as server:
            engine = f"{host},{server.getsockname()[1]},{key.hex()}"
            given = {**QUIET, **settings, ENGINE: engine}
            for rank, (actor, node) in enumerate(zip(self._actors, nodes, strict=True)):
                arguments = ["--rank", str(rank), "--ranks", str(ranks), "--host", node.address]
                actor.start.remote(arguments, given, (*WORLD, *SETTINGS))
            self._ended = [actor.wait.remote() for actor in self._actors]
            calls = accept([server], key, ranks, self._look, CALL_LIMIT_S)
        if ranks > 1:
            where = _where(calls[0], nodes[0].address)
            for rank in range(1, ranks):
                with contextlib.suppress(OSError):  # it has gone, which the engine hears next
                    calls[rank].send_bytes(where)
        addresses = [node.address for node in nodes]
        local = [addresses[:rank].count(address) for rank, address in enumerate(addresses)]
        return [_RayRank(rank, local[rank], own(calls[rank]), None, world=self) for rank in range(ranks)]

    def _place(self, ranks: int) -> None:
        if not self._group.wait(PLACE_LIMIT_S):
            ((kind, each),) = self._bundle.items()
            free, there = (
                found.get(kind, 0.0) for found in (self._ray.available_resources(), self._ray.cluster_resources())
            )
            raise InvalidConfig(
                f"The Ray cluster has no room for {ranks} ranks of {each:g} {kind} each after {PLACE_LIMIT_S:.0f} s "
                f"({there:g} {kind} in all, {free:g} free): add nodes, or use fewer ranks."
            )

    def _actor(self, rank: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        resources = {"num_cpus": self._bundle.get("CPU", 0.0), "num_gpus": self._bundle.get("GPU", 0.0)}
        return self._ray.remote(RankActor).options(scheduling_strategy=place, max_restarts=0, **resources).remote()

    def _all(self, answers: Sequence[Any], limit_s: float) -> list[Any]:
        """What the actors answer, by rank."""
        deadline, found = time.monotonic() + limit_s, []
        for rank, answer in enumerate(answers):
            try:
                found.append(self._ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
            except self._ray.exceptions.GetTimeoutError:
                cause = f"its actor did not answer within {limit_s:.0f} s (its node may be lost)"
                raise RankFailed(rank, cause) from None
            except self._ray.exceptions.RayError as error:
                raise RankFailed(rank, f"its actor could not be started ({reason(error)})") from None
        return found

    def _look(self, met: Collection[int]) -> None:
        for rank in self._left - set(met):
            if self._has_ended(rank):
                raise RankFailed(rank, f"{self.describe_end(rank)} before it called the engine")

    def _has_ended(self, rank: int, limit_s: float = 0.0) -> bool:
        return bool(self._ray.wait([self._ended[rank]], timeout=max(0.0, limit_s))[0])

    def describe_end(self, rank: int) -> str:
        """How a rank's process ended, in words."""
        if self._ray.is_initialized() and not self._has_ended(rank, END_LIMIT_S):
            return "its connection closed while the process went on"
        try:
            code = self._ray.get(self._ended[rank]) if self._ray.is_initialized() else None
        except self._ray.exceptions.RayError:
            code = None
        if code is None:
            return "its actor is gone: it was killed, or its node is lost"
        if code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def end(self, rank: int, deadline: float) -> None:
        """See to it that a rank's process is gone soon after `deadline` (`time.monotonic`), and what it had is free."""
        if not self._ray.is_initialized():  # the program has left the cluster, and they with it
            return
        if rank < len(self._ended):
            self._has_ended(rank, deadline - time.monotonic())
        if rank < len(self._actors):
            self._ray.kill(self._actors[rank])
            self._gone_by = min(self._gone_by, time.monotonic() + KILL_LIMIT_S)
        if rank < len(self._ended):
            self._has_ended(rank, self._gone_by - time.monotonic())  # of a node that is lost Ray hears later
        with self._lock:
            was_left, self._left = bool(self._left), self._left - {rank}
            if was_left and not self._left:
                self._ray.util.remove_placement_group(self._group)

    def end_all(self) -> None:
        """The same of all, at once."""
        for rank in sorted(self._left):
            self.end(rank, 0.0)


def _where(rank: Connection, host: str) -> bytes:
    """Of the rendezvous that rank 0 has opened on its host, for the others.

    Raises:
        RankFailed: it has not said so.
    """
    try:
        if rank.poll(CALL_LIMIT_S):
            return json.dumps({"host": host, "port": json.loads(rank.recv_bytes(WORDS_LIMIT))}).encode()
    except (EOFError, OSError, ValueError):
        pass
    raise RankFailed(0, "it has not opened the ranks' rendezvous")


def _check_versions(nodes: Sequence[Node]) -> None:
    """Refuse nodes with other libraries than the engine's, which would fail later, or give other bits.

    Raises:
        InvalidConfig: there is one.
    """
    here = versions()
    for node in nodes:
        for name, version in here.items():
            if node.versions[name] != version:
                raise InvalidConfig(
                    f"Node {node.address} of the Ray cluster has {name} {node.versions[name]}, and the engine "
                    f"{version}: install the same on all nodes."
                )
