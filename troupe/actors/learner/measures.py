"""How old and how many a step's tokens are, how its groups ended, and what it took."""

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from troupe.actors.learner.gathering import StepGroups, slot_of, stale_tokens
from troupe.actors.learner.rollouts import num_sampled, sampled_versions
from troupe.messages import ScoredGroup


def staleness_statistics(groups: Sequence[ScoredGroup], newest: int) -> dict[str, float]:
    """How many versions the weights that sampled a token were behind `newest`: the mean and the largest over tokens."""
    behind = [
        newest - v for group in groups for rollout in group.group.rollouts for v in sampled_versions(rollout)
    ] or [0]
    return {"staleness": sum(behind) / len(behind), "staleness/max": float(max(behind))}


def end_statistics(step: StepGroups) -> dict[str, float]:
    """How many groups of a step ended how, and which part of the tokens that was."""
    sampled = max(sampled_tokens(step.groups), 1)
    stale = sum(stale_tokens(group, step.oldest) for group in step.groups)
    return {
        "groups/trained": float(len(step.ending("trained"))),
        "groups/filtered": float(len(step.ending("filtered"))),
        "groups/stale": float(len(step.ending("stale"))),
        "groups/quarantined": float(len(step.ending("quarantined"))),
        "groups/resampled": float(sum(slot_of(group).attempt > 0 for group in step.groups)),
        "groups/filtered_token_fraction": sampled_tokens(step.ending("filtered")) / sampled,
        "tokens/stale_fraction": stale / sampled,
    }


class StepMeter:
    """Measures how long each step takes, from the end of the one before, and the most memory that was in use."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        peak_bytes: Callable[[], int] = mx.get_peak_memory,
        reset_peak: Callable[[], None] = mx.reset_peak_memory,
    ) -> None:
        self._clock, self._peak_bytes, self._reset_peak = clock, peak_bytes, reset_peak
        self._began_s = 0.0

    def begin(self) -> None:
        """The first step begins."""
        self._began_s = self._clock()
        self._reset_peak()

    def measure_step(self) -> tuple[float, int]:
        """Seconds and bytes of the step that ends now, at which the next begins."""
        now_s = self._clock()
        seconds, self._began_s = now_s - self._began_s, now_s
        peak = self._peak_bytes()
        self._reset_peak()
        return seconds, peak


def sampled_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Tokens of all completions that the policy sampled."""
    return sum(num_sampled(rollout) for group in groups for rollout in group.group.rollouts)


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Sampled tokens of all completions, and those of the prompt of each completion, as TRL counts them."""
    return sum(
        len(group.group.prompt.prompt_ids) + num_sampled(rollout)
        for group in groups
        for rollout in group.group.rollouts
    )
