"""Ranks that compute on a pretended device: their processes, the backend between them, and the faults to be planted."""

from __future__ import annotations

import gc
import os
import pickle
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pretended_device as device
import torch
import torch.distributed as dist
from forked_ranks import ForkedRank, _context
from pretended_device import DeviceTensor, inner
from pretended_faults import FAULTS
from pretended_machine import MACHINE, Actor, host_memory, host_reads, labelled
from torch import Tensor

from cineline.core.control import Snapshot
from cineline.families import snapshot
from cineline.rank import worker
from cineline.rank.engine_link import EngineLink
from cineline.rank.loop import StageLoop
from cineline.schedule.words import Compute, Do, Send, Wait
from cineline.transport import queue

BACKEND = "pretended"
POINT_TO_POINT = ("send", "recv")
BETWEEN = "between items"
"""What the host is at when nothing else is said."""

COLLECTIVES = ("allreduce", "allgather", "alltoall_base", "broadcast")


@dataclass(frozen=True)
class Pretence:
    """What ranks are to pretend.

    Attributes:
        folder: where each puts its report.
        way: nccl, a device a rank and its own backend; staged, all ranks on one device, over gloo.
        rehearses: whether the ranks rehearse, as those on a device do.
        snapshot_every: steps, of which ranks keep their snapshots.
        fault: of `FAULTS`.
        kernel_ns, attention_ns, message_ns: how long a kernel takes, one of attention, and a message between ranks.
    """

    folder: Path
    way: Literal["nccl", "staged"] = "nccl"
    rehearses: bool = False
    snapshot_every: int = 0
    fault: str = ""
    kernel_ns: int = 1000
    attention_ns: int = 1000
    message_ns: int = 0


@dataclass(frozen=True)
class Report:
    """What was noticed on a rank.

    Attributes:
        races: in words, and how often. stops: of the host, by what it was at and place.
        counts: by what the host was at, how many stops there were each time, and waits for what was on its way.
        snapshots: that it took.
    """

    races: Counter[str] = field(default_factory=Counter)
    stops: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: Mapping[str, Counter[tuple[int, int]]] = field(default_factory=dict)
    snapshots: Sequence[Snapshot] = ()


def reports_in(folder: Path) -> list[Report]:
    """Of all ranks that have ended by themselves."""
    return [pickle.loads(file.read_bytes()) for file in sorted(folder.glob("*.report"))]


def starter(pretence: Pretence) -> Callable[..., list[tuple[Connection, Any]]]:
    """As `launch.start_ranks`, for ranks that pretend."""

    def start(ranks: int, environment: Mapping[str, str], family: str | None) -> list[tuple[Connection, Any]]:
        return [_fork({"GLOO_SOCKET_IFNAME": "lo", **environment}, pretence, rank, ranks) for rank in range(ranks)]

    return start


def _fork(environment: Mapping[str, str], pretence: Pretence, rank: int, ranks: int) -> tuple[Connection, ForkedRank]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs, environment, pretence, rank, ranks), daemon=True)
    process.start()
    theirs.close()
    return ours, ForkedRank(process)


def _serve(connection: Connection, environment: Mapping[str, str], pretence: Pretence, rank: int, ranks: int) -> None:
    gc.freeze()  # as in forked_ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    serve = worker._serve
    counts: defaultdict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    kept: list[list[Snapshot]] = []

    def serve_pretending(*args: Any) -> None:
        MACHINE.kernel_ns, MACHINE.attention_ns = pretence.kernel_ns, pretence.attention_ns
        device.install(rank, 1 if pretence.way == "staged" else ranks)
        _communicate(pretence)
        _name_the_work(counts)
        setattr(queue, "time", SimpleNamespace(time_ns=lambda: MACHINE.host.free_ns))  # noqa: B010 (the host's clock)
        queue.AcceleratorQueue.prepares = pretence.rehearses
        kept.append(_keep_snapshots(pretence.snapshot_every))
        FAULTS[pretence.fault]()
        try:
            serve(*args)
        finally:
            write_report()

    def write_report() -> None:
        report = Report(MACHINE.races, MACHINE.stops, dict(counts), kept[0])
        (pretence.folder / f"{rank}.report").write_bytes(pickle.dumps(report))

    def leave_with_report(*args: Any) -> None:
        write_report()
        leave(*args)

    leave = EngineLink.leave
    setattr(EngineLink, "leave", leave_with_report)  # noqa: B010 (as a process's own)
    setattr(worker, "_serve", serve_pretending)  # noqa: B010
    worker.serve(connection)


class PretendedWork:
    """A `dist.Work`: the backend's own, and what is after it when it has been waited for.

    Args:
        works: the backend's. actor: the communicator. kept: the tensors, which it uses until then.
        sent_ns: behind a receive, when the message was sent.
    """

    def __init__(self, works: Sequence[dist.Work], actor: Actor, kept: Any, sent_ns: Tensor | None) -> None:
        self._works, self._actor, self._kept, self._sent_ns = works, actor, kept, sent_ns
        self._clock = dict(actor.clock)
        self._time_ns = actor.free_ns
        self._on_device = any(isinstance(tensor, DeviceTensor) for tensor in device.tensors_in(kept))

    def wait(self, *limit: Any) -> bool:
        for work in self._works:
            work.wait()
        if self._sent_ns is not None:
            self._time_ns = max(self._time_ns, int(self._sent_ns))
            self._actor.free_ns = max(self._actor.free_ns, self._time_ns)
        waiting = MACHINE.current if self._on_device else MACHINE.host
        waiting.join(self._clock, self._time_ns)
        if limit:
            MACHINE.stop("wait with a limit")
        self._kept = None
        return True

    def __del__(self) -> None:
        if self._kept is not None:  # a backend keeps what it still uses
            _abandoned.append(self._kept)


_abandoned: list[Any] = []


def _communicate(pretence: Pretence) -> None:
    """Make gloo the device's own backend (`nccl`), or the host's (`staged`); communicators are streams of their own."""

    def make(store: Any, rank: int, size: int, limit: Any) -> Any:
        return dist.ProcessGroupGloo(store, rank, size, limit)

    if pretence.way == "nccl":
        dist.Backend.register_backend(BACKEND, make, devices=[device.NAME, "cpu"])
    actors: dict[int, Actor] = {}

    def begin(group: Any, tensors: Sequence[Tensor], written: Sequence[Tensor], what: str) -> Actor:
        own = {isinstance(tensor, DeviceTensor) for tensor in tensors}
        assert own == {pretence.way == "nccl"}, f"{what} of tensors of another device than the backend's"
        actor = actors.setdefault(id(group), MACHINE.actor(f"communicator {len(actors)}"))
        if pretence.way == "nccl":
            MACHINE.begin(MACHINE.current)
            actor.join(MACHINE.current.clock, MACHINE.current.free_ns)
        MACHINE.begin(actor)
        for tensor in tensors:
            memory = tensor.memory if isinstance(tensor, DeviceTensor) else host_memory(tensor)
            assert memory is not None
            if any(tensor is each for each in written):
                memory.write(actor, what)
            else:
                memory.read(actor, what)
        return actor

    for name in POINT_TO_POINT:
        setattr(dist.ProcessGroup, name, _message(name, getattr(dist.ProcessGroup, name), begin, pretence.message_ns))
    for name in COLLECTIVES:
        setattr(dist.ProcessGroup, name, _collective(name, getattr(dist.ProcessGroup, name), begin))


def _message(name: str, call: Any, begin: Callable[..., Actor], message_ns: int) -> Any:
    """`send` or `recv`: beside each message another one says when it was sent."""

    def message(group: Any, tensors: list[Tensor], peer: int, tag: int) -> PretendedWork:
        actor = begin(group, tensors, tensors if name == "recv" else (), name)
        sent_ns = torch.tensor([actor.free_ns + message_ns])
        works = [call(group, inner(tensors), peer, tag), call(group, [sent_ns], peer, tag)]
        return PretendedWork(works, actor, [*tensors, sent_ns], sent_ns if name == "recv" else None)

    return message


def _collective(name: str, call: Any, begin: Callable[..., Actor]) -> Any:
    def collective(group: Any, first: Any, *others: Any) -> PretendedWork:
        tensors = list(device.tensors_in((first, *others)))
        written = list(device.tensors_in((first,)))
        actor = begin(group, tensors, written, name)
        return PretendedWork([call(group, inner(first), *map(inner, others))], actor, tensors, None)

    return collective


def _keep_snapshots(every: int) -> list[Snapshot]:
    """Where the loop's snapshots will be, which are made on its own thread: the machine sees no other."""
    begin, write, kept = StageLoop.__init__, snapshot.write, list[Snapshot]()

    def begin_with_snapshots(self: StageLoop, *args: Any) -> None:
        *before, _, pulse, record, _ = args

        def keep(request: int, make: Callable[[], Snapshot]) -> None:
            kept.append(make())

        begin(self, *before, keep, pulse, record, every)  # type: ignore[call-arg]  # all of them are there

    def look(tensor: Tensor) -> Tensor:
        assert not isinstance(tensor, DeviceTensor)
        host_reads(tensor, "snapshot")
        return tensor

    setattr(StageLoop, "__init__", begin_with_snapshots)  # noqa: B010 (a method)
    setattr(snapshot, "write", lambda exported: write(snapshot.mapped(exported, look)))  # noqa: B010 (a function)
    return kept


# What the host is at when it stops.


def _name_the_work(counts: dict[str, Counter[tuple[int, int]]]) -> None:
    """Count the stops of admissions and of actions by what they are."""
    run, admit, act = StageLoop.run, StageLoop._admit, StageLoop._act

    def counted(label: str, call: Callable[..., None], *args: Any) -> None:
        stopped, waits = MACHINE.stopped, MACHINE.waits
        with labelled(label):
            call(*args)
        counts[label][MACHINE.stopped - stopped, MACHINE.waits - waits] += 1

    def labelled_admit(self: StageLoop, message: Any) -> None:
        counted(f"ADMIT {_where(self._part.is_head, self._part.is_tail)}", admit, self, message)

    def labelled_act(self: StageLoop, turn: Any, action: Any) -> None:
        label = _label(turn.script.item, action)
        if label:
            counted(label, act, self, turn, action)
        else:
            act(self, turn, action)

    def labelled_run(self: StageLoop) -> None:
        with labelled(BETWEEN):
            run(self)

    StageLoop.run = labelled_run  # type: ignore[method-assign]
    StageLoop._admit = labelled_admit  # type: ignore[method-assign]
    StageLoop._act = labelled_act  # type: ignore[method-assign]


def _where(starts: bool, ends: bool) -> str:
    """Which stage it is, of those that do this."""
    if starts and ends:
        return "only"
    return "first" if starts else "last" if ends else "middle"


def _label(item: Any, action: Any) -> str:
    match action:
        case Compute(starts=starts, ends=ends):
            return f"{item.kind.name} {_where(starts, ends)}"
        case Do.FINISH:
            return "FINISH"
        case Send():
            return f"SEND {action.value.value}"
        case Wait():
            return f"RECEIVE {action.value.value}"
        case Do.DONE | Do.MOVES:
            return "REPORT"
    return ""
