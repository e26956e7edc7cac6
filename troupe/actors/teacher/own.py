"""A policy that teaches itself: with weights that follow its own, and a prompt that says more.

The learner asks it about the groups of a step right before it learns from them, so that which average says what follows
from the number of the step alone, whenever a group was sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import msgspec

from troupe.actors.teacher.forward import TeacherForward, with_log_probs
from troupe.actors.teacher.settings import TeacherConfig
from troupe.grpo import sync_reference
from troupe.messages import ScoredGroup
from troupe.policy import Base, NetworkConfig, Weights


@dataclass(frozen=True)
class OwnTeacher:
    """Says how likely it finds completions that it has sampled without what it sees now."""

    settings: TeacherConfig
    network: NetworkConfig
    base: Base
    """What the weights complete; empty: they are the whole network."""
    temperature: float
    prompts: Sequence[tuple[int, ...]]
    """Row of the dataset → ids of the prompt with what the policy alone does not see."""

    def taught(self, groups: Sequence[ScoredGroup], average: Weights | None, weights: Weights) -> list[ScoredGroup]:
        """The groups with `teacher_log_probs`, by the average in the types of the policy's `weights`; by these where
        there is none."""
        if average is not None:
            weights = {name: average[name].astype(own.dtype) for name, own in weights.items()}
        forward = TeacherForward(self.network, weights, self.base, self.temperature)
        return [self._taught(scored, forward) for scored in groups]

    def _taught(self, scored: ScoredGroup, forward: TeacherForward) -> ScoredGroup:
        replace, group = msgspec.structs.replace, scored.group
        shown = replace(group, prompt=replace(group.prompt, prompt_ids=self.prompts[group.prompt.row]))
        said = [rollout.teacher_log_probs for rollout in forward.taught(shown).rollouts]
        return replace(scored, group=with_log_probs(group, said))

    def followed(self, average: Weights | None, weights: Weights, before: int, after: int) -> Weights | None:
        """The average behind a step that began when the policy had been updated `before` times, and ended `after`: once
        for every `sync_steps` updates it moves by `update_rate` to the new weights. Lazy."""
        if average is None or self.settings.model_kind != "ema":
            return average
        for _ in range(after // self.settings.sync_steps - before // self.settings.sync_steps):
            average = sync_reference(average, weights, self.settings.update_rate)
        return average


def first_average(settings: TeacherConfig, weights: Weights) -> Weights | None:
    """With which a policy of these weights begins to teach itself; a moving average is float32, whatever they are, so
    that small steps of it are not lost. None where it does so with the weights of now, or not at all. Lazy."""
    if settings.model_kind in (None, "live"):
        return None
    if settings.model_kind == "base":
        return weights
    return {name: own.astype(mx.float32) for name, own in weights.items()}
