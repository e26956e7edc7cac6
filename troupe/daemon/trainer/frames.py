"""What the daemon and its trainer tell each other: msgpack frames, the requests and answers of the control socket in
some of them."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from troupe.daemon.control.protocol import Reply, Request
from troupe.messages import ClosedState, FinishReason, Incident
from troupe.records.conversations import Said
from troupe.runtime.frames import decoder


class Begin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The first frame to a trainer: what to run."""

    run_toml: str
    output: str
    """The run folder, an absolute path."""
    identity: tuple[int, int] | None = None
    """Device and inode of that folder: another one in its place is not to be written in."""
    settings: tuple[str, ...] = ()
    """`section.key=value` each."""
    allow_changes: tuple[str, ...] = ()
    """Keys in which a run that stands there already may have another value."""
    paused: bool = False
    """Whether no step is to be begun until a Resume."""
    completions: bool = False
    """Whether the daemon wants to be told of completions."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A request; its answer has the same number."""

    number: int
    request: Request


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What a request comes to."""

    number: int
    reply: Reply


class Started(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="Playing"):
    """Everything is loaded and checked, and the run has begun."""

    notices: tuple[str, ...]
    step: int
    """Learner batches that are done already."""
    total_steps: int
    speaks: bool
    """Whether the trainer itself prints its steps and incidents."""


class Stepped(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A learner batch is done."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    incidents: dict[str, int]
    """Of this start, by kind."""


class Excerpt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An excerpt of a completion."""

    sample: int
    text: str
    tokens: int
    finish_reason: FinishReason
    reward: float | None
    """Weighted sum of the scores; None where there is none."""
    scores: dict[str, float | None]
    said: tuple[Said, ...] = ()
    """Of one that acted: what was said, in place of its text."""
    read: int = 0
    """Tokens of what came back, which `tokens` leaves out."""


class EndedGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An excerpt of a group that has ended."""

    gid: int
    step: int
    """That it ended with."""
    state: ClosedState
    prompt: str
    rewards: tuple[float | None, ...]
    """(G,) of all its completions."""
    samples: tuple[Excerpt, ...]
    """The best and the worst of them; the first two where all are alike."""


class Happened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="Told"):
    """What has happened since the last one: the newest of it, where it was much."""

    incidents: tuple[Incident, ...] = ()
    times: tuple[int, ...] = ()
    """How often each of them happened; empty: once each."""
    left_out: int = 0
    """Further incidents, that came before these."""
    groups: tuple[EndedGroup, ...] = ()


class Finished(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The run has ended well; the last frame."""

    steps: int
    total_steps: int
    stopped_early: str = ""
    """As in `RunResult`."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What was given cannot be used, so that another try would come to the same; the last frame."""

    message: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A fault has ended the run; the last frame."""

    message: str


ToTrainer: TypeAlias = Begin | Ask
ToDaemon: TypeAlias = Answer | Started | Stepped | Happened | Finished | Rejected | Failed
Last: TypeAlias = Finished | Rejected | Failed

decode_in_trainer: Callable[[bytes], ToTrainer] = decoder(ToTrainer, "the daemon and its trainer")
"""What the daemon has sent; MessageError for anything else."""
decode_in_daemon: Callable[[bytes], ToDaemon] = decoder(ToDaemon, "the daemon and its trainer")
"""What a trainer has sent; MessageError for anything else."""
