"""What outlives an actor: how far prompting has come, what is known of checkpoints, and which groups are open.

An actor that fails is made anew, and its successor is given the same ledger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from troupe.messages import CheckpointWritten, OpenGroup, Prompt, Replace, Slot, Snapshot


class PromptLedger(msgspec.Struct, kw_only=True):
    """How far prompting has come, so that nothing is issued twice or left out when a Prompter fails."""

    next: int
    """Number of the next prompt in the stream: step · P + place."""
    end: int
    """Number of the first prompt that is not to be issued."""
    outbox: deque[Prompt] = msgspec.field(default_factory=deque)
    """Prompts that hold a credit and are not sent yet."""
    alive: dict[int, tuple[Slot, float]] = msgspec.field(default_factory=dict)
    """Group that holds a credit → its slot, and when it was prompted (`time.perf_counter`)."""
    steps_allowed: int | None = None
    """Steps that may be begun while the run is paused, those already begun included; None: it is not paused."""
    held: tuple[str, ...] = ()
    """Why no step may be begun now."""
    draining: bool = False
    last_acted_on: Any = None
    """The message that was acted upon last: a Prompter that gets it once more has nothing left to do but to send."""


class CheckpointLedger(msgspec.Struct, kw_only=True):
    """What a Checkpointer knows, and its successor must."""

    newest: int | None = None
    """Version of the newest checkpoint that is whole."""
    gids: frozenset[int] = frozenset()
    """Groups whose scores it holds."""
    abandoned: set[int] = msgspec.field(default_factory=set)
    """Versions on the disk that come after the one this start went on from: they are not of this run any more, and go
    when it has a checkpoint of its own."""
    pending: Snapshot | None = None
    """What could not be written, and is tried again."""
    failing: bool = False
    """Whether the newest attempt failed."""
    untold: CheckpointWritten | None = None
    """What was written and not told yet."""
    taken_away: str | None = None
    """That the newest checkpoint is not there any more, which was not told yet."""
    pruning_faults: tuple[str, ...] = ()
    """What could not be removed, and was not told yet."""


class OpenGroups:
    """Which groups have begun and not ended.

    The Prompter begins groups; the Learner ends them, or gives their place to another, in the moment in which it
    decides so, before anybody is told. A snapshot of the Learner therefore knows exactly which prompts a run that goes
    on from it has still to bring to an end.
    """

    def __init__(self, groups: Iterable[OpenGroup] = ()) -> None:
        self._open: dict[Slot, OpenGroup] = {group.slot: group for group in groups}

    def begin(self, prompt: Prompt, *, row: int | None = None) -> None:
        """A prompt is issued; one that is there already is left as it is. `row`: where the slot does not say which."""
        group = OpenGroup(slot=prompt.slot, round_size=prompt.round_size, row=row)
        self._open.setdefault(prompt.slot, group)

    def end(self, slots: Iterable[Slot]) -> None:
        """The groups are closed. Those whose place was taken before are not there any more."""
        for slot in slots:
            self._open.pop(slot, None)

    def replace(self, message: Replace) -> None:
        """The next attempts begin in the places of these groups."""
        rows = message.rows or [None] * len(message.slots)
        for slot, row in zip(message.slots, rows, strict=True):
            self._open.pop(slot, None)
            following = next_attempt(slot)
            self._open[following] = OpenGroup(slot=following, round_size=len(message.slots), row=row)

    def has(self, slot: Slot) -> bool:
        """Whether the group in a slot is open."""
        return slot in self._open

    def all(self) -> tuple[OpenGroup, ...]:
        """Every open group, by slot."""
        return tuple(self._open[slot] for slot in sorted(self._open))


def next_attempt(slot: Slot) -> Slot:
    """The slot of the group that takes the place of the one in `slot`."""
    return Slot(step=slot.step, place=slot.place, attempt=slot.attempt + 1)
