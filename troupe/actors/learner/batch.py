"""Where groups become a batch, and where the algorithm meets the language model.

Shapes: B rows, groups × G or more (`rows.py`); P and T the longest prompt and completion, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import mlx.core as mx

from troupe.actors.learner.episodes import Turns
from troupe.actors.learner.measures import num_tokens
from troupe.actors.learner.rollouts import is_truncated
from troupe.actors.learner.rows import Row, rows_of
from troupe.actors.learner.scores import (
    advantage_statistics,
    advantages_of,
    group_statistics,
    spread_statistics,
    turns_of,
)
from troupe.actors.teacher.settings import TeacherConfig
from troupe.grpo import Batch, LearnerConfig, distilled_advantages, make_batch, sampled_divergence
from troupe.messages import Rollout, ScoredGroup
from troupe.policy import CompletedGroup, NetworkConfig, Weights, completion_gradients, completion_statistics
from troupe.policy.adapter.base import Base
from troupe.policy.gradient.backward import Chunk, completion_margins
from troupe.policy.network.dropout import Dropout, completion_key, prompt_key, token_keys
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
    """(groups, G), of completions that are left out of the batch too; empty where nothing is compared."""
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
    margins: bool = False
    """Give the loss of a gradient a third argument: how far each token lies below the likeliest, (B, T), 0 for that
    itself."""
    base: Base = field(default_factory=Base)
    """What the weights complete; empty: they are the whole network."""
    seed: int = 0
    """Of the run, for dropout."""
    deterministic: bool = True
    """As for `completion_gradients`."""

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

    def with_margins(self, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        """Log-probs at temperature 1, and margins, (B, T) each."""
        network = self.base.completed(self.config, weights)
        return completion_margins(self.config, network, batch.prompts, batch.completions)

    def gradients(
        self,
        weights: Weights,
        batch: Batch,
        loss: Callable[..., tuple[mx.array, Extra]],
        routes: Routes | None = None,
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """The gradients of `loss` by the weights, backwards through the network by hand."""
        network = self.base.completed(self.config, weights)
        chunks = completion_gradients(
            self.config,
            network,
            batch.prompts,
            batch.completions,
            lambda statistics, *margins: loss(*statistics, *margins),
            self.temperature,
            recompute=self.recompute,
            entropy_gradient=self.entropy_gradient,
            margins=self.margins,
            of_base=not self.base.is_whole,
            dropout=self._dropout(batch),
            routes=routes,
            deterministic=self.deterministic,
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
    gamma: float = 1.0,
    teacher: TeacherConfig | None = None,
) -> Assembled:
    """Turn scored groups of G completions each into one batch, in the order given; an episode may be several rows.

    `weights` maps each reward's name to its weight. Scores that are missing are NaN to the advantages, never 0.
    Tokens that versions before `oldest` made are left out of the loss, and rows of which none is left out of the batch;
    advantages still compare all completions of a group. `gamma`: by which a turn's reward counts less than that of the
    turn before. ValueError where no row is left.
    """
    G = len(groups[0].group.rollouts)
    rows = rows_of([group.group for group in groups])
    advantages = advantages_of(groups, config, weights)
    metrics = {
        **group_statistics(groups, config, weights),
        **spread_statistics(groups, config, weights),
        **advantage_statistics(advantages),
        "num_tokens": float(num_tokens(groups)),
    }
    of_rows = _of_rows(advantages, rows, G)
    if config.turn_advantages != "off":
        turns = turns_of(groups, config, weights, gamma)
        of_rows = _with_turns(of_rows, rows, turns, groups, config.turn_advantage_weight)
        metrics["turns/compared"] = turns.compared
    batch = _batch_of(rows, groups, of_rows, pad_id)
    if teacher is not None:
        batch, taught = _with_teacher(batch, rows, teacher)
        metrics |= taught
    if oldest is not None:
        batch = batch.with_tokens([row.has_young(oldest) for row in rows])
    metrics["tokens/trained"] = float(batch.completion_mask.sum())
    values: list[float] = advantages.tolist()  # type: ignore[assignment]
    by_group = tuple(tuple(values[i : i + G]) for i in range(0, len(values), G))
    return Assembled(batch=batch, advantages=by_group, metrics=metrics)


def assemble_given(groups: Sequence[ScoredGroup], *, pad_id: int) -> Assembled:
    """The same of groups whose completions were given: nothing compares them, and all that the policy says counts."""
    rows = rows_of([group.group for group in groups])
    batch = _batch_of(rows, groups, mx.zeros(len(rows)), pad_id)
    metrics = {"num_tokens": float(num_tokens(groups)), "tokens/trained": float(batch.completion_mask.sum())}
    return Assembled(batch=batch, advantages=(), metrics=metrics)


def _batch_of(rows: Sequence[Row], groups: Sequence[ScoredGroup], advantages: mx.array, pad_id: int) -> Batch:
    """The rows as they are, before tokens that are too old are left out."""
    G = len(groups[0].group.rollouts)
    is_forked = len(rows) > len(groups) * G
    batch = make_batch(
        [row.prompt_ids for row in rows],
        [row.token_ids for row in rows],
        [row.log_probs for row in rows],
        advantages,
        pad_id=pad_id,
        truncated=[is_truncated(row.rollout) for row in rows],
        sampled=[row.sampled for row in rows] if any(row.rollout.observed for row in rows) else None,
        samples=[row.group * G + row.sample for row in rows] if is_forked else None,
    )
    prompts = [group.group.prompt for group in groups]
    step = max(prompt.slot.step for prompt in prompts)
    of_prompt = {ids: prompt_key(ids, step) for ids in {tuple(row.prompt_ids) for row in rows}}
    keys = [
        (of_prompt[tuple(row.prompt_ids)], completion_key(prompts[row.group].gid, row.sample, row.number))
        for row in rows
    ]
    experts = tuple(row.experts for row in rows)
    is_recorded = any(of_prompt or own for of_prompt, own in experts)
    return replace(batch, keys=tuple(keys), experts=experts if is_recorded else None)


def _with_teacher(batch: Batch, rows: Sequence[Row], teacher: TeacherConfig) -> tuple[Batch, dict[str, float]]:
    """The batch with advantages by token, to which the teacher's log-probs are added, and the metrics of them."""
    T = batch.completion_mask.shape[1]
    said = mx.array(
        [row.teacher_log_probs + (0.0,) * (T - len(row.teacher_log_probs)) for row in rows], dtype=mx.float32
    )
    own = batch.sampling_log_probs
    advantages = distilled_advantages(batch.advantages, said, own, coef=teacher.coef, reward_coef=teacher.reward_coef)
    mx.eval(advantages)
    divergence = float(sampled_divergence(said, own, batch.completion_mask))
    return replace(batch, advantages=advantages), {"teacher/kl": divergence, "teacher/coef": teacher.coef}


def _of_rows(advantages: mx.array, rows: Sequence[Row], G: int) -> mx.array:
    """Those of completions, (groups · G,), for their rows, (B,)."""
    places = [row.group * G + row.sample for row in rows]
    return advantages if places == list(range(advantages.size)) else advantages[mx.array(places)]


def _with_turns(
    advantages: mx.array, rows: Sequence[Row], turns: Turns, groups: Sequence[ScoredGroup], weight: float
) -> mx.array:
    """(B,) and what each token's turn adds: (B, T)."""
    G = len(groups[0].group.rollouts)
    T = max(1, *(row.stop - row.start for row in rows))
    added = []
    for row in rows:
        episodes = groups[row.group].group.episodes
        tokens = [0.0] * len(row.rollout.token_ids)
        of_turns = turns.advantages[row.group * G + row.sample]
        for turn, value in zip(episodes[row.sample].turns if episodes else (), of_turns, strict=True):
            tokens[turn.start : turn.stop] = [weight * value] * (turn.stop - turn.start)
        added.append(tokens[row.start : row.stop] + [0.0] * (T - (row.stop - row.start)))
    return advantages[:, None] + mx.array(added)
