"""Inputs: what a run is made from, loaded and checked, the cheap checks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import msgspec

from troupe.actors.evaluator.conditions import Conditions
from troupe.actors.evaluator.decoding import EvalSet
from troupe.actors.schedule import PromptSchedule, describe_prompts, think_notices, tokenize_prompts
from troupe.actors.supervised import SupervisedSteps
from troupe.cluster.calls import Calls
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError
from troupe.messages import PromptText
from troupe.messages.evaluations import HELD_OUT
from troupe.policy import Policy, opened_thought
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
from troupe.run.demonstrations import demonstrated_prompts
from troupe.run.engines import check_engine_inputs
from troupe.run.rates import with_rates
from troupe.run.resume.check import Resumption
from troupe.run.resume.newest import Identity
from troupe.run.sets import OF_EVALUATION, early_stop, finished_sets, judged_by, read_sets
from troupe.run.supervised import (
    all_steps,
    check_unsampled,
    describe,
    read_supervised,
    supervised_steps,
    with_warm_steps,
)
from troupe.run.supervised import notices as supervised_notices
from troupe.run.teaching import LoadedTeachers, teachers_of

_SHOWN_ROWS = 4
"""Of a source whose rows have to be made, for a run that is only shown."""
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
    supervised: SupervisedSteps | None = None
    """What is learned without being sampled, at the beginning."""
    warm_rows: PromptDataset | None = None
    """Of a warm start."""
    sets: tuple[EvalSet, ...] = ()
    """What is evaluated."""
    conditions: dict[str, Conditions]
    """Of each set, by name."""
    rewards: RewardManager
    longest_prompt: int
    """Tokens."""
    acting_setup: ActingSetup | None = None
    """Where the policy acts; None: it answers once."""
    teachers: LoadedTeachers | None = None
    """With their arrays."""
    demonstrated: tuple[tuple[int, ...], ...] | None = None
    """Row → ids of its prompt as a policy that teaches itself sees it then."""
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
            dataset=self.rows_fingerprint,
            model=self.fingerprint,
            rewards=self.rewards.names,
            teacher="" if self.teachers is None else self.teachers.fingerprint,
        )

    def without_teachers(self) -> Inputs:
        """Without their arrays, that is."""
        return msgspec.structs.replace(self, teachers=None)

    @property
    def supervised_steps(self) -> int:
        """At the beginning of the run."""
        return 0 if self.supervised is None else self.supervised.steps

    @property
    def warm_steps(self) -> int:
        """Of them, before others."""
        return 0 if self.warm_rows is None else self.supervised_steps

    @property
    def rows_fingerprint(self) -> str:
        """Of all rows that are trained on."""
        return self.dataset.fingerprint + (self.warm_rows.fingerprint if self.warm_rows is not None else "")


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
    is_sampled = config.task == "grpo"
    first = _SHOWN_ROWS if to_show and not resume else None
    given_rows = read_supervised(config, first)
    dataset = _sampled_rows(config, first) if is_sampled or given_rows is None else given_rows.dataset
    held_out = read_sets(config, first)
    calls = None if config.cluster.serve is None else Calls()
    world = _load_world(config, acting, calls)
    scored = dataset if is_sampled else next((each.rows for each in held_out), None)
    rewards, config = _rewards(config, given, scored, world, calls)
    policy, fingerprint, config, notices = _begin(config, resume=resume)
    acting_setup = None if world is None else ActingSetup.of(world, policy, config.data)
    tokenize = _tokenizer(policy, config, acting_setup, resumption)
    supervised = None if given_rows is None else supervised_steps(given_rows, config, policy)
    dataset, prompt_ids = _told(dataset, None if is_sampled else supervised, tokenize)
    check_engine_inputs(config, policy, dataset, prompt_ids, acts=acting_setup is not None)
    trained = dataset if is_sampled else None
    sets = finished_sets(held_out, config, trained_on=trained, rewards=rewards, acting=world, tokenize=tokenize)
    notices += _best_by(config, rewards, sets, resumption)
    early_stop(config, sets)
    sampled = prompt_ids if is_sampled else [ids for each in sets for ids in each.prompt_ids]
    shown = demonstrated_prompts(config, dataset, tokenize, acts=world is not None)
    config, told = _fit_completions(config, policy.config.max_position_embeddings, [*sampled, *(shown or ())])
    opened, longest = partial(opened_thought, policy.tokenizer), max(map(len, sampled), default=1)
    notices += told + supervised_notices(supervised) + _about(config, policy, opened(dataset[0].prompt, prompt_ids[0]))
    if acting_setup is not None:
        acting_setup = acting_setup.within(longest, config.generation.max_completion_length)
        notices += acting_setup.notices(config)
    total_steps = all_steps(config, dataset.in_all, supervised)
    notices += curriculum_notices(config, rewards.names, rows=dataset.in_all, steps=total_steps)
    return Inputs(
        config=with_warm_steps(config, supervised),
        source=Path(str(policy.path)),
        fingerprint=fingerprint,
        policy=policy,
        dataset=dataset,
        schedule=_schedule(config, dataset, prompt_ids, rewards, opened, supervised),
        supervised=supervised,
        warm_rows=None if given_rows is None or not is_sampled else given_rows.dataset,
        sets=sets,
        conditions={each.name: Conditions(each, each.settings.generation(config.generation)) for each in sets},
        rewards=rewards,
        longest_prompt=longest,
        acting_setup=acting_setup,
        teachers=teachers_of(config.teacher, policy, dataset),
        demonstrated=shown,
        calls=calls,
        total_steps=total_steps,
        description=_described(supervised, trained, prompt_ids, sets, policy),
        notices=tuple(notices),
    )


def _sampled_rows(config: RunConfig, first: int | None) -> PromptDataset:
    return PromptDataset.load(str(config.data.path), config.data, first=first)


def _begin(config: RunConfig, *, resume: bool) -> tuple[Policy, str, RunConfig, list[str]]:
    """The policy that the run begins with, its fingerprint, the config with what follows from it, and what to tell."""
    policy, fingerprint = begin_policy(str(config.model.path), config.model.dtype, config.adapter, config.seed)
    config, notices = with_rates(config, policy)
    if not resume:
        policy.check_stop_ids()
    return policy, fingerprint, _dated(config, policy, begins=not resume), notices


def _told(
    dataset: PromptDataset,
    supervised: SupervisedSteps | None,
    tokenize: Callable[[PromptDataset], list[tuple[int, ...]]],
) -> tuple[PromptDataset, list[tuple[int, ...]]]:
    """What a run is about, with its prompts in ids: rows that are sampled, or else those that are learned."""
    if supervised is None:
        return dataset, tokenize(dataset)
    return supervised.dataset, [example.prompt_ids for example in supervised.examples]


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
    supervised: SupervisedSteps | None,
) -> PromptSchedule:
    return PromptSchedule(
        dataset,
        prompt_ids,
        batch_size=config.learner.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        opened=opened,
        curriculum=curriculum_for(config, dataset, rewards, begins=0 if supervised is None else supervised.steps),
        supervised=supervised,
    )


def _described(
    supervised: SupervisedSteps | None,
    sampled: PromptDataset | None,
    prompt_ids: Sequence[tuple[int, ...]],
    sets: Sequence[EvalSet],
    policy: Policy,
) -> str:
    """What there is to train and to evaluate on, in lines."""
    told = [] if supervised is None else describe(supervised, policy.tokenizer)
    if sampled is not None:
        told.append(describe_prompts(sampled, prompt_ids, policy.tokenizer))
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
    check_unsampled(config, acts=world is not None)
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


def _rewards(
    config: RunConfig,
    given: Sequence[Reward],
    dataset: PromptDataset | None,
    acting: ActingWorld | None,
    calls: Calls | None,
) -> tuple[RewardManager, RunConfig]:
    functions = config.rewards.functions
    if dataset is None:
        if functions or given:
            raise ConfigError(
                'rewards.functions: task is "sft", so that nothing is scored but held-out rows, and there are none; '
                "leave it out, or give data.eval_path or [[evaluation.sets]]"
            )
        return RewardManager([], config=config.rewards, needed=False), config
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


def _fit_completions(
    config: RunConfig, positions: int, prompts: Sequence[Sequence[int]]
) -> tuple[RunConfig, list[str]]:
    """With completions no longer than there is room for behind `prompts`, and what to tell of that."""
    asked, longest_prompt = config.generation.max_completion_length, max(map(len, prompts), default=0)
    room = positions - longest_prompt
    if asked <= room or not prompts:
        return config, []
    generation = msgspec.structs.replace(config.generation, max_completion_length=room)
    notice = (
        f"generation.max_completion_length lowered from {asked} to {room}: the model has {positions} positions and the "
        f"longest prompt takes {longest_prompt}"
    )
    return msgspec.structs.replace(config, generation=generation), [notice]
