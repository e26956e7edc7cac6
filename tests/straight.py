"""The run as one loop: no actors, no tasks, no channels. What the play must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from troupe import RunConfig
from troupe.dataset import PromptDataset
from troupe.grpo import adamw_init, learning_rate, train_on_batch
from troupe.learning import as_rollouts, assemble, completion_log_probs
from troupe.messages import RolloutGroup, ScoredGroup, Slot
from troupe.policy import RolloutEngine, RolloutRequest, Weights, load_policy
from troupe.schedule import PromptSchedule, count_steps, tokenize_prompts


def play_straight(config: RunConfig, reward: Callable[..., list[float]]) -> tuple[Weights, dict[str, mx.array]]:
    """The final weights and optimizer state of a pinned run with one reward that wants `completion_ids` alone."""
    learner, generation = config.learner, config.generation
    policy = load_policy(config.model.path or "", config.model.dtype)
    dataset = PromptDataset.from_json(config.data.path or "")
    ids = tokenize_prompts(dataset, policy.tokenizer, config.data, max_tokens=policy.config.max_position_embeddings)
    P = learner.batch_size
    schedule = PromptSchedule(dataset, ids, batch_size=P, seed=config.seed, shuffle=config.data.shuffle)
    total = count_steps(len(dataset), batch_size=P, epochs=learner.epochs, max_steps=learner.max_steps)
    log_probs = completion_log_probs(policy.config, generation.temperature)

    versions: list[Weights] = [policy.weights]
    state = adamw_init(policy.weights)
    for step in range(total):
        sampled_from = max(0, step - config.schedule.max_staleness)
        prompts = [schedule.prompt(Slot(step=step, place=place)) for place in range(P)]
        engine = RolloutEngine(policy.config, generation, stop_ids=policy.eos_ids)
        engine.load(versions[sampled_from], sampled_from)
        keys = [(config.seed, step, place, 0) for place in range(P)]
        requests = [RolloutRequest(prompt_ids=p.prompt_ids, key=key) for p, key in zip(prompts, keys, strict=True)]
        scored: dict[int, ScoredGroup] = {}
        for completed in engine.decode(requests):
            group = RolloutGroup(
                prompt=prompts[completed.index], rollouts=as_rollouts(completed, policy.tokenizer.decode_sampled)
            )
            completion_ids: Any = [list(rollout.token_ids) for rollout in group.rollouts]
            scored[completed.index] = ScoredGroup(group=group, scores={"r": tuple(reward(completion_ids))})
        prepared = assemble(
            [scored[place] for place in range(P)],
            learner,
            weights={"r": 1.0},
            pad_id=policy.tokenizer.pad_token_id or 0,
        )
        passes = learner.num_iterations
        result = train_on_batch(
            versions[-1],
            state,
            prepared.batch,
            log_probs,
            learner,
            lr=[learning_rate(step * passes + i, total * passes, learner) for i in range(passes)],
            ref_weights=policy.weights if learner.beta else None,
            max_completion_length=generation.max_completion_length,
        )
        versions.append(result.weights)
        state = result.optimizer_state
    return versions[-1], state
