"""Prompter: decides when a group may begin. It issues prompts in slot order, as far as the credits allow, and
replacements at once, on the credits of the groups that they replace."""

from __future__ import annotations

import msgspec

from troupe.messages import Drain, GroupClosed, Prompt, Replace, Slot
from troupe.runtime import Actor, Channel, Credits, Mailbox, Reporter
from troupe.schedule import PromptSchedule


class Prompter(Actor):
    """Receives GroupClosed (a credit returns), Replace (one changes hands) and Drain (issue no further step); sends
    Prompt.

    When nothing is left to issue it closes the channel to the generator: that is how a run ends. Where groups may be
    replaced, that is when the last one of them is closed.
    """

    name = "prompter"

    def __init__(
        self,
        inbox: Mailbox,
        prompts: Channel[Prompt],
        *,
        schedule: PromptSchedule,
        credits: Credits,  # noqa: A002 - the name of the thing
        first_step: int,
        total_steps: int,
        replaces: bool = False,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(inbox, [prompts], report)
        self._prompts = prompts
        self._schedule = schedule
        self._credits = credits
        self._next = first_step * schedule.batch_size
        self._end = total_steps * schedule.batch_size
        self._replaces = replaces

    async def start(self) -> None:
        """Issue as many prompts as there are credits, unless a drain is waiting already: then no step has begun."""
        if not len(self.inbox):
            await self._issue()

    async def handle(self, message: GroupClosed | Replace | Drain) -> None:
        """A closed group makes room for the next, a filtered one for its replacement; a drain ends the stream after the
        step already begun."""
        if isinstance(message, GroupClosed):
            self._credits.give_back(message.gid)
        elif isinstance(message, Replace):
            await self._replace(message.slots)
        else:
            begun_steps = -(-self._next // self._schedule.batch_size)
            self._end = min(self._end, begun_steps * self._schedule.batch_size)
        await self._issue()

    async def _issue(self) -> None:
        while self._next < self._end and self._credits.free:
            step, place = divmod(self._next, self._schedule.batch_size)
            prompt = self._schedule.prompt(Slot(step=step, place=place))
            self._credits.take(prompt.gid)
            self._next += 1
            await self._prompts.send(prompt)
        may_come = self._replaces and self._credits.live
        if self._next >= self._end and not may_come and not self._prompts.closed:
            self._prompts.close()

    async def _replace(self, slots: tuple[Slot, ...]) -> None:
        for slot in slots:
            following = msgspec.structs.replace(slot, attempt=slot.attempt + 1)
            prompt = self._schedule.prompt(following, round_size=len(slots))
            self._credits.give_back(self._schedule.gid(slot))
            self._credits.take(prompt.gid)  # at once, so that nobody else gets the credit
            await self._prompts.send(prompt)
