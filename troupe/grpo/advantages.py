"""Group-relative advantages from reward tables, and the statistics of the rewards.

Formulas, defaults and metric names are those of TRL 1.16, with one exception: a group of equal rewards gets exactly 0
and a standard deviation of exactly 0, where rounding would leave a spurious signal.

Shapes: B = groups × G rows, group by group; F reward functions. All is float32, but where scores differ by little of
their size: 1e8 and 1e8 + 1 are the same number there. Such scores are float64 until their mean is gone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from troupe.grpo.config import Aggregation, ScaleRewards

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""
_OFFSET = 2.0**-10
"""Scores that differ by less than this part of their size have an offset that is to go before float32."""
_NOISE = 2.0**-50
"""Of their size: a smaller difference is what float64 sums leave of equal scores."""
_NOTHING = 1e-8
"""A difference that counts as none, as TRL has it for standard deviations."""


def compute_advantages(
    rewards: mx.array,
    num_generations: int,
    scale_rewards: ScaleRewards = "group",
    *,
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    left_out: Collection[int] = (),
) -> mx.array:
    """Advantages (B,), 0 for a row without any score and for one that is left out.

    `rewards` (B,) or (B, F), float32 or float64, NaN = missing, B a multiple of `num_generations`; `weights` (F,),
    default all 1. `left_out`: rows that nothing is compared with, whatever scores they have.
    "sum_then_normalize" (Shao et al. 2024, arXiv:2402.03300): R_i = Σ_j w_j·r_ij over the scores that are present,
    A_i = (R_i − mean of its group) / (σ + 1e-4), σ with ddof 1 of the group or of the batch; "none" does not divide
    (Liu et al. 2025, arXiv:2503.20783). "normalize_then_sum" (GDPO 2026, arXiv:2601.05242): each function is
    normalized within its group first, then the weighted sum is normalized over the batch; `scale_rewards` does not
    matter. Raises `ValueError` where shapes do not fit or a choice is unknown.
    """
    table = RewardTable(rewards, num_generations, weights, left_out)
    advantages = _compared(table, num_generations, multi_objective_aggregation)
    if multi_objective_aggregation == "normalize_then_sum":
        total = advantages.reshape(1, -1)
        # Each group's scores have mean 0 and so has the batch, but for rounding, which is no signal.
        advantages = _divided(mx.where(total == 0.0, 0.0, _centered(total)), _spread(total))
    else:
        groups = advantages
        advantages = _centered(groups)
        if scale_rewards != "none":
            totals = table.totals(groups.size).values if scale_rewards == "batch" else groups
            advantages = _divided(advantages, _spread(totals))
    advantages = advantages.reshape(-1)
    return mx.where(mx.isnan(advantages), 0.0, advantages)


def reward_statistics(
    rewards: mx.array,
    num_generations: int,
    scale_rewards: ScaleRewards = "group",
    *,
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    names: Sequence[str] | None = None,
    left_out: Collection[int] = (),
) -> dict[str, float]:
    """TRL's reward metrics, over the scores that are there; NaN where there is none.

    `reward` and `reward_std` of the weighted sum and `rewards/NAME/mean` and `/std` of each function, all over the
    whole batch (`names` default to r0, r1, …), and `frac_reward_zero_std`: the part of the rows whose rewards, in the
    group (or the batch, where that is what scales), are all equal. Arguments as for `compute_advantages`; the
    functions' own figures count rows that are left out too.
    """
    table = RewardTable(rewards, num_generations, weights, left_out)
    F, B = table.functions, rewards.shape[0]
    labels = [f"r{j}" for j in range(F)] if names is None else list(names)
    if len(labels) != F:
        raise ValueError(f"{len(labels)} names for {F} reward functions; give one for each")
    total, columns = table.totals(B), table.columns(B)
    if multi_objective_aggregation == "normalize_then_sum":
        spread = _spread(_compared(table, num_generations, multi_objective_aggregation).reshape(1, -1))
    else:
        spread = _spread(total.values if scale_rewards == "batch" else table.totals(num_generations).values)
    values = [
        total.means + _mean(total.values),
        _std(total.values),
        _part_of_nothing(spread),
        columns.means + _mean(columns.values),
        _std(columns.values),
    ]
    flat: list[float] = mx.concatenate([value.reshape(-1) for value in values]).tolist()  # type: ignore[assignment]
    statistics = dict(zip(("reward", "reward_std", "frac_reward_zero_std"), flat, strict=False))
    for j, label in enumerate(labels):
        statistics[f"rewards/{label}/mean"] = flat[3 + j]
        statistics[f"rewards/{label}/std"] = flat[3 + F + j]
    return statistics


def spread_within_groups(
    rewards: mx.array,
    num_generations: int,
    *,
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    left_out: Collection[int] = (),
) -> tuple[float, float]:
    """The mean of the groups' standard deviations (ddof 1) of the weighted sum, and the part of the groups in which
    nothing differs of what advantages compare, so that they say nothing for any `scale_rewards`.

    Groups with fewer than two rewards have no deviation; NaN where no group has. Arguments as for `compute_advantages`.
    """
    table = RewardTable(rewards, num_generations, weights, left_out)
    within = _spread(table.totals(num_generations).values)
    compared = _spread(_compared(table, num_generations, multi_objective_aggregation))
    return float(_mean(within.reshape(1, -1))), float(_part_of_nothing(compared))


def _part_of_nothing(spread: mx.array) -> mx.array:
    """Of standard deviations the part that is 0, as TRL counts it."""
    return mx.mean((spread <= _NOTHING).astype(mx.float32))


def _compared(table: RewardTable, G: int, aggregation: Aggregation) -> mx.array:
    """What is compared within each group, (B/G, G): its rewards, or the weighted sums of its normalized scores."""
    if aggregation != "normalize_then_sum":
        return table.totals(G).values
    groups = table.columns(G).values  # (B/G, F, G)
    if table.missing is not None:
        groups = mx.where(table.missing.reshape(-1, 1, G), math.nan, groups)
    scores = _divided(_centered(groups), _spread(groups)).swapaxes(1, 2).reshape(-1, table.functions)
    return weighted_sum(scores, table.weights).reshape(-1, G)


def _mean(x: mx.array) -> mx.array:
    """The mean over the last axis, kept, of the numbers; NaN where there is none."""
    present = mx.logical_not(mx.isnan(x))
    return mx.sum(mx.where(present, x, 0.0), axis=-1, keepdims=True) / mx.sum(present, axis=-1, keepdims=True)


def _centered(x: mx.array) -> mx.array:
    """x − mean over the last axis; exactly 0 where all numbers there are equal."""
    return mx.where(_constant(x) & mx.logical_not(mx.isnan(x)), 0.0, x - _mean(x))


def _std(x: mx.array) -> mx.array:
    """The standard deviation, ddof 1, of the numbers along the last axis, kept; exactly 0 where they are all equal.

    NaN where there are fewer than two numbers.
    """
    present = mx.logical_not(mx.isnan(x))
    squares = mx.sum(mx.where(present, mx.square(x - _mean(x)), 0.0), axis=-1, keepdims=True)
    count = mx.sum(present, axis=-1, keepdims=True)
    std = mx.where(_constant(x), 0.0, mx.sqrt(squares / (count - 1)))
    return mx.where(count < 2, math.nan, std)


def _spread(x: mx.array) -> mx.array:
    """The standard deviation along the last axis, kept; 0 where the axis has one place (one generation a prompt)."""
    return mx.zeros_like(x) if x.shape[-1] == 1 else _std(x)


def _divided(centered: mx.array, spread: mx.array) -> mx.array:
    """centered / (σ + 1e-4); a lone score has no σ and keeps its 0."""
    return centered / (mx.where(mx.isnan(spread), 0.0, spread) + EPSILON)


def _constant(x: mx.array) -> mx.array:
    """Whether all numbers along the last axis are equal, at least one being there; the axis is kept."""
    missing = mx.isnan(x)
    largest = mx.max(mx.where(missing, -math.inf, x), axis=-1, keepdims=True)
    smallest = mx.min(mx.where(missing, math.inf, x), axis=-1, keepdims=True)
    return largest == smallest


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
