"""From a configuration to a run that can begin: its inputs, its placement, and its start, at the beginning or from
what an earlier start left in its folder.

Whatever is wrong is raised as an InputError; nothing on disk has been touched by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.actors.schedule import count_steps
from troupe.checkpoint import Checkpoint
from troupe.errors import ConfigError
from troupe.grpo import adamw_init
from troupe.messages import CurriculumState, Evaluated, Unfinished
from troupe.policy import DTYPES, Policy, Weights, is_on_cpu
from troupe.records.layout import STORE
from troupe.records.lost_steps import lost_steps
from troupe.records.sinks.base import check_sinks
from troupe.records.standing import Change
from troupe.records.store.answers import stored_answers
from troupe.records.store.write import check_store
from troupe.rewards import Reward, RewardManager
from troupe.run.acting import NOTHING_GIVEN, Acting
from troupe.run.config import RunConfig, check_config
from troupe.run.demonstrations import average_to_begin
from troupe.run.devices import Cards, claim_cards
from troupe.run.engines import check_engines
from troupe.run.folder import run_folder
from troupe.run.inputs import Inputs, load_inputs
from troupe.run.measure.figures import machine_file, overlaps_better
from troupe.run.memory import Plan
from troupe.run.placement import Machine, hosts_of, place_run, ranks_of
from troupe.run.resume.changes import ChangesLog, Live
from troupe.run.resume.check import Resumption
from troupe.run.resume.evaluated import evaluated_before, lacks_first, told_of_changes
from troupe.run.resume.newest import (
    Identity,
    Restored,
    as_begun,
    newest_checkpoint,
    reinstated,
    restored_free,
    restored_pinned,
)
from troupe.run.sets import check_decodes
from troupe.runtime import linux_cpu
from troupe.runtime.machine import arithmetic
from troupe.runtime.memory import check_wired_limit

_NO_OTHERS: dict[str, None] = {"reference": None, "average": None}
_ACTING = {"environment.factory", "environment.tools"}
"""Who has answered."""
_REWARDS = {"rewards.functions", "rewards.run"}
"""Which they are, and where they run."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A run that can begin."""

    config: RunConfig
    """Resolved: absolute paths, and the sizes that the model allows."""
    folder: Path
    inputs: Inputs
    """Without the arrays of its policy, which `start` has."""
    memory: Plan
    """What the run takes, and what was chosen for it."""
    start: Start
    rounding: dict[str, str] = {}
    """What of this machine decides the bits."""
    ranks: int = 1
    """Processes that learn a batch together."""
    hosts: tuple[int, ...] = ()
    """Ranks beside which the first processes of the generator are threads."""
    cards: Cards | None = None
    """Who has which card, where they are shared out."""
    rewards_stood: bool = False
    """Whether an earlier start of the run named the same rewards, all of them in its config."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""

    def without_arrays(self) -> Prepared:
        """What is to be known once a run goes on by itself, which keeps the arrays that it needs."""
        return msgspec.structs.replace(self, start=self.start.without_arrays(), inputs=self.inputs.without_teachers())

    @property
    def live(self) -> Live:
        """What this start begins with, of all that may be set while it runs."""
        return Live.of(self.config, self.start.changes, self.inputs.rewards.names)

    @property
    def rewards_worked(self) -> bool:
        """Whether an earlier start could use the rewards that this one begins with, as far as the checkpoint says, or
        without one the stored config: of a first start that a reward ended nothing stays."""
        if self.start.checkpoint is None:
            return self.rewards_stood
        before = self.start.checkpoint.state.rewards
        standing = self.inputs.rewards.standing(self.start.first_step)
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
    machine: Machine | None = None,
    rounding: dict[str, str] | None = None,
    acting: Acting = NOTHING_GIVEN,
) -> Prepared:
    """Load and check everything. `rewards` are used beside those that the config names; `allow_changes` are the keys in
    which the config may differ from that of the run that is resumed. `to_show`: nothing is to be run, so that a few
    rows are enough where each has to be made; not in a resume, which compares all. `machine`, `rounding`: what of this
    machine decides where work is placed, and what decides bits; None: it is looked at. `acting`: what there is to act
    with beside what the config names. Raises InputError."""
    asked, notices, cards = _check(config)
    folder = run_folder(asked, resume=resume)
    rounding = arithmetic() if rounding is None else rounding
    if machine is None:
        cores, better = linux_cpu.blas_threads(), overlaps_better(machine_file())
        machine = Machine(on_cpu=is_on_cpu(), cores=cores, cards=cards, better=better)
    resumption = Resumption.of(folder, asked, allow_changes, rounding) if resume else None
    if resume and "sqlite" in asked.metrics.sinks:
        check_store(folder / STORE)
    if resumption is not None:
        asked = resumption.asked
    inputs = load_inputs(asked, rewards, resumption, resume=resume, to_show=to_show, acting=acting)
    memory = place_run(inputs, machine)
    check_decodes(memory.config, inputs.policy.config, inputs.sets, DTYPES[inputs.policy.dtype])
    if resumption is not None:
        resumption = resumption.compared(memory.config)
    start = start_run(folder, memory.config, inputs, resumption, resume=resume)
    if inputs.acting_setup is not None and resumption is not None and not _ACTING & resumption.changed:
        inputs.acting_setup.recall(stored_answers(folder / STORE, start.first_step))
    return Prepared(
        config=msgspec.structs.replace(memory.config, output=str(folder)),
        folder=folder,
        inputs=msgspec.structs.replace(inputs, policy=inputs.policy.without_arrays()),
        memory=memory,
        start=start,
        rounding=rounding,
        ranks=ranks_of(memory.config, machine),
        hosts=hosts_of(memory.config, machine),
        cards=machine.cards,
        rewards_stood=not rewards and resumption is not None and not _REWARDS & resumption.changed,
        notices=(
            *notices,
            *inputs.notices,
            *start.policy.notices,
            *memory.notices,
            *start.notices,
            *([] if resume else _of_parts(memory.config)),
        ),
    )


def _check(config: RunConfig) -> tuple[RunConfig, list[str], Cards | None]:
    """The config, what the user should know of the machine, as far as nothing has to be loaded for it, and who has
    which card of it."""
    config = check_config(config)
    cards = claim_cards(config)
    check_sinks(config.metrics)
    notices: list[str] = []
    if is_on_cpu():
        notices = linux_cpu.advice()
        linux_cpu.check_temporary_files()
    if config.model.path is None:
        raise ConfigError(
            "model.path is missing: name the Hugging Face folder of a model (in RUN.toml, or with -m MODEL_DIR)"
        )
    if config.data.path is None:
        raise ConfigError(
            "data.path is missing: name a .json or .jsonl file of prompts (-d PROMPTS.json), or another source"
        )
    return config, notices + check_wired_limit(config.wired_limit_gb) + check_engines(config), cards


def _of_parts(config: RunConfig) -> list[str]:
    """What whoever waits for workers should know of parts."""
    schedule = config.schedule
    if config.cluster.serve is None or schedule.mode == "free" or (schedule.parts or 1) > 1:
        return []
    return [
        "schedule.parts is 1, so a step is decoded by one at a time, however many workers there are; give two or three "
        "for each of them (with another number the run has other bits)"
    ]


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What learning and prompting go on from."""

    identity: Identity
    policy: Policy
    """The policy that the run starts from, or goes on from after a resume."""
    reference: Weights | None
    """Weights of the reference policy where learner.beta ≠ 0."""
    average: Weights | None = None
    """By which the policy teaches itself, as `LearnerState.average`."""
    optimizer_state: dict[str, mx.array]
    """Fresh, or the checkpoint's; evaluated."""
    checkpoint: Checkpoint | None
    """Where to go on from; None starts at the beginning."""
    restored: Restored
    """Where prompting begins, or goes on."""
    changes: tuple[Change, ...] = ()
    """Made in earlier starts while the run was live."""
    new_changes: tuple[Change, ...] = ()
    """Those of them that are new, because this start asks for another value; to be written before it begins."""
    evaluated: tuple[Evaluated, ...] = ()
    """What evaluations of earlier starts came to, up to the first step."""
    untrained: Weights | None = None
    """The policy that the run began with, where an earlier start has not done with evaluating it."""
    lost: tuple[str, ...] = ()
    """What files of the run do not tell of any more, one line each."""
    notices: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """Learner batches that are done already."""
        return 0 if self.checkpoint is None else self.checkpoint.state.version

    def without_arrays(self) -> Start:
        """What is to be known once the run goes on by itself."""
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = msgspec.structs.replace(
                checkpoint, weights={}, optimizer_state={}, behind={}, unfinished=Unfinished(), **_NO_OTHERS
            )
        return msgspec.structs.replace(
            self,
            policy=self.policy.having({}),
            untrained=None,
            **_NO_OTHERS,
            checkpoint=checkpoint,
            optimizer_state={},
            restored=Restored(next=self.restored.next),
        )


def start_run(folder: Path, config: RunConfig, inputs: Inputs, resumption: Resumption | None, *, resume: bool) -> Start:
    """Find the newest checkpoint where the run is resumed. CheckpointError, ConfigError or RewardError where it cannot
    go on so."""
    policy, rewards = inputs.policy, inputs.rewards
    identity = inputs.identity
    checkpoint: Checkpoint | None = None
    notices: list[str] = []
    lost: list[str] = []
    if resume:
        checkpoint, notices = newest_checkpoint(folder, resumption, config, identity, policy)
    if checkpoint is not None:
        policy = as_begun(policy, checkpoint)
    if resumption is not None:
        stored = resumption.stored.learner
        before = inputs.warm_steps + count_steps(
            len(inputs.dataset),
            batch_size=config.learner.batch_size,
            epochs=stored.epochs,
            max_steps=stored.max_steps,
        )
        notices += resumption.notices(inputs.total_steps, before, checkpoint)
    if checkpoint is not None:
        lost = lost_steps(folder, checkpoint.state.version, checkpoint.made.lacking, config.metrics.sinks)
    changes, new_changes, told = _changes(folder, config, resumption, checkpoint, rewards)
    evaluated = () if checkpoint is None else evaluated_before(folder, checkpoint.state.version)
    told += told_of_changes(evaluated, inputs.conditions)
    lacks_untrained = checkpoint is not None and lacks_first(config.evaluation, list(inputs.conditions), evaluated)
    optimizer_state = adamw_init(policy.weights) if checkpoint is None else checkpoint.optimizer_state
    mx.eval(list(optimizer_state.values()))
    curriculum = inputs.schedule.curriculum
    if curriculum is not None and checkpoint is not None:  # without records, all rows are as if never seen
        curriculum.restore(checkpoint.curriculum or CurriculumState(), checkpoint.state.version)
    return Start(
        identity=identity,
        policy=policy if checkpoint is None else policy.having(checkpoint.weights),
        evaluated=evaluated,
        untrained=policy.weights if lacks_untrained else None,
        reference=_reference(config, inputs, policy, checkpoint),
        average=average_to_begin(config.teacher, policy, checkpoint, warm_steps=inputs.warm_steps),
        optimizer_state=optimizer_state,
        checkpoint=checkpoint,
        restored=_restored(checkpoint, config, inputs),
        changes=changes,
        new_changes=new_changes,
        lost=tuple(lost),
        notices=(*notices, *told, *lost),
    )


def _changes(
    folder: Path,
    config: RunConfig,
    resumption: Resumption | None,
    checkpoint: Checkpoint | None,
    rewards: RewardManager,
) -> tuple[tuple[Change, ...], tuple[Change, ...], list[str]]:
    """What was changed while the run was live, what this start changes of that, and what the user should know.

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


def _restored(checkpoint: Checkpoint | None, config: RunConfig, inputs: Inputs) -> Restored:
    if checkpoint is None:
        return Restored(next=0)
    unfinished, version, schedule = checkpoint.unfinished, checkpoint.state.version, inputs.schedule
    if config.schedule.mode == "free":
        wanted = max(0, inputs.total_steps - version) * schedule.batch_size
        return restored_free(unfinished, schedule, wanted=wanted)
    return restored_pinned(
        unfinished,
        schedule,
        version,
        max_staleness=config.schedule.max_staleness,
        whole_rounds=inputs.rewards.compares_groups,
    )


def _reference(config: RunConfig, inputs: Inputs, policy: Policy, checkpoint: Checkpoint | None) -> Weights | None:
    """The model that the run begins with; the checkpoint's where the reference follows the policy."""
    if not config.learner.beta or config.task == "sft":
        return None
    warmed = inputs.supervised is not None
    if (config.learner.sync_ref_model or warmed) and checkpoint is not None and checkpoint.reference is not None:
        return checkpoint.reference
    return policy.weights
