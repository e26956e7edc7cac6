"""What outlives an actor: how far prompting has come, what is known of checkpoints, which groups are open, and which
prompts are decoded together.

An actor that fails is made anew, and its successor is given the same ledger.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import msgspec

from troupe.messages import CheckpointWritten, OpenGroup, Prompt, Replace, RolloutGroup, ScoredGroup, Slot, Snapshot
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


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
    holds: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Why no step may be begun now, by who says so."""
    draining: bool = False
    last_acted_on: Any = None
    """The message that was acted upon last: a Prompter that gets it once more has nothing left to do but to send."""

    @property
    def held(self) -> tuple[str, ...]:
        """Why no step may be begun now."""
        return tuple(reason for reasons in self.holds.values() for reason in reasons)


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


class Rounds:
    """The prompts that a generator has in hand.

    A prompt is done with when all that was decoded with it is: the successor of a generator that failed is given the
    same prompts, decodes the same round, and leaves out what was handed over already.
    """

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        *,
        handed_over: set[int] | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`handed_over`: gids of groups that were sent and whose prompts are still in hand; it outlives the actor.
        `recorded`: gid → groups that a run, before it was resumed, had sampled already. `report`: is told how long
        sending takes, where it is not None."""
        self._inbox = inbox
        self._groups = groups
        self._report = report
        self._handed_over = set() if handed_over is None else handed_over
        self._recorded = {} if recorded is None else recorded
        self._gathering: defaultdict[tuple[int, int], list[Prompt]] = defaultdict(list)

    def gather(self, prompt: Prompt) -> list[Prompt]:
        """Add a prompt to its round; the whole round, by slot, when this was the last one, else nothing."""
        name = prompt.slot.step, prompt.slot.attempt
        self._gathering[name].append(prompt)
        if len(self._gathering[name]) < prompt.round_size:
            return []
        return sorted(self._gathering.pop(name), key=lambda prompt: prompt.slot)

    async def left(self, prompts: Sequence[Prompt], *, as_one: bool) -> list[Prompt]:
        """The prompts that are to be completed, after those groups were handed over that need not be.

        `as_one`: all are decoded, or none, because what one comes to depends on the others.
        """
        pending = [prompt for prompt in prompts if prompt.gid not in self._handed_over]
        left = [prompt for prompt in pending if prompt.gid not in self._recorded]
        if as_one and left:
            return list(prompts)
        for prompt in pending:
            if prompt.gid in self._recorded:
                await self.hand_over(self._recorded[prompt.gid].group)
        return left

    async def hand_over(self, group: RolloutGroup) -> None:
        """Send a group, unless it was sent before."""
        prompt = group.prompt
        if prompt.gid not in self._handed_over:
            report = self._report
            with report.span("hand over", step=prompt.slot.step, gid=prompt.gid) if report else nullcontext():
                await self._groups.send(group)
            self._handed_over.add(prompt.gid)

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """Be done with prompts all of whose groups were handed over."""
        for prompt in prompts:
            self._inbox.done(prompt)
            self._handed_over.discard(prompt.gid)
