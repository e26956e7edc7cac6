"""Inputs: what a run is made from, loaded and checked, the cheap checks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import msgspec

from troupe.actors.evaluator.conditions import Conditions
from troupe.actors.evaluator.decoding import EvalSet
from troupe.actors.schedule import PromptSchedule, count_steps, describe_prompts, think_notices, tokenize_prompts
from troupe.cluster.calls import Calls
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.grpo.optimizer import LEARNING_RATE
from troupe.messages import PromptText
from troupe.messages.evaluations import HELD_OUT
from troupe.policy import NetworkConfig, Policy, opened_thought
from troupe.policy.adapter.modules import describe_adapter
from troupe.policy.load import begin_policy
from troupe.records.metric_names import check_metric
from troupe.rewards import Reward, RewardManager
from troupe.run.acting import (
    NOTHING_GIVEN,
    Acting,
    ActingSetup,
    ActingWorld,
    check_learner,
    default_rewards,
    load_acting,
    make_rewards,
)
from troupe.run.config import RunConfig
from troupe.run.curriculum import curriculum_for, curriculum_notices
from troupe.run.engines import check_engine_inputs
from troupe.run.resume.check import Resumption
from troupe.run.resume.newest import Identity
from troupe.run.sets import OF_EVALUATION, early_stop, finished_sets, judged_by, read_sets
from troupe.run.teaching import LoadedTeacher, check_teaching, teacher_of

_SHOWN_ROWS = 4
"""Of a source whose rows have to be made, for a run that is only shown."""
_ADAPTER_RATE = 1e-5
"""Learning rate of an adapter, ten times that of a whole network; written out, as ten times 1e-6 is another number."""
_FLOAT16 = (
    "the policy trains in float16, in which small gradients become 0 (there is no loss scaling); "
    "model.dtype = 'bfloat16' has no such limit"
)


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts, rewards and the policy that a run begins with."""

    config: RunConfig
    """With the rewards that it left open, and completions no longer than the model has positions for."""
    source: Path
    """The model folder; beside an adapter that of the base."""
    fingerprint: str
    """Of the model that the run begins with, an adapter that it begins with included."""
    policy: Policy
    dataset: PromptDataset
    schedule: PromptSchedule
    sets: tuple[EvalSet, ...] = ()
    """What is evaluated."""
    conditions: dict[str, Conditions]
    """Of each set, by name."""
    rewards: RewardManager
    longest_prompt: int
    """Tokens."""
    acting_setup: ActingSetup | None = None
    """Where the policy acts; None: it answers once."""
    teacher: LoadedTeacher | None = None
    """With its arrays."""
    calls: Calls | None = None
    """Rewards and environments on workers; None: no worker can join the run."""
    total_steps: int
    description: str
    """What there is to train and to evaluate on, in lines."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""

    @property
    def identity(self) -> Identity:
        """What makes the run this one."""
        return Identity(
            dataset=self.dataset.fingerprint,
            model=self.fingerprint,
            rewards=self.rewards.names,
            teacher="" if self.teacher is None else self.teacher.fingerprint,
        )

    def without_teacher(self) -> Inputs:
        """Without its arrays, that is."""
        return msgspec.structs.replace(self, teacher=None)


def load_inputs(
    config: RunConfig,
    given: Sequence[Reward],
    resumption: Resumption | None,
    *,
    resume: bool,
    to_show: bool,
    acting: Acting = NOTHING_GIVEN,
) -> Inputs:
    """Load what the config names, beside which `given` and `acting` are used. InputError for what cannot be used."""
    data, learner, model = config.data, config.learner, config.model.path
    assert model is not None
    first = _SHOWN_ROWS if to_show and not resume else None
    dataset = PromptDataset.load(str(data.path), data, first=first)
    held_out = read_sets(config, first)
    calls = None if config.cluster.serve is None else Calls()
    world = _load_world(config, acting, calls)
    rewards, config = _rewards(config, given, dataset, world, calls)
    policy, fingerprint = begin_policy(model, config.model.dtype, config.adapter, config.seed)
    assert policy.path is not None
    config, notices = _with_rate(config, policy)
    if not resume:
        policy.check_stop_ids()
    config = _dated(config, policy, begins=not resume)
    acting_setup = None if world is None else ActingSetup.of(world, policy, config.data)
    tokenize = _tokenizer(policy, config, acting_setup, resumption)
    prompt_ids = tokenize(dataset)
    check_engine_inputs(config, policy, dataset, prompt_ids, acts=acting_setup is not None)
    sets = finished_sets(held_out, config, trained_on=dataset, rewards=rewards, acting=world, tokenize=tokenize)
    notices += _best_by(config, rewards, sets, resumption)
    early_stop(config, sets)
    longest = max(map(len, prompt_ids))
    config, lowered = _fit_completions(config, policy.config.max_position_embeddings, longest_prompt=longest)
    notices += lowered
    opened = partial(opened_thought, policy.tokenizer)
    notices += _about(config, policy, opened(dataset[0].prompt, prompt_ids[0]))
    if acting_setup is not None:
        acting_setup = acting_setup.within(longest, config.generation.max_completion_length)
        notices += acting_setup.notices(config)
    total_steps = _steps(learner, dataset.in_all)
    notices += curriculum_notices(config, rewards.names, rows=dataset.in_all, steps=total_steps)
    return Inputs(
        config=config,
        source=policy.path,
        fingerprint=fingerprint,
        policy=policy,
        dataset=dataset,
        schedule=_schedule(config, dataset, prompt_ids, rewards, opened),
        sets=sets,
        conditions={each.name: Conditions(each, each.settings.generation(config.generation)) for each in sets},
        rewards=rewards,
        longest_prompt=longest,
        acting_setup=acting_setup,
        teacher=teacher_of(config.teacher, policy),
        calls=calls,
        total_steps=total_steps,
        description=_described(dataset, prompt_ids, sets, policy),
        notices=tuple(notices),
    )


def _steps(learner: LearnerConfig, rows: int) -> int:
    """Of the run, by its settings."""
    return count_steps(rows, batch_size=learner.batch_size, epochs=learner.epochs, max_steps=learner.max_steps)


def _tokenizer(
    policy: Policy, config: RunConfig, acting_setup: ActingSetup | None, resumption: Resumption | None
) -> Callable[[PromptDataset], list[tuple[int, ...]]]:
    """What tells prompts in ids."""
    kept = None if resumption is None else resumption.stored.data.chat_template_kwargs
    positions = policy.config.max_position_embeddings
    return partial(
        tokenize_prompts,
        tokenizer=policy.tokenizer,
        config=config.data,
        max_tokens=min(config.data.max_prompt_tokens or positions, positions - 1),
        vocab_size=policy.config.vocab_size,
        keeps_unknown=kept == config.data.chat_template_kwargs,
        tell=None if acting_setup is None else acting_setup.opening,
    )


def _schedule(
    config: RunConfig,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    rewards: RewardManager,
    opened: Callable[[PromptText, Sequence[int]], str],
) -> PromptSchedule:
    return PromptSchedule(
        dataset,
        prompt_ids,
        batch_size=config.learner.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        opened=opened,
        curriculum=curriculum_for(config, dataset, rewards),
    )


def _described(
    dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], sets: Sequence[EvalSet], policy: Policy
) -> str:
    """What there is to train and to evaluate on, in lines."""
    told = [describe_prompts(dataset, prompt_ids, policy.tokenizer)]
    for each in sets:
        name = "held out" if each.name == HELD_OUT else f"evaluated as {each.name}"
        told.append(f"{name}: {describe_prompts(each.dataset, each.prompt_ids, policy.tokenizer)}")
    return "\n".join(told)


def _about(config: RunConfig, policy: Policy, opened: str) -> list[str]:
    """What to tell of the type of the policy's numbers, and of how it thinks; `opened` as for `think_notices`."""
    notices = [_FLOAT16] if policy.dtype == "float16" else []
    if "think_format" in config.rewards.functions:
        notices += think_notices(policy.tokenizer, opened)
    return notices


def _load_world(config: RunConfig, given: Acting, calls: Calls | None) -> ActingWorld | None:
    world = load_acting(config.environment, given, calls)
    check_learner(config.learner, world)
    return world


def _dated(config: RunConfig, policy: Policy, *, begins: bool) -> RunConfig:
    """With the day that chat templates are told, where they ask for it. A run that was begun when none was kept goes on
    with today."""
    day = config.data.chat_template_date
    if day is None and begins and policy.tokenizer.asks_for_today:
        day = date.today().isoformat()  # noqa: DTZ011 - that of whoever begins the run
    if day is None:
        return config
    policy.date_templates(date.fromisoformat(day))
    return msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, chat_template_date=day))


def _with_rate(config: RunConfig, policy: Policy) -> tuple[RunConfig, list[str]]:
    """With the learning rate where the config leaves it open, and what to tell of that and of an adapter."""
    adapter, lr, notices = policy.base.adapter, config.learner.lr, list[str]()
    check_teaching(config)
    _check_experts(config.learner, policy.config)
    if adapter is not None:
        _check_reference(config.learner)
        notices.append(describe_adapter(policy.config, adapter))
    if lr is None:
        lr = LEARNING_RATE if adapter is None else _ADAPTER_RATE
        if adapter is not None:
            notices.append(f"learner.lr is {lr:g}, ten times that of training the whole network; name it for another")
    return msgspec.structs.replace(config, learner=msgspec.structs.replace(config.learner, lr=lr)), notices


def _check_experts(learner: LearnerConfig, network: NetworkConfig) -> None:
    """Raise ConfigError where something is asked of experts that the network does not have."""
    if network.sparse_layers:
        return
    none = f"but a {network.model_type} has no experts"
    if learner.router_aux_loss_coef:
        raise ConfigError(f"learner.router_aux_loss_coef is {learner.router_aux_loss_coef:g}, {none}; leave it out")
    if learner.router_replay != "off":
        raise ConfigError(f"learner.router_replay is {learner.router_replay!r}, {none}; leave it out")


def _check_reference(learner: LearnerConfig) -> None:
    """Raise ConfigError where the reference policy would be a mixture of adapters, which is no adapter."""
    if learner.sync_ref_model and learner.ref_model_mixup_alpha != 1.0:
        raise ConfigError(
            f"learner.ref_model_mixup_alpha is {learner.ref_model_mixup_alpha:g}, but a mixture of two adapters is no "
            "adapter; give 1, or set learner.sync_ref_model = false"
        )


def _rewards(
    config: RunConfig,
    given: Sequence[Reward],
    dataset: PromptDataset,
    acting: ActingWorld | None,
    calls: Calls | None,
) -> tuple[RewardManager, RunConfig]:
    functions = config.rewards.functions
    if not functions and not given:
        functions = (default_rewards(dataset, acting, may_be_none=config.teacher.is_alone),)
        config = msgspec.structs.replace(config, rewards=msgspec.structs.replace(config.rewards, functions=functions))
    manager = make_rewards([*functions, *given], config.rewards, acting, [dataset], elsewhere=calls)
    manager.check_columns(dataset.columns)
    return manager, config


def _best_by(
    config: RunConfig, rewards: RewardManager, sets: Sequence[EvalSet], resumption: Resumption | None
) -> list[str]:
    """What to tell of the metric by which a checkpoint is the best; a run that has always had a wrong one goes on."""
    metric = config.checkpoint.metric_for_best
    if not config.checkpoint.keep_best:
        return []
    if metric.startswith(OF_EVALUATION):
        return judged_by(config, sets)
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
