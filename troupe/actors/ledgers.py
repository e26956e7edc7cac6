"""OpenGroups: which groups have begun and not ended, over all that happens to the actors.

The Prompter begins groups; the Learner ends them, or gives their place to another, in the moment in which it decides
so, before anybody is told. A snapshot of the Learner therefore knows exactly which prompts a run that goes on from it
has still to bring to an end. Knows nothing of actors, scores or time.
"""

from __future__ import annotations

from collections.abc import Iterable

from troupe.messages import OpenGroup, Prompt, Replace, Slot


class OpenGroups:
    """A ledger, shared by Prompter and Learner."""

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
