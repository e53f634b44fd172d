"""What a person sees of a batch: seconds left for all of it, and its pace."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cineline.cli.progress import Pace, RequestProgress, make_view


def state(steps: int, chunks: int = 0, size: int = 1) -> RequestProgress:
    """Of a request of 8 steps and 2 chunks."""
    return RequestProgress(steps, 8, chunks, 2, chunks == 2, size=size)


def test_the_pace_of_a_batch() -> None:
    pace = Pace()
    assert pace.say([state(0), state(0)], 0.0) == "0 of 2 videos"
    assert pace.say([state(1), state(1)], 100.0) == "0 of 2 videos"  # from here on
    assert pace.say([state(8, 2), state(2)], 110.0) == "1 of 2 videos, about 8 s left, 360.0 videos an hour"
    assert pace.say([state(8, 2), state(8, 2)], 118.0) == "2 of 2 videos, about 0 s left, 360.0 videos an hour"


def test_a_large_videos_steps_count_more() -> None:
    pace = Pace()
    pace.say([state(1, size=9), state(0)], 0.0)
    # 9 of the 10 shares of work are the first one's, 10 units each.
    assert pace.say([state(8, 2, size=9), state(0)], 81.0) == "1 of 2 videos, about 10 s left, 72.0 videos an hour"


def test_a_batch_that_goes_on_counts_what_it_does_itself() -> None:
    pace = Pace()
    pace.say([state(8), state(4)], 0.0)
    assert "about 4 s left" in pace.say([state(8, 2), state(6)], 4.0)


def test_one_that_failed_is_no_work_any_more() -> None:
    pace = Pace()
    failed = RequestProgress(1, 8, 0, 2, True)
    pace.say([state(1), failed], 0.0)
    assert "about 7 s left" in pace.say([state(3), failed], 2.0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), st.integers(1, 99)), min_size=1), st.floats(0, 1e9))
def test_whatever_has_been_done_something_is_said(states: list[tuple[int, int, int]], later: float) -> None:
    pace = Pace()
    for now in (0.0, later):
        said = pace.say([state(*each) for each in states], now)
        assert said.startswith(
            f"{sum((steps, chunks) == (8, 2) for steps, chunks, _ in states)} of {len(states)} videos"
        )


@pytest.mark.parametrize("count", [1, 2])
def test_lines_and_bars_end_with_the_whole_batch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("cineline.cli.progress.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    shown = {}
    for terminal in (False, True):
        out = io.StringIO()
        view = make_view(["a.mp4", "b.mp4"][:count], False, Console(file=out, force_terminal=terminal, width=200))
        for steps in (1, 2):
            view.update([state(steps)] * count)
        view.close()
        shown[terminal] = out.getvalue()
    assert ("all: 0 of 2 videos, about 80 s left, 72.0 videos an hour" in shown[False]) == (count == 2)
    assert ("0 of 2 videos" in shown[True]) == (count == 2)
