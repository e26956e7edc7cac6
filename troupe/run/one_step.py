"""One step's batch as plain arrays, without actors.

The same engine, rewards and batch as in a run, called one after the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import msgspec

from troupe.actors.learner.batch import as_rollouts, assemble
from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset
from troupe.grpo import LearnerConfig
from troupe.messages import Prompt, PromptText, RolloutGroup, ScoredGroup, Slot
from troupe.policy import CompletedGroup, GenerationConfig, Policy, RolloutRequest, opened_thought
from troupe.rewards import Reward, RewardManager
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
        groups = await _complete(policy, dataset, prompt_ids, generation, device, (seed, step))
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


async def _complete(
    policy: Policy,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    generation: GenerationConfig,
    device: DeviceThread,
    key: tuple[int, int],
) -> list[RolloutGroup]:
    """Complete all rows together, as places of one step; `key` is (seed, step).

    A cancelled caller waits for one token, not for the longest completion.
    """
    seed, step = key
    engine = policy.engine(generation)
    requests = [RolloutRequest(prompt_ids=ids, key=(seed, step, place, 0)) for place, ids in enumerate(prompt_ids)]
    decoding = await device.run(engine.decode, requests)
    completed: list[CompletedGroup] = await device.run(list, decoding, on_cancel=engine.abort)
    groups = []
    for group in sorted(completed, key=lambda group: group.index):
        prompt = _prompt_of(policy, dataset, prompt_ids, group.index, step)
        rollouts = as_rollouts(group, policy.tokenizer.decode_sampled)
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


def _prompt_of(
    policy: Policy, dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], place: int, step: int
) -> Prompt:
    row = dataset[place]
    return Prompt(
        gid=place,
        slot=Slot(step=step, place=place),
        epoch=0,
        row=place,
        prompt=row.prompt,
        prompt_ids=prompt_ids[place],
        columns=row.columns,
        opened=opened_thought(policy.tokenizer, row.prompt, prompt_ids[place]),
    )
