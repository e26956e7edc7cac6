"""Ledgers: what outlives the actors of a run, and is there before the first of them; and the factories of what a run
makes of threads, engines, files and sinks, in whose place tests give others."""

import time
from collections import deque
from collections.abc import Callable

import msgspec

from troupe.actors.checkpointer import CheckpointWriter, Judged, gids_of
from troupe.actors.evaluator.ledger import EvaluationLedger
from troupe.actors.generator.local import Start
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.learner.train import BatchTrainer
from troupe.actors.ledgers import CheckpointLedger, OpenGroups, PromptLedger
from troupe.actors.metrics import Tally
from troupe.checkpoint import MANIFEST, Made, RewardState, RunState, checkpoint_folder, newer_versions
from troupe.messages import CheckpointWritten, Snapshot
from troupe.policy import RolloutEngine, Weights
from troupe.records.diagnosis.past import begin_again
from troupe.records.sinks.base import RunInfo, Sink
from troupe.records.sinks.make import make_sinks
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.thread import SinkThread
from troupe.records.sinks.trace import TraceWriter
from troupe.records.trend import stored_rewards
from troupe.run.cluster import OpenNetwork, open_network
from troupe.run.config import config_table
from troupe.run.prepare import Prepared, prepare
from troupe.run.sets import OF_EVALUATION
from troupe.runtime.board import Credits, PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.machine import VERSION, describe_machine
from troupe.runtime.mailbox import Mailbox


def sinks_of(prepared: Prepared) -> list[Sink]:
    """The sinks that the config names."""
    first_step = prepared.start.first_step
    run = RunInfo(
        name=prepared.folder.name,
        folder=str(prepared.folder),
        total_steps=prepared.inputs.total_steps,
        first_step=first_step,
        program=VERSION,
        machine=describe_machine() if "sqlite" in prepared.config.metrics.sinks else "",
        past=stored_rewards(prepared.folder, first_step) if first_step else (),
        evaluated=prepared.start.evaluated,
        config=config_table(prepared.config),
    )
    return make_sinks(prepared.config.metrics, run, {"trace": lambda: TraceWriter(prepared.folder / "trace.json")})


class Factories(msgspec.Struct, frozen=True, kw_only=True):
    """How the parts of a run are made that take time or room."""

    prepare: Callable[..., Prepared] = prepare
    device: Callable[[str], DeviceThread] = DeviceThread
    mailbox: Callable[[str], Mailbox] = Mailbox
    trainer: Callable[..., BatchTrainer] = BatchTrainer
    engine: Callable[..., RolloutEngine] = RolloutEngine
    writer: Callable[..., CheckpointWriter] = CheckpointWriter
    sinks: Callable[[Prepared], list[Sink]] = sinks_of
    sink_thread: Callable[..., SinkThread] = SinkThread
    network: OpenNetwork = open_network


class Ledgers:
    """What outlives the actors."""

    def __init__(self, prepared: Prepared, factories: Factories, check_folder: Callable[[], None]) -> None:
        config, restored = prepared.config, prepared.start.restored
        schedule, batch_size = config.schedule, config.learner.batch_size
        self.board: PolicyBoard[Weights] = PolicyBoard(schedule.max_staleness if schedule.mode == "pinned" else 0)
        self.credits = Credits((schedule.max_staleness + 1) * batch_size, restored.alive)
        self.prompts = PromptLedger(
            next=restored.next,
            end=prepared.inputs.total_steps * batch_size,
            outbox=deque(restored.prompts),
            alive={gid: (slot, time.perf_counter()) for gid, slot in restored.alive.items()},
        )
        self.open_groups = OpenGroups(restored.open)
        self.handed_over: set[int] = set()
        """Groups that the Generator has sent on while the round that they are part of is still being decoded."""
        self.recorded = dict(restored.recorded)
        """Gid → groups that were sampled and scored before the run was resumed."""
        self.conversations = (
            None if prepared.inputs.acting_setup is None else prepared.inputs.acting_setup.conversations()
        )
        """What was said in the episodes that are under way, where the policy acts."""
        table, first = config_table(config), prepared.start.first_step
        self.tally = Tally(diagnosis=begin_again(table, prepared.folder, first))
        self.sinks = Sinks(
            factories.sinks(prepared),
            timeout_s=config.metrics.sink_timeout_s,
            before_opening=check_folder,
            thread=factories.sink_thread,
        )
        self.evaluations = EvaluationLedger(
            [each.name for each in prepared.inputs.sets],
            prepared.start.evaluated,
            prepared.folder,
            {name: conditions.now() for name, conditions in prepared.inputs.conditions.items()},
            hold=self.board.hold,
        )
        self.writer = _make_writer(prepared, factories, self, check_folder)
        self.files: WeightsFiles | None = None
        """Weights for the generator's processes, where it has any; close them at the end, too."""
        if schedule.generator == "process":
            evaluated = bool(prepared.inputs.sets)
            self.files = WeightsFiles(prepared.folder, at_once=schedule.max_staleness + 2 + evaluated)
        self.hosts: list[Start] = []
        """Who starts the generator's first processes beside the learner's ranks."""
        working = ("generator", "learner", "checkpointer", *["teacher"] * config.teacher.has_actor)
        self.devices = {name: factories.device(name) for name in working}
        """By actor. Close them when all actors have ended, not before: on CUDA a thread that ends spoils what another
        computes."""


def _make_writer(
    prepared: Prepared, factories: Factories, ledgers: Ledgers, check_folder: Callable[[], None]
) -> CheckpointWriter:
    config, policy = prepared.config, prepared.start.policy
    # by themselves: the writer must not keep the weights that the run began with
    rewards, identity, stop_ids = prepared.inputs.rewards, prepared.start.identity, policy.eos_ids
    table, machine = config_table(config), prepared.rounding
    files_of = policy.base.files_of
    network, metric, evaluations = policy.config, config.checkpoint.metric_for_best, ledgers.evaluations

    def judged() -> Judged:
        if not metric.startswith(OF_EVALUATION):
            return Judged()
        pending = evaluations.pending.keys()  # first: what is done with meanwhile has its value then
        return Judged(evaluations.values(metric, or_before=True), pending)

    def run_state(snapshot: Snapshot) -> RunState:
        standing = rewards.standing(snapshot.version)
        return RunState(
            version=snapshot.version,
            seed=config.seed,
            dataset=identity.dataset,
            num_tokens=snapshot.num_tokens,
            mode=config.schedule.mode,
            model=identity.model,
            skipped_in_a_row=snapshot.skipped_in_a_row,
            rewards={name: RewardState(version=times, spec=spec) for name, (times, spec) in standing.items()},
            metrics=dict(snapshot.metrics),
            stop_ids=tuple(sorted(stop_ids)),
        )

    return factories.writer(
        prepared.folder,
        config.checkpoint,
        policy.config,
        policy.companions,
        run_state=run_state,
        made=lambda: Made(config=table, machine=machine, lacking=ledgers.sinks.lacking(), teacher=identity.teacher),
        adapter_files=lambda weights: files_of(network, weights),
        check_folder=check_folder,
        ledger=_checkpoints_so_far(prepared),
        judged=judged,
    )


def _checkpoints_so_far(prepared: Prepared) -> CheckpointLedger:
    """What is known of the run's checkpoints when it begins, or goes on."""
    found = prepared.start.checkpoint
    if found is None:
        return CheckpointLedger(abandoned=newer_versions(prepared.folder, -1))
    version = found.state.version
    folder = checkpoint_folder(prepared.folder, version)
    return CheckpointLedger(
        newest=version,
        gids=gids_of(found.unfinished),
        abandoned=newer_versions(prepared.folder, version),
        # once more: a stop writes its checkpoint when nobody listens any more, and a kill may come before the telling
        untold=CheckpointWritten(
            version=version,
            folder=str(folder),
            bytes=sum(file.stat().st_size for file in folder.glob("*") if file.name != MANIFEST),
            seconds=0.0,
        ),
    )
