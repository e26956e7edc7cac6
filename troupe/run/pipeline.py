"""THE MAP: every actor, every channel, every bound, in one function.

    Prompter ──Prompt──▶ Generator ──RolloutGroup──▶ Scorer ──ScoredGroup──▶ Learner ──Snapshot──▶ Checkpointer
        ▲                    ▲                                                  │  │
        │                    └────────────── weights (PolicyBoard) ─────────────┘  └──Update, GroupClosed──▶ Metrics
        └─────────────────────────────────── GroupClosed, Replace ──────────────┘

Every actor also reports Incident and Span to Metrics. Nobody else opens a channel or knows two actors at once.

An actor that fails is made anew (all but the Learner): the makers below give it the same channels, device thread and
ledgers. What must outlive an actor is therefore made here, outside its maker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from troupe.actors.checkpointer import Checkpointer
from troupe.actors.generator.actor import Generator
from troupe.actors.generator.remote import RemoteGenerator
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.actors.learner.actor import Learner, LearnerOutputs
from troupe.actors.learner.gathering import gathering_for
from troupe.actors.learner.snapshots import Snapshots
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.actors.ledgers import CheckpointLedger, OpenGroups, PromptLedger
from troupe.actors.metrics import Heard, Metrics, Tally
from troupe.actors.prompter import Prompter
from troupe.actors.scorer import Scorer
from troupe.checkpoint import MANIFEST, Made, RewardState, RunState, checkpoint_folder, newer_versions
from troupe.messages import (
    Checkpoint,
    CheckpointWritten,
    Drain,
    GroupClosed,
    Hold,
    Incident,
    Pause,
    Prompt,
    Replace,
    Resume,
    RolloutGroup,
    ScoredGroup,
    SetCheckpointEvery,
    SetLearningRate,
    Settle,
    Snapshot,
    Span,
    Step,
    Update,
)
from troupe.policy import RolloutEngine, Weights, is_on_cpu
from troupe.records.sinks.base import RunInfo, Sink
from troupe.records.sinks.make import make_sinks
from troupe.records.sinks.sinks import Sinks
from troupe.records.sinks.trace import TraceWriter
from troupe.rewards import TrainerState
from troupe.run.config import config_table
from troupe.run.prepare import Prepared
from troupe.run.resume.changes import Change, ChangesLog
from troupe.runtime.actor import Actor
from troupe.runtime.board import Credits, PolicyBoard
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.device import DeviceThread
from troupe.runtime.machine import VERSION, describe_machine
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import Role

# Reports a stalled Metrics actor may leave waiting before an incident holds up its sender or a span is dropped.
_INCIDENTS, _SPANS, _UPDATES = 256, 4096, 16
# Requests from outside that a Prompter who is being restarted may leave waiting before the oldest is forgotten.
_REQUESTS = 1024


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """The cast with its wires, and the ends that stay in the supervisor's hand."""

    roles: tuple[Role, ...]
    learner: Learner
    drain: Channel[Drain]
    control: Channel[Pause | Resume | Step]
    checkpoint: Channel[Checkpoint]
    settings: Channel[SetLearningRate | SetCheckpointEvery]
    incidents: Reporter
    """For what the supervisor itself has to tell; never waits."""
    ledger: PromptLedger
    handed_over: set[int]
    """Groups that the Generator has sent on while the round that they are part of is still being decoded."""
    board: PolicyBoard[Weights]
    news: Broadcast[Heard]
    tally: Tally
    sinks: Sinks
    """Closed by Metrics at the end of its part, unless held-out rows come after it; close them at the end, also again.
    """
    devices: tuple[DeviceThread, ...]
    """Close them when all actors have ended, not before: on CUDA a thread that ends spoils what another computes."""
    files: WeightsFiles | None = None
    """Weights for the generator's processes, where it has any; close them at the end, too."""

    @property
    def actors(self) -> tuple[Actor, ...]:
        """Who plays now, in the order in which work flows."""
        return tuple(role.actor for role in self.roles)

    @property
    def untold(self) -> tuple[Incident, ...]:
        """Incidents that came when Metrics had ended."""
        return tuple(m for actor in self.actors for m in actor.inbox.waiting if isinstance(m, Incident))

    def tell(self, incident: Incident) -> None:
        """Count an incident and pass it on while Metrics, who does so otherwise, is not on stage."""
        self.tally.incidents[incident.kind] += 1
        self.news.send_nowait(incident)
        self.sinks.write(incident)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, in the calling thread, when nobody plays any more. OSError where the disk fails."""
        for actor in self.actors:
            if isinstance(actor, Checkpointer):
                actor.write(snapshot)


def build_pipeline(prepared: Prepared, *, room: int = 1, check_folder: Callable[[], None] = lambda: None) -> Pipeline:
    """Open every channel and hand each actor its own. Nothing runs yet.

    `room`: how many times longer than it must be each channel of work is; it changes nothing that is computed.
    `check_folder`: raises FolderGoneError where the run folder is not in its place any more.
    """
    config, policy_config = prepared.config, prepared.policy.config
    # by themselves: what the actors are given must not keep the weights that the run began with
    tokenizer, stop_ids, fingerprint = prepared.policy.tokenizer, prepared.policy.eos_ids, prepared.fingerprint
    model, rewards, changes = prepared.model, prepared.rewards, ChangesLog(prepared.folder)
    table, machine = config_table(config), prepared.machine
    schedule = config.schedule
    board: PolicyBoard[Weights] = PolicyBoard(schedule.max_staleness if schedule.mode == "pinned" else 0)
    start = _starting_state(prepared, board)
    restored = prepared.restored
    alive = restored.alive
    credits_ = Credits((config.schedule.max_staleness + 1) * config.learner.batch_size, alive)
    live = room * max(credits_.limit, len(alive))  # so long, no send on the data path can ever wait in a circle
    tally = Tally()
    news: Broadcast[Heard] = Broadcast("news", Update, GroupClosed, Incident)

    prompter_box, generator_box, scorer_box = Mailbox("prompter"), Mailbox("generator"), Mailbox("scorer")
    learner_box, checkpointer_box, metrics_box = Mailbox("learner"), Mailbox("checkpointer"), Mailbox("metrics")

    sinks = Sinks(_sinks(prepared), timeout_s=config.metrics.sink_timeout_s, before_opening=check_folder)
    settles = metrics_box.channel("settle", Settle, bound=1, overflow="newest", side=True)

    async def settle(version: int) -> bool:
        settles.send_nowait(Settle(version=version))  # by way of Metrics, which may have the step's Update yet to read
        return await sinks.settled(version)

    reporters: list[Reporter] = []

    def report(actor: str) -> Reporter:
        incidents = metrics_box.channel(f"{actor} incidents", Incident, bound=_INCIDENTS)
        spans = metrics_box.channel(f"{actor} spans", Span, bound=_SPANS, overflow="drop_oldest")
        reporters.append(Reporter(actor, incidents, spans))
        return reporters[-1]

    handed_over: set[int] = set()
    ledger = PromptLedger(
        next=restored.next,
        end=prepared.total_steps * config.learner.batch_size,
        outbox=deque(restored.prompts),
        alive={gid: (slot, time.perf_counter()) for gid, slot in alive.items()},
    )
    open_groups = OpenGroups(restored.open)
    recorded = dict(restored.recorded)
    generating, learning, writing = DeviceThread("generator"), DeviceThread("learner"), DeviceThread("checkpointer")
    make_prompter = partial(
        Prompter,
        prompter_box,
        generator_box.channel("prompts", Prompt, bound=live),
        schedule=prepared.schedule,
        credits=credits_,
        ledger=ledger,
        open_groups=open_groups,
        replaces=config.learner.dynamic_sampling or (schedule.mode == "free" and schedule.on_stale != "correct"),
        report=report("prompter"),
    )
    groups = scorer_box.channel("rollouts", RolloutGroup, bound=live)
    files: WeightsFiles | None = None
    make_generator: Callable[[], Actor]
    if schedule.generator == "process":
        files = WeightsFiles(prepared.folder, at_once=schedule.max_staleness + 2)
        make_generator = partial(
            RemoteGenerator,
            generator_box,
            groups,
            setups=_setups(prepared, stop_ids, staleness=board.max_staleness, live=live),
            board=board,
            files=files,
            device=generating,
            handed_over=handed_over,
            recorded=recorded,
            report=report("generator"),
        )
    else:
        make_generator = partial(
            Generator,
            generator_box,
            groups,
            engine=lambda: RolloutEngine(policy_config, config.generation, stop_ids=stop_ids, tokenizer=tokenizer),
            device=generating,
            board=board,
            decode_text=tokenizer.decode_sampled,
            seed=config.seed,
            most_at_once=config.learner.batch_size if schedule.mode == "free" else None,
            handed_over=handed_over,
            recorded=recorded,
            report=report("generator"),
        )
    make_scorer = partial(
        Scorer,
        scorer_box,
        learner_box.channel("scored", ScoredGroup, bound=live),
        rewards=prepared.rewards,
        hold=prompter_box.channel("hold", Hold, bound=1, overflow="newest", side=True),
        trainer_state=partial(
            TrainerState.at,
            max_steps=prepared.total_steps,
            prompts=config.learner.batch_size,
            num_generations=config.generation.num_generations,
            rows=prepared.schedule.rows,
        ),
        recorded=recorded,
        report=report("scorer"),
    )

    def keep_rate(step: int, lr: float) -> None:
        check_folder()
        changes.add(Change(step=step, key="learner.lr", value=lr))

    learner = Learner(
        learner_box,
        LearnerOutputs(
            closed_to_prompter=prompter_box.channel("closed", GroupClosed, Replace, bound=live),
            closed_to_metrics=metrics_box.channel("closed groups", GroupClosed, bound=live),
            updates=metrics_box.channel("updates", Update, bound=_UPDATES),
            snapshots=checkpointer_box.channel("snapshots", Snapshot, bound=1),
        ),
        device=learning,
        trainer=BatchTrainer(
            config.learner,
            policy_config,
            reward_weights=dict(zip(prepared.rewards.names, prepared.rewards.weights, strict=True)),
            temperature=config.generation.temperature,
            max_completion_length=config.generation.max_completion_length,
            pad_id=prepared.policy.pad_id,
            total_steps=prepared.total_steps,
            streams=schedule.learner_streams or 1,
            rates=prepared.live.rates,
        ),
        state=start,
        board=board,
        gathering=gathering_for(
            schedule,
            batch_size=config.learner.batch_size,
            min_scored=config.rewards.min_scored,
            resampling=config.learner.max_resampling_attempts,
            unfinished=restored.collected,
        ),
        snapshots=Snapshots(
            every=prepared.live.checkpoint_every,
            beside_learning=config.checkpoint.overlap is not False,
            with_reference=config.learner.sync_ref_model,
            open_groups=open_groups,
            recorded=recorded,
            next_prompt=lambda: ledger.next,
        ),
        prompts_per_epoch=prepared.schedule.rows,
        keep_rate=keep_rate,
        report=report("learner"),
    )
    shelf = _shelf(prepared)
    make_checkpointer = partial(
        Checkpointer,
        checkpointer_box,
        metrics_box.channel("checkpoints", CheckpointWritten, bound=_UPDATES),
        device=writing,
        run=prepared.folder,
        config=config.checkpoint,
        policy_config=policy_config,
        source=prepared.policy.companions,
        run_state=lambda snapshot: RunState(
            version=snapshot.version,
            seed=config.seed,
            dataset=fingerprint,
            num_tokens=snapshot.num_tokens,
            mode=schedule.mode,
            model=model,
            skipped_in_a_row=snapshot.skipped_in_a_row,
            rewards={
                name: RewardState(version=times, spec=spec)
                for name, (times, spec) in rewards.standing(snapshot.version).items()
            },
            metrics=dict(snapshot.metrics),
            stop_ids=tuple(sorted(stop_ids)),
        ),
        made=lambda: Made(config=table, machine=machine, lacking=sinks.lacking()),
        settle=settle,
        check_folder=check_folder,
        ledger=shelf,
        report=report("checkpointer"),
    )
    make_metrics = partial(
        Metrics,
        metrics_box,
        sinks=sinks,
        listeners=news,
        tally=tally,
        watched=(generator_box, scorer_box, learner_box, checkpointer_box),
        reporters=reporters,
        closes=False,
        report=Reporter(
            "metrics",
            metrics_box.channel("metrics incidents", Incident, bound=_INCIDENTS, overflow="drop_oldest", side=True),
        ),
    )
    return Pipeline(
        roles=(
            Role(make_prompter),
            Role(make_generator),
            Role(make_scorer),
            Role(lambda: learner, restartable=False),
            Role(make_checkpointer),
            Role(make_metrics),
        ),
        learner=learner,
        drain=prompter_box.channel("drain", Drain, bound=1, overflow="newest", side=True),
        control=prompter_box.channel(
            "control", Pause, Resume, Step, bound=_REQUESTS, overflow="drop_oldest", side=True
        ),
        checkpoint=learner_box.channel("checkpoint request", Checkpoint, bound=1, overflow="newest", side=True),
        settings=learner_box.channel(
            "settings", SetLearningRate, SetCheckpointEvery, bound=_REQUESTS, overflow="drop_oldest", side=True
        ),
        board=board,
        news=news,
        tally=tally,
        sinks=sinks,
        ledger=ledger,
        handed_over=handed_over,
        incidents=Reporter(
            "supervisor",
            metrics_box.channel("incidents", Incident, bound=_INCIDENTS, overflow="drop_oldest", side=True),
        ),
        devices=(generating, learning, writing),
        files=files,
    )


def _setups(prepared: Prepared, stop_ids: frozenset[int], *, staleness: int, live: int) -> list[Setup]:
    """What each process of the generator is made of."""
    config = prepared.config
    schedule = config.schedule
    processes = schedule.generator_processes or 1
    return [
        Setup(
            name=f"generator {number}" if processes > 1 else "generator",
            policy=prepared.policy.config,
            generation=config.generation,
            stop_ids=tuple(sorted(stop_ids)),
            tokenizer=str(prepared.source),
            tokenizer_files=prepared.policy.companions.files,
            seed=config.seed,
            max_staleness=staleness,
            most_at_once=config.learner.batch_size if schedule.mode == "free" else None,
            live=live,
            on_cpu=is_on_cpu(),
            blas_threads=schedule.blas_threads,
            limit_gb=prepared.memory.generator_limit_gb,
        )
        for number in range(processes)
    ]


def _starting_state(prepared: Prepared, board: PolicyBoard[Weights]) -> LearnerState:
    """Publish the versions that the first steps are generated with; say where learning goes on."""
    if prepared.checkpoint is not None:
        for version, weights in sorted(prepared.checkpoint.behind.items()):
            board.publish(version, weights)
    board.publish(prepared.first_step, prepared.policy.weights)
    state = None if prepared.checkpoint is None else prepared.checkpoint.state
    return LearnerState(
        version=prepared.first_step,
        weights=prepared.policy.weights,
        optimizer_state=prepared.optimizer_state,
        reference=prepared.reference,
        num_tokens=0 if state is None else state.num_tokens,
        skipped_in_a_row=0 if state is None else state.skipped_in_a_row,
    )


def _shelf(prepared: Prepared) -> CheckpointLedger:
    """What is known of the run's checkpoints when it begins, or goes on."""
    found = prepared.checkpoint
    if found is None:
        return CheckpointLedger(abandoned=newer_versions(prepared.folder, -1))
    unfinished, version = found.unfinished, found.state.version
    folder = checkpoint_folder(prepared.folder, version)
    return CheckpointLedger(
        newest=version,
        gids=frozenset(group.group.prompt.gid for group in (*unfinished.scored, *unfinished.collected)),
        abandoned=newer_versions(prepared.folder, version),
        # once more: a stop writes its checkpoint when nobody listens any more, and a kill may come before the telling
        untold=CheckpointWritten(
            version=version,
            folder=str(folder),
            bytes=sum(file.stat().st_size for file in folder.glob("*") if file.name != MANIFEST),
            seconds=0.0,
        ),
    )


def _sinks(prepared: Prepared) -> list[Sink]:
    run = RunInfo(
        name=prepared.folder.name,
        folder=str(prepared.folder),
        total_steps=prepared.total_steps,
        first_step=prepared.first_step,
        program=VERSION,
        machine=describe_machine() if "sqlite" in prepared.config.metrics.sinks else "",
        config=config_table(prepared.config),
    )
    return make_sinks(prepared.config.metrics, run, {"trace": lambda: TraceWriter(prepared.folder / "trace.json")})
