"""The rows of completions: each a prompt with tokens behind it, as the learner computes them.

A completion is one row; an episode whose history is told anew in the middle is several.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from troupe.actors.learner.rollouts import is_sampled
from troupe.messages import Rollout, RolloutGroup


class Row(NamedTuple):
    """Some tokens of a completion, and the prompt that they follow."""

    group: int
    """Place of the group in its batch, from 0."""
    sample: int
    """Place of the completion in its group, from 0."""
    number: int
    """Which row of its completion, from 0."""
    rollout: Rollout
    """Of which these tokens are a part."""
    start: int
    stop: int
    prompt_ids: Sequence[int]
    sampled: Sequence[bool]
    """Which of the tokens were sampled."""
    experts: tuple[bytes, bytes]
    """Where recorded, those of the prompt and of the tokens."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """From `start` to `stop`."""
        return self.rollout.token_ids[self.start : self.stop]

    @property
    def log_probs(self) -> tuple[float, ...]:
        """Of these tokens."""
        return self.rollout.log_probs[self.start : self.stop]

    @property
    def teacher_log_probs(self) -> tuple[float, ...]:
        """Of these tokens; their own where no teacher was asked."""
        said = self.rollout.teacher_log_probs or self.rollout.log_probs
        return said[self.start : self.stop]

    def has_young(self, oldest: int) -> list[bool]:
        """Which tokens were sampled from a version that is not before `oldest`."""
        versions = self.rollout.versions[self.start : self.stop]
        return [own and version >= oldest for own, version in zip(self.sampled, versions, strict=True)]


def rows_of(groups: Sequence[RolloutGroup]) -> list[Row]:
    """The rows of all completions: first those that completions begin with, group by group, then the second ones, and
    so on, so that prompts that completions share are neighbours.

    A row in which nothing was sampled is left out, unless its completion has no other.
    """
    rows = [
        row
        for place, group in enumerate(groups)
        for sample, rollout in enumerate(group.rollouts)
        for row in _rows_of(rollout, group, place, sample)
    ]
    return sorted(rows, key=lambda row: row.number)  # a stable sort


def _rows_of(rollout: Rollout, group: RolloutGroup, place: int, sample: int) -> list[Row]:
    T, sampled = len(rollout.token_ids), is_sampled(rollout)
    starts = [row.start for row in rollout.rows]
    prompts: list[tuple[Sequence[int], bytes]] = [(row.prompt_ids, row.prompt_experts) for row in rollout.rows]
    if not starts or starts[0] > 0:
        starts, prompts = [0, *starts], [(group.prompt.prompt_ids, group.prompt_experts), *prompts]
    made = []
    for number, ((start, stop), (prompt_ids, of_prompt)) in enumerate(
        zip(pairwise([*starts, T]), prompts, strict=True)
    ):
        experts = of_prompt, _experts_of(rollout, start, stop)
        made.append(Row(place, sample, number, rollout, start, stop, prompt_ids, sampled[start:stop], experts))
    return [row for row in made if any(row.sampled)] or made[:1]


def _experts_of(rollout: Rollout, start: int, stop: int) -> bytes:
    """Of a row's tokens but its last; empty where they are not known."""
    recorded, tokens = rollout.experts, len(rollout.token_ids) - 1
    if not recorded or (start, stop) == (0, tokens + 1):
        return recorded
    each, odd = divmod(len(recorded), tokens)
    return b"" if odd else recorded[start * each : (stop - 1) * each]
