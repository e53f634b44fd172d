"""A rank's device as a queue that the host puts work in: what has come, where it has got to, what goes to the host.

An accelerator works through its queue behind the host's back; on the CPU what returns is done. Whatever differs between
the two is said here, and nowhere in loop, channel and pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cineline.schedule.words import RECEIVES_AHEAD

FAR_MS = 1e5
"""From where on an event's time is reckoned from a nearer one: float32 milliseconds have seven digits."""

ASIDE = -1
"""The priority of streams that hold no more than waits: of each torch has a pool, and NCCL's streams are of another."""


class Mark(Protocol):
    """A point in the device's queue."""

    def query(self) -> bool:
        """Whether the device has got there."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has got there."""
        ...

    def wait(self) -> None:
        """Have the current stream wait, and not the host."""
        ...


class TimedMark(Mark, Protocol):
    """A point in the device's queue that remembers when it was passed."""

    def time_ns(self) -> int:
        """Wall-clock time; not before the device has got there."""
        ...


class DeviceQueue(Protocol):
    """What a rank knows of its device.

    Attributes:
        device: it.
        looks_ahead: items whose receives are posted before their turn, the one whose turn it is included.
        prepares: whether the first use of a kernel may stop it, so that all are used once before requests come.
    """

    device: torch.device
    looks_ahead: int
    prepares: bool

    def receive(self, post: Callable[[], dist.Work], behind: Mark) -> dist.Work:
        """Post a receive, whose buffer nobody reads any more behind that mark."""
        ...

    def arrived(self, work: dist.Work) -> None:
        """Wait until a receive is here, for nothing else; what is put in the queue from now on may read it."""
        ...

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host, on the device; when it returns the host's may be written to."""
        ...

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A tensor of the device on the host, once the queue has got to here; `into` has its shape and dtype."""
        ...

    def host_memory(self, nbytes: int) -> Tensor:
        """Bytes of the host that the device can copy to and from, uint8 [nbytes]."""
        ...

    def mark(self) -> Mark:
        """The queue's end as it is now."""
        ...

    def timed_mark(self) -> TimedMark:
        """The same; its time may be asked for."""
        ...

    def drain(self) -> None:
        """Wait for all of the device's work; for starts and ends, never in between."""
        ...


def queue_of(device: torch.device) -> DeviceQueue:
    """The queue of a rank's device."""
    return HostQueue() if device.type == "cpu" else AcceleratorQueue(device)


class HostQueue:
    """The CPU, whose queue is always empty."""

    device = torch.device("cpu")
    looks_ahead = RECEIVES_AHEAD
    prepares = False

    def receive(self, post: Callable[[], dist.Work], behind: Mark) -> dist.Work:
        return post()

    def arrived(self, work: dist.Work) -> None:
        work.wait()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        return tensor if into is None else into.copy_(tensor)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return _PASSED

    def timed_mark(self) -> TimedMark:
        return _Passed(time.time_ns())

    def drain(self) -> None:
        pass


class _Passed:
    """A point that was passed when it was made."""

    def __init__(self, time_ns: int = 0) -> None:
        self._time_ns = time_ns

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def time_ns(self) -> int:
        return self._time_ns


_PASSED = _Passed()


class AcceleratorQueue:
    """One of torch's accelerators: its current stream, and one beside it, on which the host waits for what comes.

    A receive that is posted is a kernel that waits for its sender, and whatever makes the host wait for its whole
    device (an allocator that gives memory back, a kernel that is loaded late) waits for that, too. So none is posted
    before the item's turn: what a host then waits for is due for items that come before its own, never for a later one.
    It runs beside the item before all the same, for it is behind nothing but the last reader of its buffer.
    """

    looks_ahead = 1
    prepares = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._aside = torch.Stream(device, priority=ASIDE)
        self.drain()
        self._origin = self._event(timed=True)
        self._origin.record()
        self._origin.synchronize()
        self._origin_ns = time.time_ns()

    def _event(self, timed: bool = False) -> Any:
        # A host that waits for one of these sleeps; torch.Event's have it spin, and know of no other way.
        if self.device.type == "cuda":
            return torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
        return torch.Event(self.device, enable_timing=timed)

    def receive(self, post: Callable[[], dist.Work], behind: Mark) -> dist.Work:
        with torch.Stream(self.device, priority=ASIDE):  # one of a pool: NCCL's own waits for what is in it
            behind.wait()
            return post()

    def arrived(self, work: dist.Work) -> None:
        with self._aside:
            work.wait()  # without a limit of its own, which would make NCCL block the host whatever the stream
            here = self._event()
            here.record()
        here.synchronize()
        here.wait()

    def to_device(self, tensor: Tensor) -> Tensor:
        with self._aside:
            copy = tensor.to(self.device, non_blocking=True)
            here = self._event()
            here.record()
        copy.record_stream(torch.accelerator.current_stream(self.device))
        here.synchronize()
        here.wait()
        return copy

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        if into is None:
            into = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return into.copy_(tensor, non_blocking=True)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        event = self._event()
        event.record()
        return event  # type: ignore[no-any-return]

    def timed_mark(self) -> TimedMark:
        event = self._event(timed=True)
        event.record()
        return _TimedEvent(self, event)

    def drain(self) -> None:
        torch.accelerator.synchronize(self.device)

    def time_ns(self, event: Any) -> int:
        """Wall-clock time of a timed event that is passed."""
        passed_ms: float = self._origin.elapsed_time(event)
        time_ns = self._origin_ns + round(passed_ms * 1e6)
        if passed_ms > FAR_MS:
            self._origin, self._origin_ns = event, time_ns
        return time_ns


class _TimedEvent:
    def __init__(self, queue: AcceleratorQueue, event: Any) -> None:
        self._queue, self._event = queue, event

    def query(self) -> bool:
        return bool(self._event.query())

    def synchronize(self) -> None:
        self._event.synchronize()

    def wait(self) -> None:
        self._event.wait()

    def time_ns(self) -> int:
        return self._queue.time_ns(self._event)
