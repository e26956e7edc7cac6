"""The scores of completions, summed and grouped, of which some are missing.

All is float32, but where scores differ by little of their size: 1e8 and 1e8 + 1 are the same number there. Such scores
are float64 until their mean is gone.

Shapes: B = groups × G rows, group by group; F reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

_OFFSET = 2.0**-10
"""Scores that differ by less than this part of their size have an offset that is to go before float32."""
_NOISE = 2.0**-50
"""Of their size: a smaller difference is what float64 sums leave of equal scores."""
_NOTHING = 1e-8
"""A difference that counts as none, as TRL has it for standard deviations."""


class Rows(NamedTuple):
    """Numbers (…, n), NaN = missing, whose differences along the last axis are what counts."""

    values: mx.array
    """float32; without their mean where that was an offset."""
    means: mx.array
    """(…, 1) that was taken away: 0 where nothing was."""


class RewardTable:
    """Scores (B, F), or (B,) of one function, float32 or float64, with a weight for each function.

    NaN = missing. `left_out`: rows that have no reward, whatever scores they have. ValueError where shapes do not fit.
    """

    def __init__(
        self,
        rewards: mx.array,
        num_generations: int,
        weights: Sequence[float] | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        if rewards.ndim not in (1, 2) or rewards.size == 0:
            raise ValueError(f"rewards has the shape {rewards.shape}; give (B,) or (B, n_functions), not empty")
        B, self.functions = rewards.shape if rewards.ndim == 2 else (rewards.size, 1)
        if num_generations < 1 or B % num_generations:
            raise ValueError(
                f"{B} rewards do not make groups of num_generations = {num_generations}; give a multiple of it"
            )
        if weights is not None and len(weights) != self.functions:
            raise ValueError(f"{len(weights)} weights for {self.functions} reward functions; give one for each")
        listed: list[Any] = rewards.tolist()  # type: ignore[assignment]
        self._scores: list[list[float]] = listed if rewards.ndim == 2 else [[score] for score in listed]
        self._left_out = frozenset(left_out)
        self.missing = mx.array([i in self._left_out for i in range(B)]) if self._left_out else None
        """(B,) which rows are left out; None: no row is."""
        self._weights = [1.0] * self.functions if weights is None else [float(weight) for weight in weights]
        self._array = mx.array(self._scores)
        self.weights = mx.array(self._weights)
        """(F,) float32."""

    def totals(self, n: int) -> Rows:
        """(B/n, n) weighted sums of the scores that are there; NaN where none is, or the row is left out."""
        plain = weighted_sum(self._array, self.weights)
        if self.missing is not None:
            plain = mx.where(self.missing, math.nan, plain)
        pairs = [self._total(index) for index in range(len(self._scores))]
        return _rows(plain.reshape(-1, n), [_Centered.of(pairs[i : i + n]) for i in range(0, len(pairs), n)])

    def columns(self, n: int) -> Rows:
        """(B/n, F, n) scores by function, NaN where one is missing; also of rows that are left out."""
        plain = self._array.reshape(-1, n, self.functions).swapaxes(1, 2)
        centered = [
            _Centered.of([(row[j], abs(row[j])) for row in self._scores[i : i + n]])
            for i in range(0, len(self._scores), n)
            for j in range(self.functions)
        ]
        return _rows(plain, centered)

    def _total(self, index: int) -> tuple[float, float]:
        """A row's reward, NaN where it has none, and the size of what is added up."""
        terms = [w * s for w, s in zip(self._weights, self._scores[index], strict=True) if not math.isnan(s)]
        if not terms or index in self._left_out:
            return math.nan, math.nan
        if not all(map(math.isfinite, terms)):
            return math.inf, math.inf
        return sum(terms), sum(map(abs, terms))


def weighted_sum(table: mx.array, weights: mx.array) -> mx.array:
    """Σ_j w_j·r_ij over the numbers of a row of (B, F): (B,); NaN where there is none."""
    missing = mx.isnan(table)
    total = mx.sum(mx.where(missing, 0.0, table * weights), axis=1)
    return mx.where(mx.all(missing, axis=1), math.nan, total)


class _Centered(NamedTuple):
    """Numbers without their mean, both float64."""

    values: list[float]
    mean: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> _Centered | None:
        """Of numbers, NaN = missing, each with the size of what it is the sum of; None where they have no offset."""
        there = [value for value, _ in pairs if not math.isnan(value)]
        size = max((size for value, size in pairs if not math.isnan(value)), default=math.inf)
        if not math.isfinite(size) or len(there) < 2:
            return None
        if not max(size * _NOISE, _NOTHING) < max(there) - min(there) < size * _OFFSET:
            return None
        middle = there[0]
        mean = middle + math.fsum(value - middle for value in there) / len(there)
        return cls([value - mean for value, _ in pairs], mean)


def _rows(plain: mx.array, centered: Sequence[_Centered | None]) -> Rows:
    """`plain` (…, n), but for the rows that are centered."""
    n = plain.shape[-1]
    means = mx.array([0.0 if row is None else row.mean for row in centered]).reshape(*plain.shape[:-1], 1)
    if not any(centered):
        return Rows(plain, means)
    values = mx.array([[0.0] * n if row is None else row.values for row in centered]).reshape(plain.shape)
    is_centered = mx.array([row is not None for row in centered]).reshape(*plain.shape[:-1], 1)
    return Rows(mx.where(is_centered, values, plain), means)
