"""Advantages by turn: what each turn of an episode brought, compared with other turns from the same state (GiGPO, Feng
et al. 2025, arXiv:2505.10978).

Episodes of one prompt often pass through the same states. Turns that begin in one are compared with each other:
    A(turn) = (R − mean of R over the turns from its state) / F,  R = Σ_k γ^k · reward of the k-th turn from it on,
with F the standard deviation (ddof 1) + 1e-4, or 1. It is added, times ω, to the episode's own advantage.

All is computed in float64 on the host: a step has some hundreds of turns.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from troupe.grpo.advantages import EPSILON
from troupe.grpo.config import ScaleRewards


def discounted_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """Of each turn its reward and those that follow, each γ times as much as the one before; as many as `rewards`."""
    returns: list[float] = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def turn_advantages(
    returns: Sequence[float], states: Sequence[Hashable | None], scale_rewards: ScaleRewards = "group"
) -> list[float]:
    """The advantages of turns, each with its return and the state that it began in (None: not known).

    A turn of an unknown state, or of one in which no other turn began, has 0, and so have those of a state whose
    returns are all equal. `scale_rewards`: "group" divides by the deviation of a state's returns, "batch" by that of
    all turns that are compared, "none" by nothing.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for turn, state in enumerate(states):
        if state is not None:
            members[state].append(turn)
    groups = [turns for turns in members.values() if len(turns) > 1]
    of_all = _deviation([returns[turn] for turns in groups for turn in turns]) if scale_rewards == "batch" else 0.0
    advantages = [0.0] * len(returns)
    for turns in groups:
        values = [returns[turn] for turn in turns]
        if max(values) == min(values):
            continue
        mean = math.fsum(values) / len(values)
        scale = 1.0
        if scale_rewards != "none":
            scale = EPSILON + (of_all if scale_rewards == "batch" else _deviation(values))
        for turn, value in zip(turns, values, strict=True):
            advantages[turn] = (value - mean) / scale
    return advantages


def compared_part(states: Sequence[Hashable | None]) -> float:
    """Which part of the turns began in a state in which another one began too; 0 of no turns."""
    known = [state for state in states if state is not None]
    counts: dict[Hashable, int] = defaultdict(int)
    for state in known:
        counts[state] += 1
    return sum(counts[state] > 1 for state in known) / max(len(states), 1)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation, ddof 1; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
