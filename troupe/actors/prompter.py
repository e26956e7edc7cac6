"""Prompter: decides when a group may begin. It issues prompts in slot order, as far as the credits allow, and
replacements at once, on the credits of the groups that they replace."""

import time

from troupe.actors.ledgers import OpenGroups, PromptLedger, next_attempt
from troupe.actors.schedule import PromptSchedule
from troupe.messages import Drain, GroupClosed, Hold, Pause, Prompt, Replace, Resume, ScoredGroup, Slot, Step
from troupe.runtime.actor import Actor
from troupe.runtime.board import Credits
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class Prompter(Actor):
    """Receives GroupClosed (a credit returns), Replace (one changes hands) and what may stop prompting: Hold from the
    scorer and the environment, and Pause, Resume, Step and Drain from outside. Sends Prompt, and ScoredGroup where the
    completion is given.

    When nothing is left to issue it closes the channel to the generator: that is how a run ends. Where groups may be
    replaced, that is when the last one of them is closed.

    A message is acted upon without an await in between, all on the ledger; only then are prompts sent. So a Prompter
    may fail at any await, and its successor goes on with the ledger.
    """

    name = "prompter"

    def __init__(
        self,
        inbox: Mailbox,
        prompts: Channel[Prompt],
        given: Channel[ScoredGroup] | None = None,
        *,
        schedule: PromptSchedule,
        credits: Credits,  # noqa: A002 - the name of the thing
        ledger: PromptLedger,
        open_groups: OpenGroups | None = None,
        replaces: bool = False,
        report: Reporter | None = None,
    ) -> None:
        """`given`: to the learner, where there are groups that nobody samples."""
        super().__init__(inbox, [prompts, *([] if given is None else [given])], report)
        self._prompts = prompts
        self._given = given
        self._schedule = schedule
        self._credits = credits
        self._ledger = ledger
        self._open = OpenGroups() if open_groups is None else open_groups
        self._replaces = replaces

    async def start(self) -> None:
        """Issue as many prompts as there are credits, unless a request is waiting already: then it comes first."""
        if not len(self.inbox):
            await self._issue()

    async def handle(self, message: GroupClosed | Replace | Hold | Pause | Resume | Step | Drain) -> None:
        """A closed group makes room for the next, one that is not trained on for its replacement; the others say which
        steps may be begun."""
        if message is not self._ledger.last_acted_on:
            self._act_on(message)
            self._ledger.last_acted_on = message
        await self._issue()

    def _act_on(self, message: GroupClosed | Replace | Hold | Pause | Resume | Step | Drain) -> None:
        ledger = self._ledger
        match message:
            case GroupClosed(gid=gid):
                self._credits.give_back(gid)
                ledger.alive.pop(gid, None)
            case Replace():
                self._replace(message)
            case Hold():
                ledger.holds[message.sender] = message.reasons
            case Pause():
                if ledger.steps_allowed is None:
                    ledger.steps_allowed = self._begun_steps
            case Resume():
                ledger.steps_allowed = None
            case Step():
                if ledger.steps_allowed is not None:
                    ledger.steps_allowed = max(ledger.steps_allowed, self._begun_steps) + message.steps
            case Drain():
                ledger.end = min(ledger.end, self._begun_steps * self._schedule.batch_size)
                ledger.draining = True

    async def _issue(self) -> None:
        """Send what holds a credit, and then as much more as may be begun."""
        ledger = self._ledger
        await self._send()
        self._end_with_the_rows()
        while ledger.next < self._limit and self._credits.free:
            step, place = divmod(ledger.next, self._schedule.batch_size)
            prompt = self._schedule.prompt(Slot(step=step, place=place))
            self._credits.take(prompt.gid)
            self._begin(prompt)
            ledger.next += 1
            await self._send()
            self._end_with_the_rows()
        may_come = self._replaces and ledger.alive
        if ledger.next >= ledger.end and not may_come and not self._prompts.closed:
            self._prompts.close()
            if self._given is not None:
                self._given.close()

    def _end_with_the_rows(self) -> None:
        """Begin no step that there are no rows for, which may be known at any moment."""
        if (end := self._schedule.end) is not None:
            self._ledger.end = min(self._ledger.end, end * self._schedule.batch_size)
            self._ledger.draining = True

    @property
    def _begun_steps(self) -> int:
        return -(-self._ledger.next // self._schedule.batch_size)

    @property
    def _limit(self) -> int:
        """Number of the first prompt that must not be issued now."""
        steps = [self._begun_steps] if self._ledger.held else []
        steps += [self._ledger.steps_allowed] if self._ledger.steps_allowed is not None else []
        return min([self._ledger.end, *(step * self._schedule.batch_size for step in steps)])

    def _replace(self, message: Replace) -> None:
        rows = message.rows or [None] * len(message.slots)
        prompts = [
            self._schedule.prompt(next_attempt(slot), round_size=len(message.slots), row=row)
            for slot, row in zip(message.slots, rows, strict=True)
        ]
        for slot, row, prompt in zip(message.slots, rows, prompts, strict=True):
            before = self._schedule.gid(slot)
            self._credits.pass_on(before, prompt.gid)
            self._ledger.alive.pop(before, None)
            self._begin(prompt, row)

    def _begin(self, prompt: Prompt, row: int | None = None) -> None:
        """The prompt has a credit and is to be sent."""
        self._open.begin(prompt, row=row)
        self._ledger.alive[prompt.gid] = prompt.slot, time.perf_counter()
        self._ledger.outbox.append(prompt)

    async def _send(self) -> None:
        outbox = self._ledger.outbox
        while outbox:
            prompt = outbox[0]
            with self.report.span("issue", step=prompt.slot.step, gid=prompt.gid):
                group = self._schedule.given(prompt)
                if group is None:
                    await self._prompts.send(prompt)
                else:
                    assert self._given is not None
                    await self._given.send(group)
            outbox.popleft()
