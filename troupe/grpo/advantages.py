"""Group-relative advantages from reward tables, and the statistics of the rewards.

Formulas, defaults and metric names are those of TRL 1.16, with one exception: a group of equal rewards gets exactly 0
and a standard deviation of exactly 0, where rounding would leave a spurious signal.

Shapes: B = groups × G rows, group by group; F reward functions. All is float32, but where `reward_table` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import mlx.core as mx

from troupe.grpo.config import Advantage, Aggregation, ScaleRewards, checked_aggregation, checked_scale
from troupe.grpo.reward_table import RewardTable, Rows, weighted_sum

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""
_OF_BEST, _OF_MEAN = 1e-6, 1e-6
"""As `EPSILON`, in verl's pass@k advantage and in MaxRL's."""
_NOTHING = 1e-8
"""A difference that counts as none, as TRL has it for standard deviations."""


def compute_advantages(
    rewards: mx.array,
    num_generations: int,
    scale_rewards: ScaleRewards | None = None,
    *,
    advantage: Advantage = "grpo",
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
    matter. That is the `advantage` "grpo"; the others compare the sums R_i otherwise, see `leave_one_out` ("rloo"),
    `over_the_mean` ("maxrl") and `of_the_best` ("grpo_passk"). `scale_rewards` None: "group", where the advantage has
    it. Raises `ValueError` where shapes do not fit or choices do not go together.
    """
    scale_rewards = checked_scale(advantage, scale_rewards)
    checked_aggregation(advantage, multi_objective_aggregation)
    table = RewardTable(rewards, num_generations, weights, left_out)
    if advantage != "grpo":
        advantages = _OTHERS[advantage](table.totals(num_generations), scale_rewards)
        return mx.where(mx.isnan(advantages), 0.0, advantages).reshape(-1)
    advantages = _compared(table, num_generations, multi_objective_aggregation)
    if multi_objective_aggregation == "normalize_then_sum":
        advantages = _normalized(advantages)
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
    advantage: Advantage = "grpo",
    weights: Sequence[float] | None = None,
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    left_out: Collection[int] = (),
) -> tuple[float, float]:
    """The mean of the groups' standard deviations (ddof 1) of the weighted sum, and the part of the groups in which
    nothing differs of what advantages compare, so that they are 0 for any `scale_rewards`.

    Groups with fewer than two rewards have no deviation; NaN where no group has. Arguments as for `compute_advantages`.
    """
    table = RewardTable(rewards, num_generations, weights, left_out)
    within = _spread(table.totals(num_generations).values)
    if advantage != "grpo":
        values = _OTHERS[advantage](table.totals(num_generations), "none")
        without = mx.all(mx.isnan(values) | (values == 0.0), axis=-1)
        return float(_mean(within.reshape(1, -1))), float(mx.mean(without.astype(mx.float32)))
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


def leave_one_out(rewards: Rows, scale_rewards: ScaleRewards) -> mx.array:
    """R_i − the mean of the other rewards of its group, (B/G, G); a lone reward has none.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740) as TRL has it; "batch" is its `normalize_advantages`.
    """
    values = rewards.values
    others = mx.sum(mx.logical_not(mx.isnan(values)), axis=-1, keepdims=True) - 1
    advantages = mx.where(others > 0, _centered(values) * (others + 1) / mx.maximum(others, 1), math.nan)
    return _normalized(advantages) if scale_rewards == "batch" else advantages


def over_the_mean(rewards: Rows, scale_rewards: ScaleRewards) -> mx.array:
    """(R_i − mean) / (mean + 1e-6) of its group, (B/G, G) (MaxRL, Tajwar et al. 2026, arXiv:2602.02710).

    The mean is how often the policy succeeds: the rarer, the more a success counts. It is meant for rewards of 0 and
    above; a group whose mean is not above 0 has the advantages 0.
    """
    mean = rewards.means + _mean(rewards.values)
    return mx.where(mean > 0.0, _centered(rewards.values) / (mean + _OF_MEAN), 0.0)


def of_the_best(rewards: Rows, scale_rewards: ScaleRewards) -> mx.array:
    """The best of a group has its lead over the second best, all others 0, (B/G, G): what it adds to the best of G
    (Pass@k, Walder and Karkhanis 2025, arXiv:2503.19595, as verl has it). "group" divides by σ + 1e-6.
    """
    values = rewards.values
    if values.shape[-1] < 2:
        return mx.zeros_like(values)
    ranked = mx.sort(mx.where(mx.isnan(values), -math.inf, values), axis=-1)
    best, second = ranked[..., -1:], ranked[..., -2:-1]
    lead = mx.where(second > -math.inf, best - second, 0.0)
    if scale_rewards == "group":
        lead = lead / (mx.where(lead > 0.0, _std(values), 0.0) + _OF_BEST)
    return mx.where(values == best, lead, 0.0)


_OTHERS: dict[str, Callable[[Rows, ScaleRewards], mx.array]] = {
    "rloo": leave_one_out,
    "maxrl": over_the_mean,
    "grpo_passk": of_the_best,
}
"""Advantages, but "grpo": the rewards of groups (B/G, G), what divides → (B/G, G), NaN where there is none."""


def _normalized(x: mx.array) -> mx.array:
    """Numbers that have the mean 0 in each group, over the deviation of all; the same shape."""
    flat = x.reshape(1, -1)
    # Each group's numbers have mean 0 and so has the batch, but for rounding, which is no signal.
    return _divided(mx.where(flat == 0.0, 0.0, _centered(flat)), _spread(flat)).reshape(x.shape)


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
