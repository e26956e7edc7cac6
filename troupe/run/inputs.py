"""Inputs: what a run is made from, loaded and checked, the cheap checks first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from troupe.actors.schedule import PromptSchedule, count_steps, describe_prompts, think_notices, tokenize_prompts
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError, DatasetError
from troupe.policy import Policy, load_policy, opened_thought, resolve_model
from troupe.records.metric_names import check_metric
from troupe.rewards import Reward, RewardManager, default_reward
from troupe.run.config import RunConfig
from troupe.run.resume.check import Resumption

_SHOWN_ROWS = 4
"""Of a source whose rows have to be made, for a run that is only shown."""
_FLOAT16 = (
    "the policy trains in float16, in which small gradients become 0 (there is no loss scaling); "
    "model.dtype = 'bfloat16' has no such limit"
)


class EvalSet(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out prompts with their token ids."""

    dataset: PromptDataset
    prompt_ids: Sequence[tuple[int, ...]]


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts, rewards and the policy that a run begins with."""

    config: RunConfig
    """With the rewards that it left open, and completions no longer than the model has positions for."""
    source: Path
    """The model folder."""
    policy: Policy
    dataset: PromptDataset
    schedule: PromptSchedule
    evaluation: EvalSet | None
    rewards: RewardManager
    longest_prompt: int
    """Tokens."""
    total_steps: int
    description: str
    """What there is to train and to evaluate on, in lines."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""


def load_inputs(
    config: RunConfig, given: Sequence[Reward], resumption: Resumption | None, *, resume: bool, to_show: bool
) -> Inputs:
    """Load what the config names; `given` rewards are used beside those. InputError for what cannot be used."""
    data, learner = config.data, config.learner
    model = config.model.path
    assert model is not None
    assert data.path is not None
    first = _SHOWN_ROWS if to_show and not resume else None
    dataset = PromptDataset.load(data.path, data, first=first)
    held_out = PromptDataset.load(data.eval_path, data, first=first) if data.eval_path else None
    rewards, config = _rewards(config, given, dataset, held_out)
    notices = _best_by(config, rewards, resumption)
    source = resolve_model(model)
    policy = load_policy(source, config.model.dtype)
    if not resume:
        policy.check_stop_ids()
    kept = None if resumption is None else resumption.stored.data.chat_template_kwargs
    keeps_unknown = kept == data.chat_template_kwargs
    prompt_ids = _tokenized(dataset, policy, config, keeps_unknown=keeps_unknown)
    described = [describe_prompts(dataset, prompt_ids, policy.tokenizer)]
    evaluation = None
    if held_out is not None:
        held_out_ids = _tokenized(held_out, policy, config, keeps_unknown=keeps_unknown)
        evaluation = EvalSet(dataset=held_out, prompt_ids=held_out_ids)
        described.append(f"held out: {describe_prompts(held_out, held_out_ids, policy.tokenizer)}")
    longest = max(map(len, prompt_ids))
    config, lowered = _fit_completions(config, policy.config.max_position_embeddings, longest_prompt=longest)
    notices += lowered
    if policy.dtype == "float16":
        notices.append(_FLOAT16)
    opened = partial(opened_thought, policy.tokenizer)
    if "think_format" in config.rewards.functions:
        notices += think_notices(policy.tokenizer, opened(dataset[0].prompt, prompt_ids[0]))
    return Inputs(
        config=config,
        source=source,
        policy=policy,
        dataset=dataset,
        schedule=PromptSchedule(
            dataset,
            prompt_ids,
            batch_size=learner.batch_size,
            seed=config.seed,
            shuffle=data.shuffle,
            opened=opened,
        ),
        evaluation=evaluation,
        rewards=rewards,
        longest_prompt=longest,
        total_steps=count_steps(
            dataset.in_all, batch_size=learner.batch_size, epochs=learner.epochs, max_steps=learner.max_steps
        ),
        description="\n".join(described),
        notices=tuple(notices),
    )


def _tokenized(rows: PromptDataset, policy: Policy, config: RunConfig, *, keeps_unknown: bool) -> list[tuple[int, ...]]:
    positions = policy.config.max_position_embeddings
    return tokenize_prompts(
        rows,
        policy.tokenizer,
        config.data,
        max_tokens=min(config.data.max_prompt_tokens or positions, positions - 1),
        vocab_size=policy.config.vocab_size,
        keeps_unknown=keeps_unknown,
    )


def _rewards(
    config: RunConfig, given: Sequence[Reward], dataset: PromptDataset, held_out: PromptDataset | None
) -> tuple[RewardManager, RunConfig]:
    functions = config.rewards.functions
    if not functions and not given:
        functions = (default_reward(dataset.columns, dataset.source),)
        config = msgspec.structs.replace(config, rewards=msgspec.structs.replace(config.rewards, functions=functions))
    manager = RewardManager([*functions, *given], config=config.rewards)
    manager.check_columns(dataset.columns)
    if held_out is not None and (missing := dataset.columns - held_out.columns):
        raise DatasetError(
            f"{held_out.source}: the held-out rows lack the column {', '.join(sorted(missing))} of the training rows"
        )
    return manager, config


def _best_by(config: RunConfig, rewards: RewardManager, resumption: Resumption | None) -> list[str]:
    """What to tell of the metric by which a checkpoint is the best; a run that has always had a wrong one goes on."""
    metric = config.checkpoint.metric_for_best
    if not config.checkpoint.keep_best:
        return []
    try:
        told = check_metric(metric, rewards.names, rewards.rewards)
    except ConfigError as error:
        if resumption is None or resumption.stored.checkpoint.metric_for_best != metric:
            raise
        told = f"{error}; no checkpoint is the best"
    return [] if told is None else [told]


def _fit_completions(config: RunConfig, positions: int, *, longest_prompt: int) -> tuple[RunConfig, list[str]]:
    asked = config.generation.max_completion_length
    room = positions - longest_prompt
    if asked <= room:
        return config, []
    generation = msgspec.structs.replace(config.generation, max_completion_length=room)
    notice = (
        f"generation.max_completion_length lowered from {asked} to {room}: the model has {positions} positions and the "
        f"longest prompt takes {longest_prompt}"
    )
    return msgspec.structs.replace(config, generation=generation), [notice]
