"""Where groups become a batch, what they say before anything is learned from them, and where the algorithm meets the
language model.

Shapes: B = groups × G rows, P and T the longest prompt and completion, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from troupe.actors.learner.gathering import StepGroups, slot_of, stale_tokens
from troupe.actors.learner.rollouts import is_truncated, length_statistics, logged_means
from troupe.grpo import Batch, LearnerConfig, compute_advantages, make_batch, reward_statistics, spread_within_groups
from troupe.messages import Rollout, ScoredGroup
from troupe.policy import CompletedGroup, NetworkConfig, Weights, completion_gradients, completion_statistics
from troupe.policy.adapter.base import Base
from troupe.policy.gradient.backward import Chunk
from troupe.policy.network.dropout import Dropout, row_keys, token_keys
from troupe.policy.network.routes import Given, Routes, rows_of_tokens

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
            experts=completion.experts,
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


@dataclass(frozen=True)
class CompletionLogProbs:
    """The `PolicyLogProbs` of a model: log-probs and entropies of completions, both float32 (B, T), in nats.

    Both are of the distribution softmax(logits / temperature). `recompute`: a gradient computes the inside of each
    layer again instead of keeping it (activation checkpointing). Without `entropy_gradient` entropies are constants.
    """

    config: NetworkConfig
    temperature: float
    recompute: bool = False
    entropy_gradient: bool = True
    base: Base = field(default_factory=Base)
    """What the weights complete; empty: they are the whole network."""
    seed: int = 0
    """Of the run, for dropout."""

    def routes(self, batch: Batch, *, follows: bool, balance: float = 0.0) -> Routes | None:
        """Those of one pass over a batch."""
        if not self.config.sparse_layers:
            return None
        rows = batch.prompts, batch.completions
        given = None if batch.experts is None else Given.of(self.config, *rows, batch.experts)
        stands_in = rows_of_tokens(*rows) if balance else None
        return Routes(self.config, given, follows=follows, balance=balance, rows_of_token=stands_in)

    def __call__(self, weights: Weights, batch: Batch, routes: Routes | None = None) -> tuple[mx.array, mx.array]:
        """Log-probs and entropies."""
        network, rows = self.base.completed(self.config, weights), (batch.prompts, batch.completions)
        return completion_statistics(self.config, network, *rows, self.temperature, routes=routes)

    def gradients(
        self,
        weights: Weights,
        batch: Batch,
        loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]],
        routes: Routes | None = None,
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """The gradients of `loss` by the weights, backwards through the network by hand."""
        network = self.base.completed(self.config, weights)
        chunks = completion_gradients(
            self.config,
            network,
            batch.prompts,
            batch.completions,
            lambda statistics: loss(*statistics),
            self.temperature,
            recompute=self.recompute,
            entropy_gradient=self.entropy_gradient,
            of_base=not self.base.is_whole,
            dropout=self._dropout(batch),
            routes=routes,
        )
        return self._of_trained(network, chunks) if self.base.is_whole else chunks

    @property
    def has_dropout(self) -> bool:
        """Whether gradients drop something; log-probs alone are those of the policy as it is sampled from."""
        return self.base.adapter is not None and self.base.adapter.dropout > 0.0

    def _dropout(self, batch: Batch) -> Dropout | None:
        if self.base.adapter is None or not self.has_dropout:
            return None
        assert batch.keys is not None
        keys = token_keys(batch.prompts, batch.completions, batch.keys, seed=self.seed, pass_number=batch.pass_number)
        return Dropout(self.base.adapter.dropout, keys)

    def _of_trained(
        self, network: Weights, chunks: Generator[Chunk, None, tuple[mx.array, Extra]]
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """Chunks with gradients by a completed network → with those by what is trained."""
        while True:
            try:
                arrays, portion = next(chunks)
            except StopIteration as end:
                result: tuple[mx.array, Extra] = end.value
                return result
            yield arrays, self.base.gradients(network, portion)
            del arrays, portion


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
    prompts = [group.group.prompt for group in groups]
    step = max(prompt.slot.step for prompt in prompts)
    keys = [key for prompt in prompts for key in row_keys(prompt.gid, G, prompt.prompt_ids, step)]
    batch = replace(batch, keys=tuple(keys), experts=_recorded_experts(groups))
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


def _recorded_experts(groups: Sequence[ScoredGroup]) -> tuple[tuple[bytes, bytes], ...] | None:
    """Of each row those of prompt and completion; None where none are recorded."""
    rows = tuple((group.group.prompt_experts, rollout.experts) for group in groups for rollout in group.group.rollouts)
    return rows if any(prompt for prompt, _ in rows) else None


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


def _score_arguments(
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
    table = _score_arguments(groups, config, weights)
    return compute_advantages(**table, scale_rewards=config.scale_rewards)


def weighted_rewards(group: ScoredGroup, weights: Mapping[str, float]) -> tuple[float | None, ...]:
    """(G,) Σ weight·score of each completion over the scores that are there; None where none is, or where one is
    missing through a fault."""
    rewards: list[float | None] = []
    for sample, row in enumerate(zip(*(group.scores[name] for name in weights), strict=True)):
        present = [w * s for w, s in zip(weights.values(), row, strict=True) if s is not None]
        rewards.append(math.fsum(present) if present and sample not in group.faulted else None)
    return tuple(rewards)


def has_signal(group: ScoredGroup, config: LearnerConfig, weights: Mapping[str, float]) -> bool:
    """Whether some advantage of the group, taken alone, is not 0.

    Without signal are groups whose weighted rewards, as far as they are there, are all equal. That holds for every
    `scale_rewards`, since each compares a completion with its own group first; also where rewards are normalized one by
    one and cancel out.
    """
    return bool(mx.any(advantages_of([group], config, weights) != 0.0).item())


def group_statistics(
    groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]
) -> dict[str, float]:
    """Rewards and completions of the groups, and what reward functions logged themselves (mean over the groups)."""
    table = _score_arguments(groups, config, weights)
    rewards = reward_statistics(**table, scale_rewards=config.scale_rewards, names=list(weights))
    # what rewards log comes first: it may not stand in for the metrics that are ours
    return {
        **logged_means(groups),
        **rewards,
        **length_statistics([rollout for g in groups for rollout in g.group.rollouts]),
    }


def spread_statistics(
    groups: Sequence[ScoredGroup], config: LearnerConfig, weights: Mapping[str, float]
) -> dict[str, float]:
    """`reward_std_within_groups`, the mean of the groups' own standard deviations, and `frac_reward_zero_std`, the part
    of the groups without signal.

    TRL's figures of these names are those of `reward_statistics`: it takes the deviation of the batch for the second
    where the batch is what scales, and so counts no group then.
    """
    within, part = spread_within_groups(**_score_arguments(groups, config, weights))
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


def staleness_statistics(groups: Sequence[ScoredGroup], newest: int) -> dict[str, float]:
    """How many versions the weights that sampled a token were behind `newest`: the mean and the largest over tokens."""
    behind = [newest - v for group in groups for rollout in group.group.rollouts for v in rollout.versions] or [0]
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
    """Tokens of all completions."""
    return sum(len(rollout.token_ids) for group in groups for rollout in group.group.rollouts)


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Tokens of all completions, and of the prompt of each completion, as TRL counts them."""
    return sum(
        len(group.group.prompt.prompt_ids) + len(rollout.token_ids)
        for group in groups
        for rollout in group.group.rollouts
    )
