"""THE MAP: every mailbox, every channel, every bound, opened in one place.

    Prompter ──Prompt──▶ Generator ──RolloutGroup──▶ Scorer ──ScoredGroup──▶ Learner ──Snapshot──▶ Checkpointer
        ▲                    ▲                                                  │  │
        │                    └────────────── weights (PolicyBoard) ─────────────┘  └──Update, GroupClosed──▶ Metrics
        └─────────────────────────────────── GroupClosed, Replace ──────────────┘

Where the policy acts in an environment or has tools, groups go to the Scorer by way of one more:

    Generator ──RolloutGroup, TurnTaken──▶ Environment ──RolloutGroup──▶ Scorer
        ▲                                    │      └──Answered──▶ Metrics
        └──────────── Observation ───────────┘

Where there is a teacher, they go to the Scorer by way of the Teacher, after the Environment where there is one:

    Generator or Environment ──RolloutGroup──▶ Teacher ──RolloutGroup──▶ Scorer

Where rows are evaluated while training goes on, the learner asks for that; who evaluates decodes on the generator's
device, or where that is no thread of this process asks the generator's crew:

    Learner ──Evaluate──▶ Evaluator ──Evaluated──▶ Metrics
                              └──PartAsked──▶ Generator

The groups of supervised steps are there without being sampled or scored:

    Prompter ──ScoredGroup──▶ Learner

Every actor also reports Incident and Span to Metrics, and the Checkpointer CheckpointWritten. Scorer and Environment
may hold the Prompter up (Hold). From outside come Pause, Resume, Step and Drain to the Prompter, Checkpoint and
settings to the Learner.
"""

from collections.abc import Callable

from troupe.actors.generator.parts import PartAsked
from troupe.actors.metrics import Heard
from troupe.messages import (
    Answered,
    Checkpoint,
    CheckpointWritten,
    Drain,
    Evaluate,
    Evaluated,
    GroupClosed,
    Hold,
    Incident,
    Observation,
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
    TurnTaken,
    Update,
)
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

_INCIDENTS, _SPANS, _UPDATES = 256, 4096, 16
"""Reports a stalled Metrics actor may leave waiting before an incident holds up its sender or a span is dropped."""
_REQUESTS = 1024
"""Requests from outside that a Prompter who is being restarted may leave waiting before the oldest is forgotten."""
_EVALUATIONS = 8
"""Versions that are overdue when a run goes on; later there is one at most."""
_PARTS = 64
"""Parts of evaluations that may wait until the generator has read of them; it has them decoded when it can."""
_REPORTING = ("prompter", "generator", "scorer", "learner", "checkpointer")


class Wiring:
    """The mailboxes of the actors, the channels into them, and the reporters, which send into that of Metrics."""

    def __init__(
        self,
        live: int,
        mailbox: Callable[[str], Mailbox] = Mailbox,
        *,
        episodes: int = 0,
        evaluates: bool = False,
        by_crew: bool = False,
        supervised: bool = False,
        teaches: bool = False,
    ) -> None:
        """`live`: most groups that may be alive: so long, no send on the way of a group can ever wait in a circle.
        `episodes`: that a group has, where the policy acts; 0: it answers once. `evaluates`: whether there are rows to
        be evaluated; `by_crew`: whether members of the generator's crew decode them. `supervised`: whether steps have
        groups that are given. `teaches`: whether there is a teacher."""
        self.prompter, self.generator, self.scorer = mailbox("prompter"), mailbox("generator"), mailbox("scorer")
        self.learner, self.checkpointer, self.metrics = mailbox("learner"), mailbox("checkpointer"), mailbox("metrics")
        prompter, learner, metrics = self.prompter, self.learner, self.metrics

        self.prompts = self.generator.channel("prompts", Prompt, bound=live)
        self.rollouts = self.scorer.channel("rollouts", RolloutGroup, bound=live)
        """From whoever is before the Scorer."""
        self.scored = learner.channel("scored", ScoredGroup, bound=live)
        self.given = learner.channel("given", ScoredGroup, bound=live) if supervised else None
        self.closed: Channel[GroupClosed | Replace] = prompter.channel("closed", GroupClosed, Replace, bound=live)
        self.closed_groups = metrics.channel("closed groups", GroupClosed, bound=live)
        self.updates = metrics.channel("updates", Update, bound=_UPDATES)
        self.snapshots = self.checkpointer.channel("snapshots", Snapshot, bound=1)
        self.checkpoints = metrics.channel("checkpoints", CheckpointWritten, bound=_UPDATES)
        self.hold = prompter.channel("hold", Hold, bound=1, overflow="newest", side=True)
        self.settle = metrics.channel("settle", Settle, bound=1, overflow="newest", side=True)

        self.drain = prompter.channel("drain", Drain, bound=1, overflow="newest", side=True)
        self.control: Channel[Pause | Resume | Step] = prompter.channel(
            "control", Pause, Resume, Step, bound=_REQUESTS, overflow="drop_oldest", side=True
        )
        self.checkpoint = learner.channel("checkpoint request", Checkpoint, bound=1, overflow="newest", side=True)
        self.settings: Channel[SetLearningRate | SetCheckpointEvery] = learner.channel(
            "settings", SetLearningRate, SetCheckpointEvery, bound=_REQUESTS, overflow="drop_oldest", side=True
        )

        self.acting = Acting(self, mailbox("environment"), live, episodes) if episodes else None
        """None where nobody acts."""
        self.teaching = Teaching(mailbox("teacher"), live) if teaches else None
        """None where there is no teacher."""
        self.completed = self.rollouts if self.teaching is None else self.teaching.untaught
        """Where groups go when all their samples have ended."""
        self.evaluating = Evaluating(self, mailbox("evaluator"), by_crew=by_crew) if evaluates else None
        """None where nothing is evaluated."""
        reporting = (*_REPORTING, *["environment"] * bool(episodes), *["evaluator"] * evaluates, *["teacher"] * teaches)
        self.reporters = {actor: _reporter(actor, metrics) for actor in reporting}
        """Of each actor but Metrics."""
        self.metrics_report = _side_reporter("metrics", "metrics incidents", metrics)
        self.supervisor_report = _side_reporter("supervisor", "incidents", metrics)
        """Never waits."""
        self.news: Broadcast[Heard] = Broadcast("news", Update, GroupClosed, Incident)
        """What Metrics is told, for any number of listeners."""


class Acting:
    """The mailbox of the Environment, and the channels from and to it."""

    def __init__(self, wiring: Wiring, environment: Mailbox, live: int, episodes: int) -> None:
        self.environment = environment
        self.turns = environment.channel("turns", TurnTaken, bound=live * episodes)
        """One of each episode at most: of an earlier generator's those may still lie here that a new one asks anew, and
        the Environment reads on whatever else waits."""
        self.sampled = environment.channel("sampled", RolloutGroup, bound=live)
        self.observations = wiring.generator.channel("observations", Observation, bound=live * episodes, side=True)
        self.answered = wiring.metrics.channel("answered", Answered, bound=_SPANS)
        self.hold = wiring.prompter.channel("hold of environments", Hold, bound=1, overflow="newest", side=True)


class Teaching:
    """The mailbox of the Teacher, and the channel to it."""

    def __init__(self, teacher: Mailbox, live: int) -> None:
        self.teacher = teacher
        self.untaught = teacher.channel("untaught", RolloutGroup, bound=live)


class Evaluating:
    """The mailbox of the Evaluator, and the channels to and from it."""

    def __init__(self, wiring: Wiring, evaluator: Mailbox, *, by_crew: bool) -> None:
        self.evaluator = evaluator
        self.parts = wiring.generator.channel("parts of rows", PartAsked, bound=_PARTS, side=True) if by_crew else None
        self.asked = evaluator.channel("evaluations", Evaluate, bound=_EVALUATIONS)
        self.evaluated = wiring.metrics.channel("evaluated", Evaluated, bound=_UPDATES)


def _reporter(actor: str, metrics: Mailbox) -> Reporter:
    incidents = metrics.channel(f"{actor} incidents", Incident, bound=_INCIDENTS)
    return Reporter(actor, incidents, metrics.channel(f"{actor} spans", Span, bound=_SPANS, overflow="drop_oldest"))


def _side_reporter(actor: str, channel: str, metrics: Mailbox) -> Reporter:
    return Reporter(actor, metrics.channel(channel, Incident, bound=_INCIDENTS, overflow="drop_oldest", side=True))
