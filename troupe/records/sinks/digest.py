"""What happened in a step, put together for those who keep curves, histograms and a few texts of it."""

import math

import msgspec

from troupe.messages import GroupClosed, RolloutGroup, Update
from troupe.records.conversations import as_text, conversation_in, sampled_tokens, shortened
from troupe.records.text import prompt_text

_MOST_BINS = 256
"""Of anybody's histogram."""
_MOST_OF_A_TEXT = 1000
"""Characters of what is said at once in a conversation, where a completion is given as text."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One completion with what became of it."""

    prompt: str
    text: str
    reward: float
    """Σ weight·score; NaN where no score is there."""
    scores: dict[str, float | None]
    tokens: int


class StepDigest(msgspec.Struct, frozen=True, kw_only=True):
    """One step: its metrics, and what its groups say one by one, groups that were not trained on included."""

    step: int
    metrics: dict[str, float]
    rewards: tuple[float, ...] = ()
    """Of every completion that has one; empty where they are too far apart, or too large, for a histogram."""
    lengths: tuple[int, ...] = ()
    """Tokens of every completion; what was observed in an episode is none of them."""
    samples: tuple[Sample, ...] = ()
    """From the best to the worst, evenly spaced between; empty in most steps."""

    @property
    def histograms(self) -> dict[str, tuple[float, ...]]:
        """Name → values, of those that have any."""
        told = {"rewards": self.rewards, "completions/lengths": self.lengths}
        return {name: values for name, values in told.items() if values}


class Digest:
    """Collects the groups of a step until its Update comes; a step that was told before is left out."""

    def __init__(self, *, newest: int = 0, samples: int = 4, every: int = 10) -> None:
        """`newest`: the step told last. `samples`: how many completions to keep of the first step, and of every
        `every`-th."""
        self.newest = newest
        self._most, self._every = samples, every
        self._groups: list[GroupClosed] = []

    def add(self, message: object) -> StepDigest | None:
        """What is told of the step that this message ends, if it ends one."""
        if isinstance(message, GroupClosed):
            self._groups.append(message)
        if not isinstance(message, Update):
            return None
        groups, self._groups = self._groups, []
        if message.step <= self.newest:
            return None
        self.newest = message.step
        wanted = self._most if message.step == 1 or message.step % self._every == 0 else 0
        return StepDigest(
            step=message.step,
            metrics=message.metrics,
            rewards=_binnable(
                tuple(r for group in groups for r in group.rewards if r is not None and math.isfinite(r))
            ),
            lengths=tuple(
                sampled_tokens(rollout)
                for group in groups
                if group.scored is not None
                for rollout in group.scored.group.rollouts
            ),
            samples=_spread([sample for group in groups for sample in samples_of(group)], wanted) if wanted else (),
        )


def samples_of(closed: GroupClosed) -> list[Sample]:
    """The completions of a group that has ended."""
    if closed.scored is None:
        return []
    group, scores = closed.scored.group, closed.scored.scores
    rewards = [math.nan if reward is None else reward for reward in closed.rewards]
    rewards += [math.nan] * (len(group.rollouts) - len(rewards))
    prompt = prompt_text(group.prompt.prompt)
    return [
        Sample(
            prompt=prompt,
            text=_text(group, i),
            reward=rewards[i],
            scores={name: column[i] for name, column in scores.items()},
            tokens=sampled_tokens(rollout),
        )
        for i, rollout in enumerate(group.rollouts)
    ]


def _text(group: RolloutGroup, sample: int) -> str:
    """What was said in an episode after its prompt, turn by turn; else the completion."""
    said = conversation_in(group, sample)
    if not said:
        return group.rollouts[sample].text
    first = next((place for place, one in enumerate(said) if one.turn), 0)
    return as_text(shortened(said[first:], _MOST_OF_A_TEXT))


def _binnable(values: tuple[float, ...]) -> tuple[float, ...]:
    """The values, if there are floats for the edges of bins between the least and the largest; packages that make
    histograms raise otherwise. Equal values have one bin's width of 1 about them."""
    if not values:
        return values
    least, largest = min(values), max(values)
    width = (largest - least) or 1.0
    return values if math.ulp(max(-least, largest)) * _MOST_BINS < width < math.inf else ()


def _spread(samples: list[Sample], most: int) -> tuple[Sample, ...]:
    ranked = sorted(samples, key=lambda sample: -math.inf if math.isnan(sample.reward) else sample.reward, reverse=True)
    if len(ranked) <= most:
        return tuple(ranked)
    return tuple(ranked[round(i * (len(ranked) - 1) / max(1, most - 1))] for i in range(most))
