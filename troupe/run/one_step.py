"""One step's batch as plain arrays, without actors: the same engine, rewards and batch as in a run, called one after the
other."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import msgspec

from troupe.actors.learner.batch import assemble
from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset
from troupe.grpo import LearnerConfig
from troupe.messages import PromptText, ScoredGroup
from troupe.policy import GenerationConfig, Policy
from troupe.rewards import Reward, RewardManager
from troupe.run.completing import complete
from troupe.runtime.device import DeviceThread


class GroupBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One step's batch: B = prompts × G rows, P and T the longest prompt and completion, evaluated arrays."""

    prompt_ids: mx.array
    """(B, P) int32, padded on the left."""
    completion_ids: mx.array
    """(B, T) int32, padded on the right."""
    completion_mask: mx.array
    """(B, T) float32, 1 on completion tokens."""
    rewards: mx.array
    """(B,) float32 weighted sum of the scores; NaN where no reward gave one, or one is missing through a fault."""
    advantages: mx.array
    """(B,) float32."""
    old_log_probs: mx.array
    """(B, T) float32, in nats, under the temperature-scaled distribution of the policy that generated."""
    texts: tuple[str, ...]
    """(B,) the completions decoded."""
    metrics: dict[str, float]


async def generate_and_score(
    policy: Policy,
    prompts: Sequence[PromptText | Mapping[str, Any]],
    rewards: Reward | Sequence[Reward],
    *,
    generation: GenerationConfig | None = None,
    learner: LearnerConfig | None = None,
    seed: int = 0,
    step: int = 0,
) -> GroupBatch:
    """Complete each prompt `generation.num_generations` times, score, and compute advantages.

    `prompts` are texts, message lists, or mappings with "prompt" and the columns that the rewards want.
    Raises DatasetError for a prompt that does not fit the model, RewardError for a reward that breaks its contract.
    """
    generation = generation or GenerationConfig()
    learner = learner or LearnerConfig()
    dataset = PromptDataset.from_rows([p if isinstance(p, Mapping) else {"prompt": p} for p in prompts], "prompts")
    limit = policy.config.max_position_embeddings - 1
    prompt_ids = tokenize_prompts(
        dataset, policy.tokenizer, DataConfig(), max_tokens=limit, vocab_size=policy.config.vocab_size
    )
    async with RewardManager(rewards) as manager, DeviceThread("rollouts") as device:
        manager.check_columns(dataset.columns)
        groups = await complete(policy, dataset, prompt_ids, range(len(dataset)), generation, device, (seed, step))
        results = await manager.score_groups(groups)
        scored = [
            ScoredGroup(group=group, scores=result.scores, logged=result.metrics, faulted=result.faulted)
            for group, result in zip(groups, results, strict=True)
        ]
        weights = dict(zip(manager.names, manager.weights, strict=True))
        totals = [reward for result in results for reward in result.rewards]

        def to_arrays() -> GroupBatch:
            learned = assemble(scored, learner, weights=weights, pad_id=policy.pad_id)
            return GroupBatch(
                prompt_ids=learned.batch.prompt_ids,
                completion_ids=learned.batch.completion_ids,
                completion_mask=learned.batch.completion_mask,
                rewards=mx.array([float("nan") if total is None else total for total in totals]),
                advantages=learned.batch.advantages,
                old_log_probs=learned.batch.sampling_log_probs,
                texts=tuple(rollout.text for group in groups for rollout in group.rollouts),
                metrics=learned.metrics,
            )

        return await device.run(to_arrays)
