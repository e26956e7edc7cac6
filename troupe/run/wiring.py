"""THE MAP: every mailbox, every channel, every bound, opened in one place.

    Prompter ──Prompt──▶ Generator ──RolloutGroup──▶ Scorer ──ScoredGroup──▶ Learner ──Snapshot──▶ Checkpointer
        ▲                    ▲                                                  │  │
        │                    └────────────── weights (PolicyBoard) ─────────────┘  └──Update, GroupClosed──▶ Metrics
        └─────────────────────────────────── GroupClosed, Replace ──────────────┘

Every actor also reports Incident and Span to Metrics, and the Checkpointer CheckpointWritten. The Scorer may hold the
Prompter up (Hold). From outside come Pause, Resume, Step and Drain to the Prompter, Checkpoint and settings to the
Learner.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from troupe.actors.metrics import Heard
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
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

_INCIDENTS, _SPANS, _UPDATES = 256, 4096, 16
"""Reports a stalled Metrics actor may leave waiting before an incident holds up its sender or a span is dropped."""
_REQUESTS = 1024
"""Requests from outside that a Prompter who is being restarted may leave waiting before the oldest is forgotten."""
_REPORTING = ("prompter", "generator", "scorer", "learner", "checkpointer")


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """The mailboxes of the actors, the channels into them, and the reporters, which send into that of Metrics."""

    prompter: Mailbox
    generator: Mailbox
    scorer: Mailbox
    learner: Mailbox
    checkpointer: Mailbox
    metrics: Mailbox

    prompts: Channel[Prompt]
    rollouts: Channel[RolloutGroup]
    scored: Channel[ScoredGroup]
    closed: Channel[GroupClosed | Replace]
    closed_groups: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]
    checkpoints: Channel[CheckpointWritten]
    hold: Channel[Hold]
    settle: Channel[Settle]

    drain: Channel[Drain]
    control: Channel[Pause | Resume | Step]
    checkpoint: Channel[Checkpoint]
    settings: Channel[SetLearningRate | SetCheckpointEvery]

    reporters: dict[str, Reporter]
    """Of each actor but Metrics."""
    metrics_report: Reporter
    supervisor_report: Reporter
    """Never waits."""
    news: Broadcast[Heard]
    """What Metrics is told, for any number of listeners."""


def open_wiring(live: int, mailbox: Callable[[str], Mailbox] = Mailbox) -> Wiring:
    """Open every channel. `live`: most groups that may be alive: so long, no send on the way of a group can ever wait
    in a circle."""
    prompter, generator, scorer = mailbox("prompter"), mailbox("generator"), mailbox("scorer")
    learner, checkpointer, metrics = mailbox("learner"), mailbox("checkpointer"), mailbox("metrics")
    return Wiring(
        prompter=prompter,
        generator=generator,
        scorer=scorer,
        learner=learner,
        checkpointer=checkpointer,
        metrics=metrics,
        prompts=generator.channel("prompts", Prompt, bound=live),
        rollouts=scorer.channel("rollouts", RolloutGroup, bound=live),
        scored=learner.channel("scored", ScoredGroup, bound=live),
        closed=prompter.channel("closed", GroupClosed, Replace, bound=live),
        closed_groups=metrics.channel("closed groups", GroupClosed, bound=live),
        updates=metrics.channel("updates", Update, bound=_UPDATES),
        snapshots=checkpointer.channel("snapshots", Snapshot, bound=1),
        checkpoints=metrics.channel("checkpoints", CheckpointWritten, bound=_UPDATES),
        hold=prompter.channel("hold", Hold, bound=1, overflow="newest", side=True),
        settle=metrics.channel("settle", Settle, bound=1, overflow="newest", side=True),
        drain=prompter.channel("drain", Drain, bound=1, overflow="newest", side=True),
        control=prompter.channel("control", Pause, Resume, Step, bound=_REQUESTS, overflow="drop_oldest", side=True),
        checkpoint=learner.channel("checkpoint request", Checkpoint, bound=1, overflow="newest", side=True),
        settings=learner.channel(
            "settings", SetLearningRate, SetCheckpointEvery, bound=_REQUESTS, overflow="drop_oldest", side=True
        ),
        reporters={actor: _reporter(actor, metrics) for actor in _REPORTING},
        metrics_report=_side_reporter("metrics", "metrics incidents", metrics),
        supervisor_report=_side_reporter("supervisor", "incidents", metrics),
        news=Broadcast("news", Update, GroupClosed, Incident),
    )


def _reporter(actor: str, metrics: Mailbox) -> Reporter:
    incidents = metrics.channel(f"{actor} incidents", Incident, bound=_INCIDENTS)
    return Reporter(actor, incidents, metrics.channel(f"{actor} spans", Span, bound=_SPANS, overflow="drop_oldest"))


def _side_reporter(actor: str, channel: str, metrics: Mailbox) -> Reporter:
    return Reporter(actor, metrics.channel(channel, Incident, bound=_INCIDENTS, overflow="drop_oldest", side=True))
