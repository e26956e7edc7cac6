"""Where groups become a batch, and where the algorithm meets the language model.

For the Learner actor and for whoever wants one step without actors.

Shapes: B = groups × G rows, P and T the longest prompt and completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx

from troupe.actors.learner.statistics import (
    advantage_statistics,
    advantages_of,
    group_statistics,
    is_truncated,
    num_tokens,
    spread_statistics,
)
from troupe.grpo import Batch, LearnerConfig, make_batch
from troupe.messages import Rollout, ScoredGroup
from troupe.policy import CompletedGroup, Qwen3Config, Weights, completion_gradients, completion_statistics
from troupe.policy.gradient.chunks import Chunk

Extra = TypeVar("Extra")


def as_rollouts(group: CompletedGroup, decode: Callable[[Sequence[int]], str]) -> tuple[Rollout, ...]:
    """The engine's completions as messages, with their texts."""
    return tuple(
        Rollout(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            sampling_log_probs=completion.sampling_log_probs,
            versions=completion.versions,
            finish_reason=completion.finish_reason,
            text=decode(completion.token_ids),
        )
        for completion in group.completions
    )


class Assembled(NamedTuple):
    """A batch ready to be learned from, with what can be said about it before learning."""

    batch: Batch
    advantages: tuple[tuple[float, ...], ...]
    """(groups, G), of completions that are left out of the batch too."""
    metrics: dict[str, float]
    """Rewards, completions and advantages of the batch under TRL's names."""


class CompletionLogProbs:
    """The `PolicyLogProbs` of a Qwen3 model: log-probs and entropies of completions, both float32 (B, T), in nats.

    Both are of the distribution softmax(logits / temperature). `recompute`: a gradient computes the inside of each
    layer again instead of keeping it (activation checkpointing). Without `entropy_gradient` entropies are constants.
    """

    def __init__(
        self, config: Qwen3Config, temperature: float, *, recompute: bool = False, entropy_gradient: bool = True
    ) -> None:
        self._config = config
        self._temperature = temperature
        self._recompute = recompute
        self._entropy_gradient = entropy_gradient

    def __call__(self, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        """Log-probs and entropies."""
        return completion_statistics(self._config, weights, batch.prompts, batch.completions, self._temperature)

    def gradients(
        self, weights: Weights, batch: Batch, loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]]
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """The gradients of `loss` by the weights, backwards through the network by hand."""
        return completion_gradients(
            self._config,
            weights,
            batch.prompts,
            batch.completions,
            lambda statistics: loss(*statistics),
            self._temperature,
            recompute=self._recompute,
            entropy_gradient=self._entropy_gradient,
        )


def assemble(
    groups: Sequence[ScoredGroup],
    config: LearnerConfig,
    *,
    weights: Mapping[str, float],
    pad_id: int,
    oldest: int | None = None,
) -> Assembled:
    """Turn scored groups of G completions each into one batch, in the order given.

    `weights` maps each reward's name to its weight. Scores that are missing are NaN to the advantages, never 0.
    Tokens that versions before `oldest` made are left out of the loss, and completions of which none is left out of
    the batch; advantages still compare all completions of a group. ValueError where no completion is left.
    """
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    G = len(groups[0].group.rollouts)
    advantages = advantages_of(groups, config, weights)
    batch = make_batch(
        [group.group.prompt.prompt_ids for group in groups for _ in range(G)],
        [rollout.token_ids for rollout in rollouts],
        [rollout.log_probs for rollout in rollouts],
        advantages,
        pad_id=pad_id,
        truncated=[is_truncated(rollout) for rollout in rollouts],
    )
    if oldest is not None:
        batch = batch.with_tokens([[version >= oldest for version in rollout.versions] for rollout in rollouts])
    metrics = {
        **group_statistics(groups, config, weights),
        **spread_statistics(groups, config, weights),
        **advantage_statistics(advantages),
        "num_tokens": float(num_tokens(groups)),
    }
    values: list[float] = advantages.tolist()  # type: ignore[assignment]
    by_group = tuple(tuple(values[i : i + G]) for i in range(0, len(values), G))
    return Assembled(batch=batch, advantages=by_group, metrics=metrics)
