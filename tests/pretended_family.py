"""A family on the pretended device: what tests of each family check there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretended_ranks import reports_in
from test_pretended_device import Pretend, assert_as_on_the_cpu, counted, no_races, run

from cineline import ParallelConfig, VideoRequest


def assert_in_good_order(
    folder: Path, axes: dict[str, Any], requests: Sequence[VideoRequest], pretend: Pretend, **options: Any
) -> None:
    """The CPU's videos, no race of two streams, and no stop of the host while blocks run or a message is sent."""
    wanted = run(folder, axes, requests, device="cpu", **options)
    pretence = pretend(rehearses=True)
    videos = run(folder, axes, requests, device="pretend", **options)
    reports = reports_in(pretence.folder)
    assert len(reports) == ParallelConfig(**axes).ranks
    assert_as_on_the_cpu(videos, wanted)
    assert no_races(reports), [report.races for report in reports]
    where = [stop for report in reports for stop in report.stops]
    hot = {label: stops for label, stops in counted(reports, 0).items() if label.startswith(("DENOISE", "SEND"))}
    assert hot and all(stops == (0,) for stops in hot.values()), (hot, where)
