"""The order of things on a pretended machine: its host, its device's streams, and who uses which memory when."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import numpy as np
from torch import Tensor

Access = tuple[str, int]
"""Who, and at what count of their own clock."""


@dataclass
class Actor:
    """The host, a stream or a communicator: what it does is in order, and it knows what others have done before.

    Attributes:
        clock: by name, how far it knows of each actor. free_ns: when it will be through with what it has to do.
    """

    name: str
    clock: dict[str, int] = field(default_factory=dict)
    free_ns: int = 0

    def tick(self) -> None:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1

    def join(self, other: dict[str, int], time_ns: int) -> None:
        """Go on after all that."""
        for name, count in other.items():
            if self.clock.get(name, 0) < count:
                self.clock[name] = count
        self.free_ns = max(self.free_ns, time_ns)

    def knows(self, access: Access) -> bool:
        return self.clock.get(access[0], 0) >= access[1]


class Machine:
    """The host, the device and what was noticed.

    Attributes:
        current: the stream that the host puts work in. label: what the host is at.
        kernel_ns, attention_ns: how long a kernel takes on the device.
        races: in words. stops: of the host, by label and place; stopped: how many.
        waits: of the host for something that is on its way beside the current stream.
    """

    def __init__(self) -> None:
        self.host = Actor("host")
        self.current = self.default = Actor("compute")
        self.streams = [self.default]
        self.label = ""
        self.kernel_ns, self.attention_ns = 1000, 1000
        self.races: Counter[str] = Counter()
        self.stops: Counter[tuple[str, str]] = Counter()
        self.stopped = self.waits = 0

    def actor(self, name: str) -> Actor:
        """A new stream or communicator."""
        self.streams.append(Actor(name))
        return self.streams[-1]

    def begin(self, actor: Actor) -> None:
        """The actor gets something more to do, behind what the host knows of."""
        actor.join(self.host.clock, self.host.free_ns)
        actor.tick()

    def count(self, what: str) -> None:
        """A stop of the host."""
        self.stops[self.label, f"{what} at {place()}"] += 1
        self.stopped += 1

    def stop(self, what: str) -> None:
        """The host waits until the current stream has nothing to do."""
        self.count(what)
        self.begin(self.current)
        self.host.join(self.current.clock, self.current.free_ns)

    def drain(self) -> None:
        """The host waits for all streams, those that wait for other ranks included."""
        self.stop("device-wide synchronisation")
        for stream in self.streams:
            self.host.join(stream.clock, stream.free_ns)

    def race(self, what: str) -> None:
        self.races[f"{what} at {place()}"] += 1


MACHINE = Machine()


def place() -> str:
    """The innermost line of the project's, and where it called a library's."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/cineline/" in file:
            return f"{file.split('/cineline/')[-1]}:{frame.f_code.co_name}{library}"
        if "site-packages" in file and "/torch/" not in file and not library:
            library = f" in {file.split('/')[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class Memory:
    """Bytes of the device or of the host, and who used them last.

    Args:
        owner: the stream that it was allocated for, which may get it again as soon as it is freed; None on the host.
    """

    def __init__(self, owner: Actor | None) -> None:
        self.owner = owner
        self.pinned = False
        self.lent: set[str] = set()
        self._written: Access | None = None
        self._read: dict[str, int] = {}

    def read(self, actor: Actor, what: str) -> None:
        if self._written is not None and not actor.knows(self._written):
            MACHINE.race(f"{what} on {actor.name} reads what {self._written[0]} still writes")
        self._read[actor.name] = actor.clock[actor.name]

    def write(self, actor: Actor, what: str) -> None:
        for user, count in self._uses():
            if not actor.knows((user, count)):
                MACHINE.race(f"{what} on {actor.name} writes what {user} still uses")
        self._written, self._read = (actor.name, actor.clock[actor.name]), {}

    def _uses(self) -> Iterator[Access]:
        yield from self._read.items()
        if self._written is not None:
            yield self._written

    def __del__(self) -> None:
        if self.owner is None:
            return
        self.owner.join(MACHINE.host.clock, 0)  # as whatever gets this memory next will be put in the queue
        for access in self._uses():
            if access[0] not in self.lent and not self.owner.knows(access):
                MACHINE.race(f"{access[0]} still uses what is freed for {self.owner.name}")


HOST_MEMORY: dict[int, Memory] = {}
"""Of tensors that take part in anything that is not done at once, by their storage."""


def host_memory(tensor: Tensor, known_only: bool = False) -> Memory | None:
    """Of a tensor of the host, where it takes part in anything that is not done at once."""
    storage = tensor.untyped_storage()
    memory = HOST_MEMORY.get(storage._cdata)
    if memory is None and not known_only:
        memory = HOST_MEMORY[storage._cdata] = Memory(None)
        finalize(storage, HOST_MEMORY.pop, storage._cdata, None)
    return memory


def host_reads(tensor: Tensor, what: str) -> None:
    """The host looks at a tensor of its own."""
    memory = host_memory(tensor, known_only=True)
    if memory is not None:
        MACHINE.host.tick()
        memory.read(MACHINE.host, what)


class Stream:
    """As `torch.Stream`."""

    def __init__(self, device: Any = None, actor: Actor | None = None, priority: int = 0) -> None:
        self.actor = actor or MACHINE.actor(f"stream {len(MACHINE.streams)}")
        self._before: list[Actor] = []

    def __enter__(self) -> Stream:
        self._before.append(MACHINE.current)
        MACHINE.current = self.actor
        return self

    def __exit__(self, *raised: object) -> None:
        MACHINE.current = self._before.pop()


class Event:
    """As `torch.Event`."""

    def __init__(self, device: Any = None, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self._actor = MACHINE.current
        self._clock: dict[str, int] = {}
        self._time_ns = 0

    def record(self, stream: Stream | None = None) -> None:
        actor = stream.actor if stream else MACHINE.current
        MACHINE.begin(actor)
        self._actor, self._clock, self._time_ns = actor, dict(actor.clock), actor.free_ns

    def wait(self, stream: Stream | None = None) -> None:
        actor = stream.actor if stream else MACHINE.current
        MACHINE.begin(actor)
        actor.join(self._clock, self._time_ns)

    def synchronize(self) -> None:
        if self._actor is MACHINE.default:
            MACHINE.count("wait for a mark")
        else:
            MACHINE.waits += 1
        self._pass()

    def query(self) -> bool:
        passed = self._time_ns <= MACHINE.host.free_ns
        if passed:
            self._pass()
        return passed

    def _pass(self) -> None:
        """The host knows that the device has got here."""
        MACHINE.host.join(self._clock, self._time_ns)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds in single precision, as CUDA has them."""
        assert self._timed and end._timed and self.query() and end.query(), "the device has not got there"
        return float(np.float32((end._time_ns - self._time_ns) / 1e6))


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """What the host is at, for its stops."""
    before, MACHINE.label = MACHINE.label, label
    try:
        yield
    finally:
        MACHINE.label = before
