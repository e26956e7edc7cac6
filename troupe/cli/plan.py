"""What a run would do, in a few lines for whoever starts it: model, prompts, batch, rewards, memory, steps, folder."""

from __future__ import annotations

from troupe.policy import parameter_count
from troupe.run.memory import describe as describe_memory
from troupe.run.prepare import Prepared

_MILLION, _BILLION = 10**6, 10**9


def describe_plan(prepared: Prepared) -> list[str]:
    """The lines, what matters most first."""
    config, policy = prepared.config, prepared.start.policy
    learner, generation, rewards = config.learner, config.generation, config.rewards
    weights = rewards.weights or (1.0,) * len(prepared.inputs.rewards.names)
    scored = [f"{name} × {weight:g}" for name, weight in zip(prepared.inputs.rewards.names, weights, strict=False)]
    limit = prepared.memory.limit_gb
    steps = f"{prepared.inputs.total_steps} steps into {prepared.folder}; nothing was written"
    if prepared.start.first_step:
        done = f"{prepared.start.first_step} of them done"
        steps = f"{prepared.inputs.total_steps} steps, {done}, {steps.partition(' steps ')[2]}"
    return [
        steps,
        f"model: {prepared.inputs.source}, {_count(parameter_count(policy.config))} weights in {policy.dtype}",
        *prepared.inputs.description.splitlines(),
        f"a step: {learner.batch_size} prompts × {generation.num_generations} completions of at most "
        f"{generation.max_completion_length} tokens, at temperature {generation.temperature:g}",
        f"rewards: {', '.join(scored)}",
        f"learning: {learner.loss_type}, learning rate {learner.lr:g} ({learner.lr_scheduler}), beta {learner.beta:g}",
        f"schedule: {config.schedule.mode}, max_staleness {config.schedule.max_staleness}; a checkpoint every "
        f"{config.checkpoint.every} steps",
        *describe_memory(prepared.memory.phases).splitlines(),
        "memory limit: none" if limit is None else f"memory limit: {config.memory_limit_gb or limit:g} GB",
    ]


def _count(number: int) -> str:
    if number >= _BILLION / 10:
        return f"{number / _BILLION:.2f} billion"
    return f"{number / _MILLION:.2f} million" if number >= _MILLION / 10 else str(number)
