"""What the outside may ask of a run while it plays, and what it is told about it.

All requests may be asked at any time and return at once; what they ask for happens when the actor gets to it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from troupe.messages.rollout import Slot

Phase = Literal["starting", "running", "paused", "held", "draining", "stopping", "ended", "failed"]
"""Where a run stands. starting: what comes before the first prompt; held: a reward is down, so no step is begun."""


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
    """Scorer → Prompter: begin no step as long as there are reasons, such as a reward that is down."""

    reasons: tuple[str, ...]
    """One sentence each; empty: go on."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Learner: write a checkpoint at the end of the step in hand."""


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
