"""Tallies of parts merge into the metrics of the whole."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from troupe.grpo.tallies import averages, merge, nan_max, nan_min, row_fractions, tally


def test_tallies_of_parts_make_the_mean_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    x, mask = rng.normal(size=(6, 5)).astype(np.float32), (rng.random((6, 5)) < 0.6).astype(np.float32)
    parts = [{"x": tally(mx.array(x[i : i + 2]), mx.array(mask[i : i + 2]))} for i in (0, 2, 4)]
    np.testing.assert_allclose(averages(merge(parts))["x"].item(), (x * mask).sum() / mask.sum(), rtol=1e-6)


def test_one_column_counts_every_row() -> None:
    assert tally(mx.array([[2.0], [4.0]]), mx.zeros((2, 3))).tolist() == [6.0, 2.0]


def test_a_mean_of_nothing_is_zero() -> None:
    assert averages({"x": tally(mx.full((1, 2), math.nan), mx.zeros((1, 2)))})["x"].item() == 0.0


def test_extremes_pass_over_what_is_not_a_number() -> None:
    x = mx.array([math.nan, 3.0, -1.0])
    assert (nan_min(x).item(), nan_max(x).item()) == (-1.0, 3.0)
    assert math.isnan(nan_min(mx.array([math.nan])).item())  # type: ignore[arg-type]
    parts = [{"a_min": mx.array(low), "a/max": mx.array(high)} for low, high in ((0.5, 0.6), (0.25, math.nan))]
    merged = averages(merge(parts))
    np.testing.assert_allclose([merged["a_min"].item(), merged["a/max"].item()], [0.25, 0.6])


def test_row_fractions() -> None:
    x, mask = mx.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), mx.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    fractions = row_fractions(x, mask).tolist()
    assert fractions[0] == 0.5  # type: ignore[index]
    assert math.isnan(fractions[1])  # type: ignore[index, arg-type]
    assert row_fractions(x[:, :1], mask).tolist() == [1.0, 1.0]
