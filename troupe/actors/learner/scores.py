"""What the scores of groups come to: rewards, advantages, whether something can be learned, and their figures.

Shapes: B = groups × G completions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from troupe.actors.learner.episodes import Turns, compared_turns, episode_statistics
from troupe.actors.learner.rollouts import length_statistics, logged_means, thought_statistics
from troupe.dataset import CurriculumConfig
from troupe.dataset.curriculum import pass_rate
from troupe.grpo import LearnerConfig, compute_advantages, reward_statistics, spread_within_groups
from troupe.messages import ScoredGroup


def score_table(groups: Sequence[ScoredGroup], names: Sequence[str]) -> mx.array:
    """Scores (B, F), float64, one column a name; NaN where a score is missing."""
    return mx.array(
        [
            [math.nan if score is None else score for score in row]
            for group in groups
            for row in zip(*(group.scores[name] for name in names), strict=True)
        ],
        dtype=mx.float64,
    )


def score_arguments(
    groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]
) -> dict[str, Any]:
    """What every function of scores in `grpo.advantages` is given.

    Completions have no reward of which some score is missing through a fault.
    """
    G = len(groups[0].group.rollouts)
    return {
        "rewards": score_table(groups, list(weights)),
        "num_generations": G,
        "weights": list(weights.values()),
        "multi_objective_aggregation": config.multi_objective_aggregation,
        "left_out": [place * G + sample for place, group in enumerate(groups) for sample in group.faulted],
    }


def advantages_of(groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]) -> mx.array:
    """Advantages (B,) by the learner's settings; `weights` maps each reward's name to its weight."""
    table = score_arguments(groups, config, weights)
    return compute_advantages(**table, scale_rewards=config.scale, advantage=config.advantage)


def turns_of(groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float], gamma: float) -> Turns:
    """The turns of all completions, compared by the learner's settings."""
    rewards = [reward for group in groups for reward in weighted_rewards(group, weights)]
    return compared_turns([group.group for group in groups], rewards, gamma, config.scale)


def weighted_rewards(group: ScoredGroup, weights: Mapping[str, float]) -> tuple[float | None, ...]:
    """(G,) Σ weight·score of each completion over the scores that are there; None where none is, or where one is
    missing through a fault."""
    if group.group.supervised:
        return (None,) * len(group.group.rollouts)
    rewards: list[float | None] = []
    for sample, row in enumerate(zip(*(group.scores[name] for name in weights), strict=True)):
        present = [w * s for w, s in zip(weights.values(), row, strict=True) if s is not None]
        rewards.append(math.fsum(present) if present and sample not in group.faulted else None)
    return tuple(rewards)


def pass_rates(
    groups: Sequence[ScoredGroup], weights: Mapping[str, float], config: CurriculumConfig
) -> list[tuple[int, float | None]]:
    """Row and pass rate of each group; None where no completion has a score that counts."""
    rates = []
    for group in groups:
        scores: Sequence[float | None] = weighted_rewards(group, weights)
        if config.reward is not None:
            faulted, named = group.faulted, group.scores[config.reward]
            scores = [None if sample in faulted else score for sample, score in enumerate(named)]
        rates.append((group.group.prompt.row, pass_rate(scores, config.passes_from)))
    return rates


def has_signal(group: ScoredGroup, config: LearnerConfig, weights: Mapping[str, float], gamma: float = 1.0) -> bool:
    """Whether some advantage of the group, taken alone, is not 0: of a completion or, where there are such, of a turn.

    Without signal are groups whose weighted rewards, as far as they are there, are all equal. That holds for every
    `scale_rewards`, since each compares a completion with its own group first; also where rewards are normalized one by
    one and cancel out; with "grpo_passk" those without a best one, with "maxrl" those whose mean is not above 0.
    """
    if group.group.supervised:
        return True
    if mx.any(advantages_of([group], config, weights) != 0.0).item():
        return True
    return config.turn_advantages != "off" and any(map(any, turns_of([group], config, weights, gamma).advantages))


def group_statistics(
    groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]
) -> dict[str, float]:
    """Rewards and completions of the groups, and what reward functions logged themselves (mean over the groups)."""
    table = score_arguments(groups, config, weights)
    rewards = reward_statistics(**table, scale_rewards=config.scale, names=list(weights))
    # what rewards log comes first: it may not stand in for the metrics that are ours
    return {
        **logged_means(groups),
        **rewards,
        **quantile_statistics([reward for group in groups for reward in weighted_rewards(group, weights)]),
        **length_statistics([rollout for g in groups for rollout in g.group.rollouts]),
        **thought_statistics(groups),
        **episode_statistics([g.group for g in groups]),
    }


def quantile_statistics(rewards: Sequence[float | None]) -> dict[str, float]:
    """`reward/q10`, `/q25`, `/q50`, `/q75` and `/q90` of the rewards that are there, between two of them in proportion;
    NaN where there is none."""
    there = sorted(reward for reward in rewards if reward is not None)
    found = {}
    for percent in (10, 25, 50, 75, 90):
        below, part = divmod(percent * (len(there) - 1), 100)
        pair = there[below : below + 2] if there else [math.nan]
        found[f"reward/q{percent}"] = pair[0] + (pair[-1] - pair[0]) * part / 100
    return found


def spread_statistics(
    groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]
) -> dict[str, float]:
    """`reward_std_within_groups`, the mean of the groups' own standard deviations, and `frac_reward_zero_std`, the part
    of the groups without signal.

    TRL's figures of these names are those of `reward_statistics`: it takes the deviation of the batch for the second
    where the batch is what scales, and so counts no group then.
    """
    arguments = score_arguments(groups, config, weights)
    within, part = spread_within_groups(**arguments, advantage=config.advantage)
    return {"reward_std_within_groups": within, "frac_reward_zero_std": part}


def advantage_statistics(advantages: mx.array) -> dict[str, float]:
    """Mean, standard deviation (ddof 1, 0 of one number) and mean size of (B,) advantages, and the part that is 0."""
    values: list[float] = advantages.tolist()  # type: ignore[assignment]
    B = len(values)
    mean = math.fsum(values) / B
    return {
        "advantages/mean": mean,
        "advantages/std": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(B - 1, 1)),
        "advantages/abs_mean": math.fsum(map(abs, values)) / B,
        "advantages/frac_zero": sum(value == 0.0 for value in values) / B,
    }
