"""Rounds: which prompts are decoded together, and which of their groups were sent on already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from troupe.messages import Prompt, RolloutGroup, ScoredGroup
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


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
