"""What belongs to an item is done when the device has done the item, and the host stays close to it."""

from __future__ import annotations

from functools import partial

from cineline.rank.pace import ITEMS_AHEAD, Pace
from cineline.transport.queue import HostQueue, Mark


class LazyQueue(HostQueue):
    """A queue that is worked off only when somebody waits for it."""

    def __init__(self) -> None:
        self.queued = self.done = 0

    def mark(self) -> Mark:
        self.queued += 1
        return LazyMark(self, self.queued)


class LazyMark:
    def __init__(self, device: LazyQueue, place: int) -> None:
        self.device = device
        self.place = place

    def query(self) -> bool:
        return self.device.done >= self.place

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.place)


def test_a_report_waits_for_its_own_item_and_no_longer() -> None:
    device = LazyQueue()
    heard: list[tuple[int, int]] = []
    ends: list[int] = []
    pace = Pace(device)
    for number in range(5):
        pace.after(lambda number=number: heard.append((number, device.done)))  # type: ignore[misc]
        pace.end_item()
        ends.append(device.queued)
        assert number - len(heard) < ITEMS_AHEAD
    assert [number for number, _ in heard] == list(range(5 - ITEMS_AHEAD))
    pace.settle()
    assert [number for number, _ in heard] == list(range(5))
    assert all(done >= ends[number] for number, done in heard)


def test_what_the_device_has_done_already_is_not_waited_for() -> None:
    device = LazyQueue()
    heard: list[int] = []
    pace = Pace(device)
    pace.after(partial(heard.append, 0))
    pace.end_item()
    assert heard == []
    device.done = device.queued  # it has got to the end of the first item
    pace.after(partial(heard.append, 1))
    pace.end_item()
    assert heard == [0]
    pace.settle()
    assert heard == [0, 1]


def test_on_the_cpu_a_report_goes_straight_through() -> None:
    heard: list[int] = []
    pace = Pace(HostQueue())
    pace.after(partial(heard.append, 0))
    assert heard == [0]
