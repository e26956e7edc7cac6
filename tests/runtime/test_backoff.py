"""Pauses double up to a limit, and jitter takes at most half of them away."""

from __future__ import annotations

import pytest

from troupe.runtime.backoff import backoff_s


def test_pauses_double_up_to_the_longest() -> None:
    assert [backoff_s(n, 0.5, 30.0) for n in (1, 2, 3, 7, 8, 10_000)] == [0.5, 1.0, 2.0, 30.0, 30.0, 30.0]
    assert backoff_s(10_000, 1.0) == 2.0**32
    assert backoff_s(3, 0.0, 1.0) == 0.0


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter_takes_at_most_half_away(jitter: float, share: float) -> None:
    assert backoff_s(2, 0.5, 30.0, jitter) == share
    assert backoff_s(9, 0.5, 30.0, jitter) == 30.0 * share
