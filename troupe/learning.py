"""Where groups become a batch, and where the algorithm meets the language model.

`grpo` knows arrays and no model, `policy` knows a model and no algorithm, messages know neither: these few functions
join them, for the Learner actor and for whoever wants one step without actors. No state, no I/O.

Shapes: B = groups × G rows, P and T the longest prompt and completion, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import msgspec

from troupe.grpo import (
    Batch,
    LearnerConfig,
    compute_advantages,
    entropy_from_logits,
    make_batch,
    reward_statistics,
    selective_log_softmax,
)
from troupe.messages import Rollout, ScoredGroup
from troupe.policy import CompletedGroup, Qwen3Config, Weights, hidden_states, project


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


class LearnerBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch ready to be learned from, with what can be said about it before learning."""

    batch: Batch
    metrics: dict[str, float]
    """Rewards, completions and advantages of the batch under TRL's names."""


def completion_log_probs(
    config: Qwen3Config, temperature: float
) -> Callable[[Weights, Batch], tuple[mx.array, mx.array]]:
    """The function (weights, batch) → log-probs and entropies of the completion tokens, both float32 (B, T), in nats.

    Both are of the distribution softmax(logits / temperature). Only positions that foretell a completion token are
    projected to the vocabulary.
    """

    def log_probs(weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        P = batch.prompt_ids.shape[1]
        padding = mx.array([P - length for length in batch.prompt_lengths], dtype=mx.int32)
        ids = mx.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
        ragged = any(length != P for length in batch.prompt_lengths)
        hidden = hidden_states(config, weights, ids[:, :-1], lengths_of_left_padding=padding if ragged else None)
        logits = project(config, weights, hidden[:, P - 1 :]).astype(mx.float32)
        if temperature != 1.0:
            logits = logits * (1.0 / temperature)
        return selective_log_softmax(logits, batch.completion_ids), entropy_from_logits(logits)

    return log_probs


def is_usable(group: ScoredGroup, min_scored: int) -> bool:
    """Whether at least `min_scored` completions of the group have a score from some reward."""
    columns = group.scores.values()
    scored = sum(any(score is not None for score in row) for row in zip(*columns, strict=True))
    return scored >= min_scored


def assemble(
    groups: Sequence[ScoredGroup],
    config: LearnerConfig,
    *,
    weights: Mapping[str, float],
    pad_id: int,
) -> LearnerBatch:
    """Turn scored groups of G completions each into one batch, in the order given.

    `weights` maps each reward's name to its weight. Scores that are missing are NaN to the advantages, never 0.
    """
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    G = len(groups[0].group.rollouts)
    scores = mx.array(
        [
            [math.nan if score is None else score for score in row]
            for group in groups
            for row in zip(*(group.scores[name] for name in weights), strict=True)
        ]
    )
    advantages = compute_advantages(
        scores,
        G,
        config.scale_rewards,
        weights=list(weights.values()),
        multi_objective_aggregation=config.multi_objective_aggregation,
    )
    batch = make_batch(
        [group.group.prompt.prompt_ids for group in groups for _ in range(G)],
        [rollout.token_ids for rollout in rollouts],
        [rollout.log_probs for rollout in rollouts],
        advantages,
        pad_id=pad_id,
        truncated=[rollout.finish_reason != "stop" for rollout in rollouts],
    )
    statistics = reward_statistics(
        scores,
        G,
        config.scale_rewards,
        weights=list(weights.values()),
        multi_objective_aggregation=config.multi_objective_aggregation,
        names=list(weights),
    )
    # what rewards log comes first: it may not stand in for the metrics that are ours
    return LearnerBatch(batch=batch, metrics={**_logged_metrics(groups), **statistics, **_completion_metrics(batch)})


def _logged_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean over the groups of what reward functions logged themselves."""
    names = {name for group in groups for name in group.logged}
    values = {name: [group.logged[name] for group in groups if name in group.logged] for name in sorted(names)}
    return {name: math.fsum(column) / len(column) for name, column in values.items()}


def _completion_metrics(batch: Batch) -> dict[str, float]:
    lengths = batch.completion_lengths
    ended = [length for length, cut in zip(lengths, batch.truncated, strict=True) if not cut] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(batch.truncated) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
        "num_tokens": float(batch.num_tokens),
    }
