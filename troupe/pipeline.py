"""THE MAP: every actor, every channel, every bound, in one function.

    Prompter ──Prompt──▶ Generator ──RolloutGroup──▶ Scorer ──ScoredGroup──▶ Learner ──Snapshot──▶ Checkpointer
        ▲                    ▲                                                  │  │
        │                    └────────────── weights (PolicyBoard) ─────────────┘  └──Update, GroupClosed──▶ Metrics
        └─────────────────────────────────── GroupClosed, Replace ──────────────┘

Every actor also reports Incident and Span to Metrics. Nobody else opens a channel or knows two actors at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from troupe.actors.checkpointer import Checkpointer
from troupe.actors.generator import Generator
from troupe.actors.learner import Learner, LearnerOutputs, LearnerState
from troupe.actors.metrics import Metrics, Tally
from troupe.actors.prompter import Prompter
from troupe.actors.scorer import Scorer
from troupe.checkpoint import RunState
from troupe.messages import (
    Checkpoint,
    Drain,
    GroupClosed,
    Incident,
    Prompt,
    Replace,
    RolloutGroup,
    ScoredGroup,
    Snapshot,
    Span,
    Update,
)
from troupe.policy import RolloutEngine, Weights
from troupe.prepare import Prepared
from troupe.runtime import Actor, Broadcast, Channel, Credits, DeviceThread, Mailbox, PolicyBoard, Reporter, TraceWriter
from troupe.sinks import ConsoleSink, JsonlSink, PlainSink, RunInfo, Sink, SinkName

# Reports a stalled Metrics actor may leave waiting before an incident holds up its sender or a span is dropped.
_INCIDENTS, _SPANS, _UPDATES = 256, 4096, 16


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """The cast with its wires, and the ends that stay in the supervisor's hand."""

    actors: tuple[Actor, ...]
    learner: Learner
    checkpointer: Checkpointer
    drain: Channel[Drain]
    checkpoint: Channel[Checkpoint]
    updates: Broadcast[Update]
    tally: Tally
    devices: tuple[DeviceThread, ...]
    """Close them when all actors have ended, not before: on CUDA a thread that ends spoils what another computes."""


def build_pipeline(prepared: Prepared) -> Pipeline:
    """Open every channel and hand each actor its own. Nothing runs yet."""
    config, policy_config = prepared.config, prepared.policy.config
    # by themselves: what the actors are given must not keep the weights that the run began with
    tokenizer, stop_ids, fingerprint = prepared.policy.tokenizer, prepared.policy.eos_ids, prepared.fingerprint
    board: PolicyBoard[Weights] = PolicyBoard(config.schedule.max_staleness)
    start = _starting_state(prepared, board)
    credits_ = Credits((config.schedule.max_staleness + 1) * config.learner.batch_size)
    live = credits_.limit  # with every data channel this long, no send on the data path can ever wait in a circle
    tally = Tally()
    updates: Broadcast[Update] = Broadcast("updates", Update)

    prompter_box, generator_box, scorer_box = Mailbox("prompter"), Mailbox("generator"), Mailbox("scorer")
    learner_box, checkpointer_box, metrics_box = Mailbox("learner"), Mailbox("checkpointer"), Mailbox("metrics")

    def report(actor: str) -> Reporter:
        return Reporter(
            actor,
            metrics_box.channel(f"{actor} incidents", Incident, bound=_INCIDENTS),
            metrics_box.channel(f"{actor} spans", Span, bound=_SPANS, overflow="drop_oldest"),
        )

    generating, learning, writing = DeviceThread("generator"), DeviceThread("learner"), DeviceThread("checkpointer")
    prompter = Prompter(
        prompter_box,
        generator_box.channel("prompts", Prompt, bound=live),
        schedule=prepared.schedule,
        credits=credits_,
        first_step=prepared.first_step,
        total_steps=prepared.total_steps,
        replaces=config.learner.dynamic_sampling,
        report=report("prompter"),
    )
    generator = Generator(
        generator_box,
        scorer_box.channel("rollouts", RolloutGroup, bound=live),
        engine=lambda: RolloutEngine(policy_config, config.generation, stop_ids=stop_ids, tokenizer=tokenizer),
        device=generating,
        board=board,
        decode_text=tokenizer.decode_sampled,
        seed=config.seed,
        report=report("generator"),
    )
    scorer = Scorer(
        scorer_box,
        learner_box.channel("scored", ScoredGroup, bound=live),
        rewards=prepared.rewards,
        report=report("scorer"),
    )
    learner = Learner(
        learner_box,
        LearnerOutputs(
            closed_to_prompter=prompter_box.channel("closed", GroupClosed, Replace, bound=live),
            closed_to_metrics=metrics_box.channel("closed groups", GroupClosed, bound=live),
            updates=metrics_box.channel("updates", Update, bound=_UPDATES),
            snapshots=checkpointer_box.channel("snapshots", Snapshot, bound=1),
        ),
        device=learning,
        config=config.learner,
        policy_config=policy_config,
        state=start,
        board=board,
        reward_weights=dict(zip(prepared.rewards.names, prepared.rewards.weights, strict=True)),
        temperature=config.generation.temperature,
        max_completion_length=config.generation.max_completion_length,
        min_scored=config.rewards.min_scored,
        pad_id=tokenizer.pad_token_id or 0,
        prompts_per_epoch=prepared.schedule.rows,
        total_steps=prepared.total_steps,
        checkpoint_every=config.checkpoint.every,
        learns_beside_checkpoints=config.checkpoint.overlap is not False,
        report=report("learner"),
    )
    checkpointer = Checkpointer(
        checkpointer_box,
        device=writing,
        run=prepared.folder,
        keep=config.checkpoint.keep,
        policy_config=policy_config,
        source=prepared.source,
        run_state=lambda snapshot: RunState(
            version=snapshot.version,
            seed=config.seed,
            dataset=fingerprint,
            num_tokens=snapshot.num_tokens,
        ),
        report=report("checkpointer"),
    )
    metrics = Metrics(
        metrics_box,
        sinks=_sinks(prepared),
        listeners=updates,
        tally=tally,
        watched=(generator_box, scorer_box, learner_box, checkpointer_box),
    )
    return Pipeline(
        actors=(prompter, generator, scorer, learner, checkpointer, metrics),
        learner=learner,
        checkpointer=checkpointer,
        drain=prompter_box.channel("drain", Drain, bound=1, overflow="newest", side=True),
        checkpoint=learner_box.channel("checkpoint request", Checkpoint, bound=1, overflow="newest", side=True),
        updates=updates,
        tally=tally,
        devices=(generating, learning, writing),
    )


def _starting_state(prepared: Prepared, board: PolicyBoard[Weights]) -> LearnerState:
    """Publish the versions that the first steps are generated with; say where learning goes on."""
    if prepared.checkpoint is not None:
        for version, weights in sorted(prepared.checkpoint.behind.items()):
            board.publish(version, weights)
    board.publish(prepared.first_step, prepared.policy.weights)
    return LearnerState(
        version=prepared.first_step,
        weights=prepared.policy.weights,
        optimizer_state=prepared.optimizer_state,
        reference=prepared.reference,
        num_tokens=0 if prepared.checkpoint is None else prepared.checkpoint.state.num_tokens,
    )


def _sinks(prepared: Prepared) -> list[Sink]:
    folder: Path = prepared.folder
    run = RunInfo(
        name=folder.name,
        folder=str(folder),
        total_steps=prepared.total_steps,
        first_step=prepared.first_step,
    )
    console = Console()
    makers: dict[SinkName, Callable[[], Sink]] = {
        "console": lambda: ConsoleSink(run, console) if console.is_terminal else PlainSink(run, sys.stdout),
        "jsonl": lambda: JsonlSink(folder / "metrics.jsonl", first_step=prepared.first_step),
        "trace": lambda: TraceWriter(folder / "trace.json"),
    }
    return [makers[name]() for name in prepared.config.metrics.sinks]
