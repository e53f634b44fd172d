"""A request that is not done in its `timeout_s` is dropped, wherever it is, and no other notices."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from faulty_family import FaultySpec
from test_engine import assert_right, request

from cineline import Engine, InvalidRequest, ParallelConfig, RequestTimedOut, VideoRequest
from cineline.errors import anew

LIMIT_S = 30.0
SLOW = {"num_inference_steps": 50}  # 2 stages, 20 ms and both branches a step: seconds


def engine(**options: Any) -> Engine:
    return Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", **options)


def test_one_that_runs_is_dropped_and_the_others_go_on() -> None:
    with engine() as line:
        beside, soon = request("slow", **SLOW), request()
        other, late = line.submit(beside), line.submit(request("slow", num_inference_steps=500, timeout_s=2.0))
        in_time = line.submit(request("slow", num_inference_steps=10, timeout_s=LIMIT_S))
        started = time.monotonic()
        with pytest.raises(RequestTimedOut, match=r"^Request 1 was not done in timeout_s=2 \(step \d+ of 500\): give"):
            late.result(LIMIT_S)
        assert 1.5 < time.monotonic() - started < 5.0
        assert late.progress[0] > 0
        assert not late.cancel()
        assert_right(in_time, request("slow", num_inference_steps=10))
        assert_right(other, beside)
        assert_right(line.submit(soon), soon)


def test_one_that_waits_for_admission_is_dropped() -> None:
    with engine(in_flight=1) as line:
        other = line.submit(request("slow", **SLOW))
        late, next_one = line.submit(request(timeout_s=0.5)), line.submit(request())
        with pytest.raises(RequestTimedOut, match=r"Request 1 was not done in timeout_s=0.5 \(step 0 of"):
            late.result(LIMIT_S)
        assert not other.done
        assert_right(other, request("slow", **SLOW))
        assert_right(next_one, request())


def test_each_of_many_has_its_own_time() -> None:
    with engine(in_flight=1) as line:
        line.submit(request("slow", num_inference_steps=500))
        started = time.monotonic()
        for handle, timeout_s in [(line.submit(request(timeout_s=each)), each) for each in (2.5, 0.01, 1.25)][1:]:
            with pytest.raises(RequestTimedOut):
                handle.result(LIMIT_S)
            assert timeout_s <= time.monotonic() - started < timeout_s + 1.2
        line.close(0)


def test_the_error_can_be_raised_again() -> None:
    error = RequestTimedOut("Request 1 was not done.")
    assert str(anew(error)) == str(error)
    assert isinstance(error, TimeoutError)


@pytest.mark.parametrize("value", [0, -1, -0.5, math.inf, math.nan])
def test_a_time_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^timeout_s=\S+ cannot be used: it is no finite number above 0: give sec"
    ):
        VideoRequest(prompt="x", timeout_s=value)
