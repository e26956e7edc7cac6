from __future__ import annotations

import math

import pytest

from troupe.records.trend import Trend, area


def test_a_trend_of_any_length_has_its_ends_and_few_values() -> None:
    trend = Trend()
    assert (trend.first, trend.newest, trend.values) == (None, None, ())
    trend.add(1, math.nan)
    for step in range(2, 5001):
        trend.add(step, step / 1000)
    trend.add(5001, math.inf)
    assert (trend.first, trend.newest, trend.steps) == (0.002, 5.0, (2, 5000))
    assert 256 <= len(trend.values) <= 512
    assert list(trend.values) == sorted(trend.values)


@pytest.mark.parametrize(
    ("values", "width", "rows", "drawn"),
    [
        ([0.0, 0.5, 1.0], 3, 1, ["▁▅█"]),
        ([0.0, 1.0], 4, 2, ["  ██", "▁▁██"]),
        ([0.5] * 9, 3, 2, ["   ", "███"]),
        ([0.0, 2.0, 4.0, 6.0], 2, 1, ["▁█"]),
        ([-1e308, 1e308], 2, 1, ["▁█"]),
        ([7.0], 2, 1, ["▄▄"]),
        ([], 3, 2, ["   ", "   "]),
        ([1.0, 2.0], 0, 1, [""]),
    ],
)
def test_an_area_is_as_high_as_its_values(values: list[float], width: int, rows: int, drawn: list[str]) -> None:
    assert area(values, width, rows) == drawn


def test_an_area_in_plain_letters() -> None:
    assert area([0.0, 0.5, 1.0], 3, encoding="ascii") == [".:#"]
    assert area([0.0, 1.0], 2, 2, encoding="cp1252") == [" #", ".#"]
