"""From a configuration to everything a run needs, checked before anything is written or sampled.

Cheap checks come first, so that a typing mistake in a column name is told before gigabytes are loaded. Whatever is
wrong is raised as an InputError; nothing on disk has been touched by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.actors.schedule import PromptSchedule, count_steps, describe_prompts, think_notices, tokenize_prompts
from troupe.checkpoint import Checkpoint
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError, DatasetError
from troupe.grpo import adamw_init
from troupe.messages import Unfinished
from troupe.policy import (
    DTYPES,
    Policy,
    Qwen3Config,
    Weights,
    is_on_cpu,
    load_policy,
    model_fingerprint,
    opened_thought,
    resolve_model,
)
from troupe.records.layout import STORE
from troupe.records.lost_steps import lost_steps
from troupe.records.metric_names import check_metric
from troupe.records.sinks.packages import check_sinks
from troupe.records.store.write import check_store
from troupe.rewards import Reward, RewardManager, default_reward
from troupe.run.config import RunConfig, check_config
from troupe.run.folder import run_folder
from troupe.run.memory import Plan, Workload, plan_memory
from troupe.run.resume.changes import Change, ChangesLog, Live
from troupe.run.resume.check import Identity, Resumption, as_begun, newest_checkpoint, reinstated
from troupe.run.resume.groups import Restored, restored_free, restored_pinned
from troupe.runtime import linux_cpu
from troupe.runtime.arithmetic import arithmetic
from troupe.runtime.memory import check_wired_limit

_WORTHWHILE = 2**18
"""Numbers, one a token and place of the hidden state, below which a micro-batch of its own costs more than a processor
beside the other gains."""
_LIGHT = 2**27
"""Bytes of weights up to which several processes decode faster than one: each reads all of them for every token."""


_SHOWN_ROWS = 4
"""Of a source whose rows have to be made, for a run that is only shown."""


class EvalSet(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out prompts with their token ids."""

    dataset: PromptDataset
    prompt_ids: Sequence[tuple[int, ...]]


_REWARDS = {"rewards.functions", "rewards.run"}
"""Which they are, and where they run."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A run that can begin."""

    config: RunConfig
    """Resolved: absolute paths, and the sizes that the model allows."""
    folder: Path
    policy: Policy
    """The policy that the run starts from, or goes on from after a resume."""
    source: Path
    """The model folder that the run begins with."""
    reference: Weights | None
    """Weights of the reference policy where learner.beta ≠ 0."""
    rewards: RewardManager
    schedule: PromptSchedule
    total_steps: int
    fingerprint: str
    evaluation: EvalSet | None
    checkpoint: Checkpoint | None
    """Where to go on from; None starts at the beginning."""
    optimizer_state: dict[str, mx.array]
    """Fresh, or the checkpoint's; evaluated."""
    restored: Restored
    """Where prompting begins, or goes on."""
    model: str = ""
    """Fingerprint of the folder of the model that the run begins with."""
    machine: dict[str, str] = {}
    """What of this machine decides the bits."""
    rewards_stood: bool = False
    """Whether an earlier start of the run named the same rewards, all of them in its config."""
    changes: tuple[Change, ...] = ()
    """Made in earlier starts while the run played."""
    new_changes: tuple[Change, ...] = ()
    """Those of them that are new, because this start asks for another value; to be written before it begins."""
    lost: tuple[str, ...] = ()
    """What files of the run do not tell of any more, one line each; among the notices, too."""
    memory: Plan
    """What the run takes, and what was chosen for it."""
    prompts: str = ""
    """What there is to train and to evaluate on, in lines."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""

    def without_arrays(self) -> Prepared:
        """What is to be known once a run goes on by itself, which keeps the arrays that it needs."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = msgspec.structs.replace(
                checkpoint, weights={}, optimizer_state={}, behind={}, reference=None, unfinished=Unfinished()
            )
        return msgspec.structs.replace(
            self,
            policy=self.policy.having({}),
            reference=None,
            checkpoint=checkpoint,
            optimizer_state={},
            restored=Restored(next=self.restored.next),
        )

    @property
    def live(self) -> Live:
        """What this start begins with, of all that may be set while it plays."""
        return Live.of(self.config, self.changes, self.rewards.names)

    @property
    def first_step(self) -> int:
        """Learner batches that are done already."""
        return 0 if self.checkpoint is None else self.checkpoint.state.version

    @property
    def rewards_worked(self) -> bool:
        """Whether an earlier start could use the rewards that this one begins with, as far as the checkpoint says, or
        without one the stored config: of a first start that a reward ended nothing stays."""
        if self.checkpoint is None:
            return self.rewards_stood
        before = self.checkpoint.state.rewards
        standing = self.rewards.standing(self.first_step)
        return not before or all(  # the first format does not name them
            times or (name in before and (before[name].version > 0 or before[name].spec == spec))
            for name, (times, spec) in standing.items()
        )


def prepare(
    config: RunConfig,
    rewards: Sequence[Reward] = (),
    *,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    to_show: bool = False,
) -> Prepared:
    """Load and check everything. `rewards` are used beside those that the config names; `allow_changes` are the keys in
    which the config may differ from that of the run that is resumed. `to_show`: nothing is to be played, so that a few
    rows are enough where each has to be made; not in a resume, which compares all. Raises InputError."""
    config = check_config(config)
    model_path, data_path = config.model.path, config.data.path
    check_sinks(config.metrics)
    notices: list[str] = []
    if is_on_cpu():
        notices = linux_cpu.advice()
        linux_cpu.check_temporary_files()
    if model_path is None:
        raise ConfigError(
            "model.path is missing: name a Hugging Face folder of a Qwen3 model (in RUN.toml, or with -m MODEL_DIR)"
        )
    if data_path is None:
        raise ConfigError(
            "data.path is missing: name a .json or .jsonl file of prompts (-d PROMPTS.json), or another source"
        )
    notices += check_wired_limit(config.wired_limit_gb)
    folder = run_folder(config, resume=resume)
    machine = arithmetic()
    resumption = Resumption.of(folder, config, allow_changes, machine) if resume else None
    if resume and "sqlite" in config.metrics.sinks:
        check_store(folder / STORE)
    config = config if resumption is None else resumption.asked
    first = _SHOWN_ROWS if to_show and not resume else None
    dataset = PromptDataset.load(data_path, config.data, first=first)
    held_out = None
    if config.data.eval_path:
        held_out = PromptDataset.load(config.data.eval_path, config.data, first=first)
    manager, config = _rewards(config, rewards, dataset, held_out)
    more = _best_by(config, manager, resumption)
    source = resolve_model(model_path)
    policy = load_policy(source, config.model.dtype)
    if not resume:
        policy.check_stop_ids()
    positions = policy.config.max_position_embeddings
    limit = min(config.data.max_prompt_tokens or positions, positions - 1)
    kept = None if resumption is None else resumption.stored.data.chat_template_kwargs
    tokenize = partial(
        tokenize_prompts,
        max_tokens=limit,
        vocab_size=policy.config.vocab_size,
        keeps_unknown=kept == config.data.chat_template_kwargs,
    )
    prompt_ids = tokenize(dataset, policy.tokenizer, config.data)
    opened = partial(opened_thought, policy.tokenizer)
    told_of_prompts = [describe_prompts(dataset, prompt_ids, policy.tokenizer)]
    evaluation = None
    if held_out is not None:
        held_out_ids = tokenize(held_out, policy.tokenizer, config.data)
        evaluation = EvalSet(dataset=held_out, prompt_ids=held_out_ids)
        told_of_prompts.append(f"held out: {describe_prompts(held_out, held_out_ids, policy.tokenizer)}")
    longest = max(map(len, prompt_ids))
    config, lowered = _fit_completions(config, positions, longest_prompt=longest)
    more += lowered
    if policy.dtype == "float16":
        more.append(
            "the policy trains in float16, in which small gradients become 0 (there is no loss scaling); "
            "model.dtype = 'bfloat16' has no such limit"
        )
    if "think_format" in config.rewards.functions:
        more += think_notices(policy.tokenizer, opened(dataset[0].prompt, prompt_ids[0]))
    worthwhile = _worthwhile(config, policy.config, longest_prompt=longest)
    is_light = sum(array.nbytes for array in policy.weights.values()) <= _LIGHT
    config = _placed(config, worthwhile if is_light else 1)
    config, streams = _streamed(config, worthwhile)
    if is_on_cpu():
        linux_cpu.take_buffers(streams + (config.schedule.blas_threads or 1))
    memory = plan_memory(
        config,
        Workload(
            policy=policy.config,
            dtype=DTYPES[policy.dtype],
            longest_prompt=longest,
            on_cpu=is_on_cpu(),
            streams=streams,
        ),
    )
    config = memory.config
    total_steps = count_steps(
        dataset.in_all,
        batch_size=config.learner.batch_size,
        epochs=config.learner.epochs,
        max_steps=config.learner.max_steps,
    )
    identity = Identity(dataset=dataset.fingerprint, model=model_fingerprint(source), rewards=manager.names)
    checkpoint: Checkpoint | None = None
    resumed: list[str] = []
    if resume:
        resumption = None if resumption is None else resumption.compared(config)
        checkpoint, resumed = newest_checkpoint(folder, resumption, config, identity, policy)
        if checkpoint is not None:
            policy = as_begun(policy, checkpoint)
    more += policy.notices
    if resumption is not None:
        before = count_steps(
            len(dataset),
            batch_size=config.learner.batch_size,
            epochs=resumption.stored.learner.epochs,
            max_steps=resumption.stored.learner.max_steps,
        )
        resumed += resumption.notices(total_steps, before, checkpoint)
    lost: list[str] = []
    if checkpoint is not None:
        lost = lost_steps(folder, checkpoint.state.version, checkpoint.made.lacking, config.metrics.sinks)
    changes, new_changes, told = _changes(folder, config, resumption, checkpoint, manager)
    optimizer_state = adamw_init(policy.weights) if checkpoint is None else checkpoint.optimizer_state
    mx.eval(list(optimizer_state.values()))
    schedule = PromptSchedule(
        dataset,
        prompt_ids,
        batch_size=config.learner.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        opened=opened,
    )
    return Prepared(
        config=msgspec.structs.replace(config, output=str(folder)),
        folder=folder,
        policy=policy if checkpoint is None else policy.having(checkpoint.weights),
        source=source,
        reference=_reference(config, policy, checkpoint),
        rewards=manager,
        schedule=schedule,
        restored=_restored(checkpoint, schedule, config, manager, total_steps),
        total_steps=total_steps,
        fingerprint=dataset.fingerprint,
        model=identity.model,
        machine=machine,
        rewards_stood=not rewards and resumption is not None and not _REWARDS & resumption.changed,
        changes=changes,
        new_changes=new_changes,
        evaluation=evaluation,
        checkpoint=checkpoint,
        optimizer_state=optimizer_state,
        lost=tuple(lost),
        memory=memory,
        prompts="\n".join(told_of_prompts),
        notices=(*notices, *more, *memory.notices, *resumed, *told, *lost),
    )


def _changes(
    folder: Path,
    config: RunConfig,
    resumption: Resumption | None,
    checkpoint: Checkpoint | None,
    rewards: RewardManager,
) -> tuple[tuple[Change, ...], tuple[Change, ...], list[str]]:
    """What was changed while the run played, what this start changes of that, and what the user should know.

    Rewards that were exchanged before the checkpoint have their places again.
    """
    if resumption is None:
        return (), (), []
    step = 0 if checkpoint is None else checkpoint.state.version
    log = ChangesLog(folder)
    made = log.checked(config, rewards.names)
    new = resumption.superseding(made, step, {name: spec for name, (_, spec) in rewards.standing(step).items()})
    told = []
    if "rewards.functions" not in resumption.changed:
        standing = {} if checkpoint is None else checkpoint.state.rewards
        told = reinstated(rewards, standing, made, step)
    return (*made, *new), new, told


def _restored(
    checkpoint: Checkpoint | None,
    schedule: PromptSchedule,
    config: RunConfig,
    rewards: RewardManager,
    total_steps: int,
) -> Restored:
    if checkpoint is None:
        return Restored(next=0)
    unfinished, version = checkpoint.unfinished, checkpoint.state.version
    if config.schedule.mode == "free":
        return restored_free(unfinished, schedule, wanted=max(0, total_steps - version) * schedule.batch_size)
    return restored_pinned(
        unfinished,
        schedule,
        version,
        max_staleness=config.schedule.max_staleness,
        whole_rounds=rewards.compares_groups,
    )


def _worthwhile(config: RunConfig, policy: Qwen3Config, *, longest_prompt: int) -> int:
    """How many parts of a step may be worth a processor of their own."""
    rows = config.learner.batch_size * config.generation.num_generations
    tokens = config.learner.batch_size * longest_prompt + rows * config.generation.max_completion_length
    return max(1, tokens * policy.hidden_size // _WORTHWHILE)


def _placed(config: RunConfig, worthwhile: int) -> RunConfig:
    """Decide where the generator runs, in how many processes (no more than `worthwhile`) and how many threads OpenBLAS
    has, so that the resolved config says it."""
    schedule, most = config.schedule, config.learner.batch_size
    if (schedule.generator_processes or 1) > most:
        raise ConfigError(
            f"schedule.generator_processes is {schedule.generator_processes}, but a step has only {most} prompts "
            f"(learner.batch_size) to deal to them; give at most {most}"
        )
    cores = linux_cpu.blas_threads() if is_on_cpu() else None
    takes_turns = schedule.max_staleness == 0  # the generator with the learner
    processes = schedule.generator_processes
    if processes is None:
        is_open = schedule.generator == "auto" and schedule.blas_threads is None and config.memory_limit_gb is None
        processes = min(cores or 1, worthwhile, most) if takes_turns and is_open else 1
    where = schedule.generator
    if where == "auto":
        where = "process" if processes > 1 or (is_on_cpu() and not takes_turns) else "thread"
    threads = schedule.blas_threads
    if threads is None and cores:
        sharers = 1 if where == "thread" else processes + (not takes_turns)
        threads = max(1, cores // sharers)
    streams = schedule.learner_streams if is_on_cpu() else 1
    placed = msgspec.structs.replace(
        schedule, generator=where, generator_processes=processes, blas_threads=threads, learner_streams=streams
    )
    return msgspec.structs.replace(config, schedule=placed)


def _streamed(config: RunConfig, worthwhile: int) -> tuple[RunConfig, int]:
    """How many micro-batches the learner may well differentiate at a time, which the resolved config says where that
    was asked for; where not, memory has its say, too."""
    schedule, learner = config.schedule, config.learner
    streams = 1
    if is_on_cpu() and (schedule.generator == "process" or not schedule.max_staleness):
        rows = learner.batch_size * config.generation.num_generations
        cores = schedule.blas_threads or 1
        if schedule.generator == "process" and not schedule.max_staleness:
            cores *= schedule.generator_processes or 1  # which rest while the learner works
        streams = min(schedule.learner_streams or min(cores, worthwhile), learner.gradient_accumulation_steps or rows)
    if schedule.learner_streams is not None:
        config = msgspec.structs.replace(config, schedule=msgspec.structs.replace(schedule, learner_streams=streams))
    return config, streams


def _reference(config: RunConfig, policy: Policy, checkpoint: Checkpoint | None) -> Weights | None:
    """The model that the run begins with; the checkpoint's where the reference follows the policy."""
    if not config.learner.beta:
        return None
    if config.learner.sync_ref_model and checkpoint is not None and checkpoint.reference is not None:
        return checkpoint.reference
    return policy.weights


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
