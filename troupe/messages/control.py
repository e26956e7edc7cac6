"""What may be asked of a run from outside while it runs, and what is answered.

All requests may be asked at any time and return at once; what they ask for happens when the actor gets to it.
"""

from typing import Annotated, Any, Literal

import msgspec

from troupe.messages.evaluations import Evaluated
from troupe.messages.findings import Finding
from troupe.messages.groups import Slot
from troupe.messages.members import MemberStatus

Phase = Literal["starting", "running", "paused", "held", "draining", "stopping", "ended", "failed", "restarting"]
"""Where a run stands. starting: what comes before the first prompt; held: a reward is down, so no step is begun;
restarting: it has failed, and its daemon is about to start it again."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Prompter: issue no further step; finish, checkpoint and flush what has been issued."""


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Prompter: begin no step until told; steps begun are finished, replacements included."""


class Resume(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Prompter: go on after a pause."""


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Prompter: begin some more steps although the run is paused. Without a pause it changes nothing."""

    steps: Annotated[int, msgspec.Meta(ge=1)] = 1


class Hold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Scorer, Environment → Prompter: begin no step as long as there are reasons, such as a reward that is down."""

    sender: str = "scorer"
    """Whose reasons they are; those of others stand beside them."""
    reasons: tuple[str, ...]
    """One sentence each; empty: go on."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Learner: write a checkpoint at the end of the step in hand."""


class SetLearningRate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Learner: from the next step on, another peak learning rate."""

    lr: float


class SetCheckpointEvery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Learner: from now on, so many steps between two checkpoints."""

    steps: Annotated[int, msgspec.Meta(ge=1)]


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Supervisor: end now, with a checkpoint of the last completed step."""


class Set(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Supervisor: another value for one of the keys that may change while the run goes on."""

    key: str
    """As in `--set`: section and name, with a point between."""
    value: Any
    """What JSON can say."""


class Reload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → daemon: read the configuration file again, and take over what may change."""


class GetStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Supervisor: what is the run doing? Answered with a Status."""


class Done(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Answer to a request: it is heeded, now or as soon as it can be."""

    message: str = ""
    """What will come of it, for a person."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Answer to a request: it changes nothing."""

    message: str
    """Why, and what to do."""


class LiveGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group between prompting and the end of its training."""

    gid: int
    slot: Slot
    owner: str
    """The actor that has it in hand, or whose mailbox it waits in."""
    waiting: bool
    """Whether it waits in the mailbox."""
    age_s: float
    """Seconds since it was prompted."""


class Activity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run as a whole is at, or waits for: one line for a person."""

    what: str
    """The same as long as it is the same: `held-out rows`, `generating step 1`, `waiting for reward my_judge`."""
    detail: str = ""
    """What follows it, and changes from one look to the next: ` 37 / 400 (12 s)`."""
    waiting: bool = False
    """Whether it is a wait for something outside of the run, with which something may be wrong."""

    @property
    def text(self) -> str:
        """Both together."""
        return self.what + self.detail


class Restarting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that has failed under its daemon, until it has made a step again."""

    attempt: int
    """The start that is to come, or under way: 1 is the first after a failure."""
    limit: int
    """Starts without a step in between after which the daemon gives up."""
    next_try_s: float
    """Seconds until that start; 0 where it is under way."""
    reason: str
    """How the run ended."""


NOTHING_TOLD = "nothing told"
"""What an actor does that tells of nothing at the moment."""


class Status(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What a run is doing, at the moment of asking."""

    phase: Phase
    step: int
    """Learner batches completed."""
    total_steps: int
    policy_version: int
    groups: tuple[LiveGroup, ...]
    """The oldest first."""
    queues: dict[str, int]
    """Channel → messages that wait in it."""
    doing: dict[str, str]
    """Actor → what it does or waits for, and for how long."""
    held: tuple[str, ...]
    """Why no step is begun although none is forbidden."""
    rewards_down: dict[str, str]
    """Reward → why it is down."""
    restarts: dict[str, int]
    """Actor → times that a new one took over; those that never failed are left out."""
    incidents: dict[str, int]
    """Incidents so far, by kind."""
    metrics: dict[str, float]
    """Those of the newest Update; empty before the first."""
    restarting: Restarting | None = None
    """None where the run has not failed."""
    activity: Activity | None = None
    """None where there is nothing to tell: before the start, after the end, in a pause."""
    notice: str = ""
    """What whoever looks at the run should see first, such as that it is ending and what can be done about it."""
    members: tuple[MemberStatus, ...] = ()
    """Who does work of the run in a process of its own, here or elsewhere; those that are gone stay for a while."""
    findings: tuple[Finding, ...] = ()
    """What the figures so far say is wrong, the most serious first."""
    evaluated: tuple[Evaluated, ...] = ()
    """The first and the newest evaluation of each set, without rows."""


NOT_STARTED = Status(
    phase="starting",
    step=0,
    total_steps=0,
    policy_version=0,
    groups=(),
    queues={},
    doing={},
    held=(),
    rewards_down={},
    restarts={},
    incidents={},
    metrics={},
)
"""Of a run of which nothing is known yet."""
