"""Curves in few points: means, extremes, gaps, and sums over all steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from troupe.records.curves import Curves, Metrics, Thinned, Thinner


def thinned(steps: list[Metrics], most_points: int = 1000) -> Thinned:
    thinner = Thinner(len(steps), most_points)
    for number, metrics in enumerate(steps, 1):
        thinner.add(number, metrics)
    return thinner.result()


def test_few_steps_stay_as_they_are() -> None:
    found = thinned([{"a": 1.0}, {"a": None, "b": 5.0}, {"a": 3.0}])
    assert (found.steps, found.steps_a_point) == ((1, 2, 3), 1)
    assert found.curves["a"].mean == (1.0, None, 3.0)
    assert found.curves["b"].mean == (None, 5.0, None)
    assert (found.curves["a"].low, found.curves["a"].high) == ((), ())


def test_many_steps_become_means_between_extremes() -> None:
    found = thinned([{"a": float(k), "gone": 1.0} if k < 4 else {"a": float(k)} for k in range(10)], most_points=4)
    assert (found.steps, found.steps_a_point) == ((3, 6, 9, 10), 3)
    assert found.curves["a"].mean == (1.0, 4.0, 7.0, 9.0)
    assert found.curves["a"].low == (0.0, 3.0, 6.0, 9.0)
    assert found.curves["a"].high == (2.0, 5.0, 8.0, 9.0)
    assert found.curves["gone"].mean == (1.0, 1.0, None, None)


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=60), st.integers(1, 12))
def test_no_value_is_lost(values: list[float | None], most_points: int) -> None:
    found = thinned([{"a": value} for value in values], most_points)
    assert len(found.steps) <= most_points
    size = found.steps_a_point
    parts = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    curve = found.curves.get("a")
    assert (curve is None) == (not any(parts))
    if curve is not None:
        assert list(curve.mean) == [pytest.approx(math.fsum(p) / len(p)) if p else None for p in parts]
        if size > 1:
            assert list(curve.low) == [min(p) if p else None for p in parts]
            assert list(curve.high) == [max(p) if p else None for p in parts]


def test_a_step_that_was_there_is_left_out() -> None:
    thinner = Thinner(3)
    for step, value in [(2, 1.0), (2, 5.0), (1, 5.0), (3, 2.0)]:
        thinner.add(step, {"a": value})
    assert (thinner.result().steps, thinner.result().curves["a"].mean) == ((2, 3), (1.0, 2.0))


def test_more_steps_than_expected_are_taken() -> None:
    thinner = Thinner(2, 2)
    for step in range(1, 6):
        thinner.add(step, {"a": 1.0})
    assert (thinner.result().steps, thinner.result().steps_a_point) == ((4, 5), 4)


def test_a_sum_beyond_numbers() -> None:
    assert thinned([{"a": 1e308}] * 4, most_points=1).curves["a"].mean == (1e308,)


def test_no_step_at_all() -> None:
    assert thinned([]) == Thinned()


@pytest.mark.parametrize("most_points", [1, 2, 1000])
def test_the_time_of_all_steps_whatever_the_points(most_points: int) -> None:
    steps: list[Metrics] = [
        {"step_time": 1.0, "tokens_per_second": 10.0, "time/device_s": 0.5, "time/a/busy": 1.0, "time/b/idle": 0.5},
        {"step_time": 3.0, "tokens_per_second": None, "time/device_s": 1.5, "time/a/busy": 0.2},
        {"step_time": 4.0, "tokens_per_second": 5.0},  # a store of an older version tells no times
        {"time/reward/hidden_s": 0.25},
    ]
    found = thinned(steps, most_points)
    assert (found.sums.seconds, found.sums.sampled) == (8.0, 30.0)
    assert found.sums.totals == {"device_s": 2.0, "reward/hidden_s": 0.25}
    assert found.sums.shares == {"a/busy": pytest.approx((1.0 + 0.6) / 4.0), "b/idle": pytest.approx(0.5 / 4.0)}


def table(curves: Curves) -> dict[str, list[Any]]:
    """Steps and means."""
    return {"step": curves.steps} | {name: list(curve.mean) for name, curve in curves.curves().items()}


def test_steps_in_order() -> None:
    curves = Curves()
    curves.add(1, {"reward": 0.5})
    curves.add(2, {"reward": 1.0, "loss": 0.25})
    curves.add(3, {"loss": 0.5})
    assert table(curves) == {"step": [1, 2, 3], "reward": [0.5, 1.0, None], "loss": [None, 0.25, 0.5]}


def test_a_step_that_is_made_again_takes_the_place_of_the_first() -> None:
    curves = Curves()
    for step in range(1, 6):
        curves.add(step, {"reward": float(step)})
    curves.add(3, {"reward": 30.0})
    assert table(curves) == {"step": [1, 2, 3], "reward": [1.0, 2.0, 30.0]}
    curves.cut(1)
    assert table(curves) == {"step": [1], "reward": [1.0]}
    curves.cut(0)
    assert table(curves) == {"step": [], "reward": []}


def test_neighbours_become_their_mean() -> None:
    curves = Curves(most=4)
    for step, reward in enumerate([1.0, 3.0, math.nan, 7.0, 9.0], 1):
        curves.add(step, {} if math.isnan(reward) else {"reward": reward})
    assert table(curves) == {"step": [2, 4, 5], "reward": [2.0, 7.0, 9.0]}
    curves.add(6, {"reward": 1.0})
    assert table(curves) == {"step": [2, 4, 6], "reward": [2.0, 7.0, 5.0]}
    curves.add(7, {"reward": 1.0})
    curves.add(8, {"reward": 1.0})
    curves.add(9, {"reward": 1.0})
    assert curves.steps == [4, 8, 9]
    assert table(curves)["reward"][1:] == [3.0, 1.0]


@given(st.integers(2, 30), st.integers(1, 300))
def test_never_more_than_its_bound_and_the_newest_is_there(most: int, steps: int) -> None:
    curves = Curves(most)
    for step in range(1, steps + 1):
        curves.add(step, {"reward": float(step)})
        assert len(curves) <= most
    assert curves.steps[-1] == steps
    assert curves.steps == sorted(set(curves.steps))
    assert all(value <= step for step, value in zip(curves.steps, table(curves)["reward"], strict=True))
