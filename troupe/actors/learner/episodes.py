"""What episodes say: their turns compared with each other, and their figures."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from troupe.grpo import ScaleRewards, compared_part, discounted_returns, turn_advantages
from troupe.messages import Answer, Episode, RolloutGroup

MOST_TOOLS = 64
"""Tools that have figures of their own."""


class Turns(NamedTuple):
    """The turns of completions, compared where they began in the same state."""

    advantages: list[list[float]]
    """Of each completion, one a turn."""
    compared: float
    """Which part of the turns is compared with others."""


def compared_turns(
    groups: Sequence[RolloutGroup], rewards: Sequence[float | None], gamma: float, scale_rewards: ScaleRewards
) -> Turns:
    """Advantages of all turns, see `grpo.turns`. Turns are compared within their group.

    `rewards`: of each completion, group by group. Where no turn of an episode has a reward, that of the completion
    counts as its last turn's. Completions without a reward have no turns that count.
    """
    returns: list[float] = []
    states: list[Hashable | None] = []
    counts: list[int] = []
    reward_of = iter(rewards)
    for place, group in enumerate(groups):
        for episode in group.episodes or [None] * len(group.rollouts):
            reward = next(reward_of)
            if episode is None:
                counts.append(0)
                continue
            before = [episode.opening, *(turn.answer for turn in episode.turns[:-1])] if episode.turns else []
            is_out = reward is None or bool(episode.failed)
            states += [None if is_out or a.state is None else (place, a.state) for a in before]
            returns += discounted_returns(_turn_rewards(episode, 0.0 if reward is None else reward), gamma)
            counts.append(len(episode.turns))
    values = iter(turn_advantages(returns, states, scale_rewards))
    return Turns([[next(values) for _ in range(count)] for count in counts], compared_part(states))


def _turn_rewards(episode: Episode, reward: float) -> list[float]:
    given = [turn.answer.reward for turn in episode.turns]
    if given and all(one is None for one in given):
        given[-1] = reward
    return [0.0 if one is None else one for one in given]


def episode_statistics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Turns, observations, calls of tools and time waited, over all episodes; nothing where there are none.

    `tools/call_frequency` (calls a completion) and `tools/failure_frequency` (failed calls a call) are TRL's. Seconds:
    of `environments/…` an episode's, from its opening to its last answer; of `tools/…` a call's.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    if not episodes:
        return {}
    rollouts = [rollout for group in groups if group.episodes for rollout in group.rollouts]
    turns = [len(episode.turns) for episode in episodes]
    calls = [call for episode in episodes for answer in _answers(episode) for call in answer.calls]
    observed = [stop - start for rollout in rollouts for start, stop in rollout.observed]
    return {
        "turns/mean": _mean(turns),
        "turns/min": float(min(turns)),
        "turns/max": float(max(turns)),
        "observations/mean_tokens": sum(observed) / len(episodes),
        "tools/call_frequency": len(calls) / len(episodes),
        "tools/failure_frequency": sum(bool(call.error) for call in calls) / max(len(calls), 1),
        "environments/failed": _mean([bool(episode.failed) for episode in episodes]),
        **_waits(episodes),
    }


def _waits(episodes: Sequence[Episode]) -> dict[str, float]:
    """Seconds waited: of all episodes, of each environment where there are several, of each tool that was called."""
    by_name: dict[str, list[float]] = defaultdict(list)
    by_tool: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        answers = list(_answers(episode))
        by_name[episode.environment].append(math.fsum(answer.seconds for answer in answers))
        for answer in answers:
            for call in answer.calls:
                if call.seconds > 0.0:  # what a policy invents is never called
                    by_tool[call.name].append(call.seconds)
    waits = {"environments/wait_s": _mean([seconds for column in by_name.values() for seconds in column])}
    if len(by_name) > 1:
        waits |= {f"environments/{name}/wait_s": _mean(column) for name, column in sorted(by_name.items()) if name}
    for name in sorted(by_tool)[:MOST_TOOLS]:
        waits[f"tools/{name}/wait_s"] = _mean(by_tool[name])
    return waits


def _answers(episode: Episode) -> Iterator[Answer]:
    yield episode.opening
    for turn in episode.turns:
        yield turn.answer


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
