"""Figures in words."""

from __future__ import annotations

import math
import time

import pytest

from troupe.records import text as words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"), (math.nan, "–"), (0.0, "0"), (0.123456, "0.1235"), (-2.5, "−2.5"), (1234.5, "1,234"),
        (-45678.0, "−45,678"), (1_234_567.0, "1.235 M"), (2e12, "2e+12"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, expected: str) -> None:
    assert words.number(value) == expected


def test_parts() -> None:
    assert [words.percent(v) for v in (0.0, 0.1234, 1.0, -0.5, None)] == ["0.0 %", "12.3 %", "100.0 %", "−50.0 %", "–"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0 ms"), (0.01234, "12.3 ms"), (5.0, "5 s"), (119.6, "120 s"), (150.9, "2 min 30 s"), (7260.0, "2 h 1 min"),
     (None, "–"), (math.inf, "–")],
)  # fmt: skip
def test_durations(value: float | None, expected: str) -> None:
    assert words.seconds(value) == expected


def test_sizes() -> None:
    assert [words.size(v) for v in (0, 999, 12_345, 5.67e6, 2.5e9, 3e12)] == [
        "0 B", "999 B", "12.3 kB", "5.67 MB", "2.5 GB", "3e+03 GB",
    ]  # fmt: skip


def test_dates() -> None:
    assert words.date(None) == "–"
    assert words.date(86400.0 * 400) == time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(86400.0 * 400))
