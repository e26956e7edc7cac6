"""Group-relative advantages from reward tables, and the statistics of the rewards.

Knows nothing of reward functions: a table of numbers comes in, NaN where a score is missing. Formulas, defaults and
metric names are those of TRL 1.16, with one exception: a group of equal rewards gets exactly 0 and a standard
deviation of exactly 0, where rounding would leave a spurious signal.

Shapes: B = groups × G rows, group by group; F reward functions. float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""


def compute_advantages(
    rewards: mx.array,
    num_generations: int,
    scale_rewards: ScaleRewards = "group",
    *,
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
) -> mx.array:
    """Advantages (B,), 0 for a row without any score.

    `rewards` (B,) or (B, F), NaN = missing, B a multiple of `num_generations`; `weights` (F,), default all 1.
    "sum_then_normalize" (Shao et al. 2024, arXiv:2402.03300): R_i = Σ_j w_j·r_ij over the scores that are there,
    A_i = (R_i − mean of its group) / (σ + 1e-4), σ with ddof 1 of the group or of the batch; "none" does not divide
    (Liu et al. 2025, arXiv:2503.20783). "normalize_then_sum" (GDPO 2026, arXiv:2601.05242): each function is
    normalized within its group first, then the weighted sum is normalized over the batch; `scale_rewards` does not
    matter. Raises `ValueError` where shapes do not fit or a choice is unknown.
    """
    table, w = _table(rewards, num_generations, weights)
    return _normalized(table, w, num_generations, scale_rewards, multi_objective_aggregation)[0]


def reward_statistics(
    rewards: mx.array,
    num_generations: int,
    scale_rewards: ScaleRewards = "group",
    *,
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """TRL's reward metrics, over the scores that are there; NaN where there is none.

    `reward` and `reward_std` of the weighted sum, `rewards/NAME/mean` and `/std` of each function (`names` default to
    r0, r1, …), and `frac_reward_zero_std`: the part of the rows whose rewards, in the group (or the batch, where that
    is what scales), are all equal. Arguments as for `compute_advantages`.
    """
    table, w = _table(rewards, num_generations, weights)
    spread = _normalized(table, w, num_generations, scale_rewards, multi_objective_aggregation)[1]
    total = _weighted_sum(table, w)[None]
    columns = table.T
    values = [_mean(total), _std(total), mx.mean((spread <= 1e-8).astype(mx.float32)), _mean(columns), _std(columns)]
    flat: list[float] = mx.concatenate([value.reshape(-1) for value in values]).tolist()  # type: ignore[assignment]
    F = columns.shape[0]
    labels = [f"r{j}" for j in range(F)] if names is None else list(names)
    if len(labels) != F:
        raise ValueError(f"{len(labels)} names for {F} reward functions; give one for each")
    statistics = dict(zip(("reward", "reward_std", "frac_reward_zero_std"), flat, strict=False))
    for j, label in enumerate(labels):
        statistics[f"rewards/{label}/mean"] = flat[3 + j]
        statistics[f"rewards/{label}/std"] = flat[3 + F + j]
    return statistics


def _normalized(
    table: mx.array, weights: mx.array, G: int, scale_rewards: ScaleRewards, aggregation: Aggregation
) -> tuple[mx.array, mx.array]:
    """Advantages (B,), and the standard deviations, of equally many rows each, that are reported where they are 0."""
    B, F = table.shape
    if aggregation == "normalize_then_sum":
        groups = table.reshape(-1, G, F).swapaxes(1, 2)  # (B/G, F, G)
        scores = _divided(_centered(groups), _spread(groups)).swapaxes(1, 2).reshape(B, F)
        total = _weighted_sum(scores, weights)[None]
        spread = _spread(total)
        # Each group's scores have mean 0 and so has the batch, but for rounding, which is no signal.
        advantages = _divided(mx.where(total == 0.0, 0.0, _centered(total)), spread)
    else:
        total = _weighted_sum(table, weights)
        groups = total.reshape(-1, G)
        spread = _spread(total[None] if scale_rewards == "batch" else groups)
        advantages = _centered(groups)
        if scale_rewards != "none":
            advantages = _divided(advantages, spread)
    advantages = advantages.reshape(-1)
    return mx.where(mx.isnan(advantages), 0.0, advantages), spread


def _table(rewards: mx.array, G: int, weights: Sequence[float] | None) -> tuple[mx.array, mx.array]:
    """Rewards (B, F) and weights (F,), checked."""
    table = rewards.astype(mx.float32)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"rewards has the shape {rewards.shape}; give (B,) or (B, n_functions), not empty")
    if G < 1 or table.shape[0] % G:
        raise ValueError(f"{table.shape[0]} rewards do not make groups of num_generations = {G}; give a multiple of it")
    if weights is None:
        return table, mx.ones(table.shape[1])
    if len(weights) != table.shape[1]:
        raise ValueError(f"{len(weights)} weights for {table.shape[1]} reward functions; give one for each")
    return table, mx.array(list(weights), dtype=mx.float32)


def _weighted_sum(table: mx.array, weights: mx.array) -> mx.array:
    """Σ_j w_j·r_ij over the numbers of a row: (B,); NaN where there is none."""
    missing = mx.isnan(table)
    total = mx.sum(mx.where(missing, 0.0, table * weights), axis=1)
    return mx.where(mx.all(missing, axis=1), math.nan, total)


def _mean(x: mx.array) -> mx.array:
    """The mean over the last axis, kept, of the numbers; NaN where there is none."""
    there = mx.logical_not(mx.isnan(x))
    return mx.sum(mx.where(there, x, 0.0), axis=-1, keepdims=True) / mx.sum(there, axis=-1, keepdims=True)


def _centered(x: mx.array) -> mx.array:
    """x − mean over the last axis; exactly 0 where all numbers there are equal."""
    return mx.where(_constant(x) & mx.logical_not(mx.isnan(x)), 0.0, x - _mean(x))


def _std(x: mx.array) -> mx.array:
    """The standard deviation, ddof 1, of the numbers along the last axis, kept; exactly 0 where they are all equal.

    NaN where there are fewer than two numbers.
    """
    there = mx.logical_not(mx.isnan(x))
    squares = mx.sum(mx.where(there, mx.square(x - _mean(x)), 0.0), axis=-1, keepdims=True)
    count = mx.sum(there, axis=-1, keepdims=True)
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
