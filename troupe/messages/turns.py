"""What is said while episodes go on: a turn is taken, it is answered, the answer is recorded and read."""

import msgspec

from troupe.messages.episodes import Answer
from troupe.messages.groups import FinishReason, Prompt, Slot


class TurnTaken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Generator → Environment: a sample has ended its turn and waits."""

    prompt: Prompt
    """Of its group."""
    sample: int
    """Place in the group, from 0."""
    turn: int
    token_ids: tuple[int, ...]
    """Sampled in this turn; none at turn 0."""
    finish_reason: FinishReason
    start: int
    """Tokens that the rollout had before this turn."""
    room: int
    """Tokens that the row may have beyond these, an observation's included."""
    asker: int = 0
    """Which generator asks, where one has failed and another has begun again."""


class Observation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Environment → Generator: what the sample reads next, or that it has ended."""

    gid: int
    sample: int
    turn: int
    """Which turn is answered."""
    ids: tuple[int, ...] = ()
    """To be read behind what is there."""
    prompt_ids: tuple[int, ...] | None = None
    """A new row begins with these, because the template tells what was said before in another way, or because the
    opening differs from the group's prompt; None: the row goes on with `ids`."""
    done: bool = False
    """Nothing more is to be sampled."""
    asker: int = 0
    """As in the turn that is answered: what an earlier generator asked for is of no use to another."""


class Answered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Environment → Metrics: an answer to be recorded."""

    gid: int
    slot: Slot
    sample: int
    turn: int
    token_ids: tuple[int, ...]
    """What it answers, to be compared when it is asked for again."""
    answer: Answer
