"""What a batch's completions are like, and what rewards logged of them: figures of rollouts alone."""

import math
from collections.abc import Sequence

from troupe.messages import Rollout, ScoredGroup
from troupe.policy.text.tokenizer import CLOSED, OPENED


def is_truncated(rollout: Rollout) -> bool:
    """Whether a completion was cut: by the length limit, or for repeating itself.

    TRL looks whether the last token is a stop id, and so counts a completion that a stop string ended as cut. Here it
    ended as it was asked to.
    """
    return rollout.finish_reason != "stop"


def is_sampled(rollout: Rollout) -> list[bool]:
    """(T,) which tokens the policy sampled: all but those that it was given to read."""
    flags = [True] * len(rollout.token_ids)
    for start, stop in rollout.observed:
        flags[start:stop] = [False] * (stop - start)
    return flags


def num_sampled(rollout: Rollout) -> int:
    """Tokens that the policy sampled."""
    return len(rollout.token_ids) - sum(stop - start for start, stop in rollout.observed)


def sampled_versions(rollout: Rollout) -> tuple[int, ...]:
    """The policy versions of the tokens that were sampled."""
    if not rollout.observed:
        return rollout.versions
    return tuple(version for version, own in zip(rollout.versions, is_sampled(rollout), strict=True) if own)


def logged_means(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What reward functions logged themselves, the mean over the groups."""
    names = {name for group in groups for name in group.logged if isinstance(name, str)}
    values = {name: [group.logged[name] for group in groups if name in group.logged] for name in sorted(names)}
    return {name: _mean(column) for name, column in values.items()}


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is no number, yet the mean is
        return math.fsum(value / len(values) for value in values)
    except ValueError:  # infinities that cancel out
        return math.nan


def length_statistics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths in sampled tokens, and how many were cut, under TRL's names."""
    lengths = [num_sampled(rollout) for rollout in rollouts]
    ended = [num_sampled(rollout) for rollout in rollouts if not is_truncated(rollout)]
    terminated = ended or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": (len(lengths) - len(ended)) / len(lengths),
        "completions/mean_terminated_length": sum(terminated) / len(terminated),
        "completions/min_terminated_length": float(min(terminated)),
        "completions/max_terminated_length": float(max(terminated)),
    }


def thought_statistics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Which part of the completions was cut before the thoughts had an end; nothing where none thinks."""
    rollouts = [(scored.group.prompt.opened, rollout) for scored in groups for rollout in scored.group.rollouts]
    thinking = [(opened, rollout) for opened, rollout in rollouts if OPENED in opened or OPENED in rollout.text]
    if not thinking:
        return {}
    cut = sum(is_truncated(rollout) and _thinks_on(opened + rollout.text) for opened, rollout in thinking)
    return {"completions/clipped_in_thoughts": cut / len(rollouts)}


def _thinks_on(text: str) -> bool:
    """Whether the last thoughts have no end."""
    return text.rfind(OPENED) > text.rfind(CLOSED)
