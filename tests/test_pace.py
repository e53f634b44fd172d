"""On an accelerator: reports come when the device has done the item, and the host stays close to it."""

from __future__ import annotations

from cineline.core.control import Done, Message
from cineline.core.request import Group, Kind
from cineline.rank.pace import ITEMS_AHEAD, Pace


class Device:
    """A queue that is worked off only when somebody waits for it."""

    def __init__(self) -> None:
        self.queued = self.done = 0

    def mark(self) -> Mark:
        self.queued += 1
        return Mark(self, self.queued)


class Mark:
    def __init__(self, device: Device, place: int) -> None:
        self.device = device
        self.place = place

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.place)


def done(number: int) -> Done:
    return Done(Group(Kind.DENOISE, 0, number))


def test_a_report_waits_for_its_own_item_and_no_longer() -> None:
    device = Device()
    heard: list[tuple[Message, int]] = []
    pace = Pace(lambda message: heard.append((message, device.done)), device.mark)
    for number in range(5):
        pace.report(done(number))
        pace.end_item()
        assert device.queued - device.done <= ITEMS_AHEAD
    assert heard == [(done(number), number + 1) for number in range(5 - ITEMS_AHEAD)]
    pace.settle()
    assert heard == [(done(number), number + 1) for number in range(5)]


def test_on_the_cpu_a_report_goes_straight_through() -> None:
    heard: list[Message] = []
    pace = Pace(heard.append, None)
    pace.report(done(0))
    assert heard == [done(0)]
