"""What learning tells the others (Update, Snapshot, GroupClosed, Replace), and what any actor may report (Incident,
Span).

Times are seconds on the monotonic clock (`time.perf_counter`) of the process that made the message.
*Policy version* is the number of completed learner batches, so the untrained policy is version 0.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from troupe.messages.curriculum import CurriculumState
from troupe.messages.findings import Finding
from troupe.messages.groups import ScoredGroup, Slot

ClosedState = Literal["trained", "filtered", "stale", "quarantined"]
"""How a group ended: used by the learner; without signal; too old to be used; too few scores."""


SpanKind = Literal["work", "wait"]
"""Whether somebody works or waits."""


class Update(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Learner → Metrics and subscribers: one learner batch is done."""

    step: int
    """Batches completed, this one included: 1 after the first."""
    version: int
    """Policy version that the batch made."""
    total_steps: int
    """Batches that the whole run will have."""
    metrics: dict[str, float]
    """Every metric of the step, under TRL's names where TRL has them."""
    findings: tuple[Finding, ...] = ()
    """What the figures so far say is wrong, the most serious first. Metrics adds them."""


class OpenGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group that was begun and has not ended: what it takes to prompt it again."""

    slot: Slot
    round_size: int = 1
    row: int | None = None
    """Dataset row, where it is not the slot that says which."""


class Past(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of the earlier attempts in a place."""

    step: int
    place: int
    filtered: int = 0
    sent_back: bool = False
    """Whether the row that is there now was sampled before."""


class Unfinished(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The groups that are under way when a snapshot is taken."""

    next: int = 0
    """Number of the next prompt in the stream, step · P + place."""
    open: tuple[OpenGroup, ...] = ()
    """All that have begun and not ended, by slot. (What the pinned schedule begins again follows from the version.)"""
    scored: tuple[ScoredGroup, ...] = ()
    """Those that have their scores and wait for the learner."""
    collected: tuple[ScoredGroup, ...] = ()
    """Those that the learner collects for its next step."""
    states: dict[int, ClosedState] = {}
    """Free schedule: how those collected will end, by gid."""
    replaced: tuple[int, ...] = ()
    """Free schedule: gids of those collected whose place another group has taken."""
    pasts: tuple[Past, ...] = ()
    """Free schedule: what became of earlier attempts, for places that are open."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Learner → Checkpointer: everything a checkpoint needs, by reference.

    The arrays are evaluated and immutable, so later steps never change what a snapshot holds. A snapshot stays in
    its process: it is never serialized as a message.
    """

    version: int
    weights: Mapping[str, Any]
    """Hugging Face tensor name → evaluated `mx.array`."""
    optimizer_state: dict[str, Any]
    """Flat name → evaluated `mx.array`: float32, but uint16 where it holds low halves of weights."""
    behind: Mapping[int, Mapping[str, Any]]
    """Older policy versions that generation (pinned, max_staleness ≥ 1) or an evaluation still needs: version →
    weights."""
    reference: Mapping[str, Any] | None = None
    """Weights of the reference policy where it follows the policy; None where it is the model that the run began with,
    or where there is none."""
    average: Mapping[str, Any] | None = None
    """Weights of a policy that teaches itself, where they follow it; otherwise as above."""
    num_tokens: int = 0
    """Prompt and completion tokens of the run so far."""
    skipped_in_a_row: int = 0
    """Updates that were skipped, the last one included, since one was finite."""
    metrics: Mapping[str, float] = {}
    """Mean of every metric over the steps since the snapshot before; empty where there was none."""
    unfinished: Unfinished = Unfinished()
    curriculum: CurriculumState | None = None
    """Where rows are chosen by what came of them."""
    final: bool = False
    """Whether the run ends here, so that the plain model folder `final/` is written too."""


class TokenFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What learning knows of each token of a completion; NaN where it was not learned from."""

    entropies: tuple[float, ...]
    """(T,) of the policy that the step began with, before each token, in nats."""
    ratios: tuple[float, ...]
    """(T,) by how much likelier than to the policy that sampled it each token is to the one that learned last."""


class GroupClosed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Learner → Metrics, and → Prompter where the group holds a credit: a group reached its end.

    Sent exactly once for every gid, when its step is done.
    """

    gid: int
    slot: Slot
    state: ClosedState
    version: int
    """Policy version that existed when the group was closed: the number of the step that it ends with."""
    scored: ScoredGroup | None = None
    """All that was sampled, with its scores."""
    rewards: tuple[float | None, ...] = ()
    """(G,) Σ weight·score over the scores that are there; None where none is, or one is missing through a fault."""
    advantages: tuple[float, ...] | None = None
    """(G,) None where the group was not trained on."""
    token_figures: tuple[TokenFigures | None, ...] = ()
    """(G,) where they are kept."""


class Settle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Checkpointer → Metrics: have all that was told up to the Update of `version` on the disk, since a checkpoint of
    that version is about to exist and what was told before it will not be told again."""

    version: int


class CheckpointWritten(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Checkpointer → Metrics: a checkpoint is whole."""

    version: int
    folder: str
    bytes: int
    seconds: float
    """That writing it took."""
    removed: tuple[int, ...] = ()
    """Versions whose checkpoints were removed afterwards."""


class Replace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Learner → Prompter: groups will not be trained on; the next attempt in each place takes over its credit.

    Pinned schedule: sent once for a round of a step, when all of its groups are scored. Free: for each group by itself.
    """

    slots: tuple[Slot, ...]
    """The groups to be replaced, in order; all of one step and attempt, at least one."""
    rows: tuple[int, ...] | None = None
    """Dataset rows to be prompted again, one a slot: what was sampled was too old. None: rows of the stream of
    replacements, because there was no signal."""


class Incident(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Any actor → Metrics: a fault that did not stop the run."""

    actor: str
    kind: str
    """A short fixed word to count by, such as `reward_timeout`."""
    message: str
    """One sentence for a person."""
    gid: int | None = None


class Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Any actor → Metrics: some work, or a wait, with its times."""

    actor: str
    name: str
    """What is done, or what is waited for."""
    start_s: float
    end_s: float
    """≥ start_s; equal where it is a moment. Infinite where a child process tells its parent that it has begun."""
    kind: SpanKind = "work"
    step: int | None = None
    """Learner batch the work belongs to, where it belongs to one."""
    gid: int | None = None
    """Group the work belongs to, where it belongs to one."""
    gids: tuple[int, ...] = ()
    """Groups the work belongs to, where it belongs to several and each of them passes through it."""
    lane: int = 0
    """Spans of an actor that overlap are in different lanes, unless one is a part of the other."""
    process: int | None = None
    """Pid of the process that did it, on whatever machine; None: the run's own process."""
    member: str = ""
    """Name of the member (`MemberStatus.name`) that did it; empty where it has none."""
    part: str = ""
    """Name of the part of a step that it belongs to, where it belongs to one."""
