"""Start: where a run begins, or goes on from what an earlier start left in its folder."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.actors.schedule import count_steps
from troupe.checkpoint import Checkpoint
from troupe.grpo import adamw_init
from troupe.messages import Unfinished
from troupe.policy import Policy, Weights, model_fingerprint
from troupe.records.lost_steps import lost_steps
from troupe.records.standing import Change
from troupe.rewards import RewardManager
from troupe.run.config import RunConfig
from troupe.run.inputs import Inputs
from troupe.run.resume.changes import ChangesLog
from troupe.run.resume.check import Resumption
from troupe.run.resume.groups import Restored, restored_free, restored_pinned
from troupe.run.resume.newest import Identity, as_begun, newest_checkpoint, reinstated


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What learning and prompting go on from."""

    identity: Identity
    policy: Policy
    """The policy that the run starts from, or goes on from after a resume."""
    reference: Weights | None
    """Weights of the reference policy where learner.beta ≠ 0."""
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


def start_run(folder: Path, config: RunConfig, inputs: Inputs, resumption: Resumption | None, *, resume: bool) -> Start:
    """Find the newest checkpoint where the run is resumed. CheckpointError, ConfigError or RewardError where it cannot
    go on so."""
    policy, rewards = inputs.policy, inputs.rewards
    identity = Identity(
        dataset=inputs.dataset.fingerprint, model=model_fingerprint(inputs.source), rewards=rewards.names
    )
    checkpoint: Checkpoint | None = None
    notices: list[str] = []
    lost: list[str] = []
    if resume:
        checkpoint, notices = newest_checkpoint(folder, resumption, config, identity, policy)
    if checkpoint is not None:
        policy = as_begun(policy, checkpoint)
    if resumption is not None:
        stored = resumption.stored.learner
        before = count_steps(
            len(inputs.dataset),
            batch_size=config.learner.batch_size,
            epochs=stored.epochs,
            max_steps=stored.max_steps,
        )
        notices += resumption.notices(inputs.total_steps, before, checkpoint)
    if checkpoint is not None:
        lost = lost_steps(folder, checkpoint.state.version, checkpoint.made.lacking, config.metrics.sinks)
    changes, new_changes, told = _changes(folder, config, resumption, checkpoint, rewards)
    optimizer_state = adamw_init(policy.weights) if checkpoint is None else checkpoint.optimizer_state
    mx.eval(list(optimizer_state.values()))
    return Start(
        identity=identity,
        policy=policy if checkpoint is None else policy.having(checkpoint.weights),
        reference=_reference(config, policy, checkpoint),
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


def _reference(config: RunConfig, policy: Policy, checkpoint: Checkpoint | None) -> Weights | None:
    """The model that the run begins with; the checkpoint's where the reference follows the policy."""
    if not config.learner.beta:
        return None
    if config.learner.sync_ref_model and checkpoint is not None and checkpoint.reference is not None:
        return checkpoint.reference
    return policy.weights
