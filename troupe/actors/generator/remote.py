"""RemoteGenerator: stands in for generators elsewhere: in processes of this machine, at workers, in other engines.

It makes parts of the prompts, gives them to the crew, and hands over the groups that come back.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe.actors.generator.crew import Crew, Members
from troupe.actors.generator.parts import PartAsked, parts_of
from troupe.actors.ledgers import Rounds
from troupe.messages import MemberStatus, Observation, Prompt, RolloutGroup, ScoredGroup, TurnTaken
from troupe.policy import Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class _Round(msgspec.Struct):
    """Prompts that are done with together."""

    prompts: list[Prompt]
    left: set[int]
    """Groups that are still to come."""
    kept: ExitStack
    """Keeps the mailbox open."""


class _Rows:
    """A part of an evaluation that is open."""

    def __init__(self, asked: PartAsked) -> None:
        self.asked = asked
        self.came: list[RolloutGroup] = []


class RemoteGenerator(Actor):
    """Receives Prompt, PartAsked where rows are evaluated, and Observation where the policy acts; sends RolloutGroup as
    groups come back, and TurnTaken.

    Pinned schedule: when all prompts of a round are there its parts go to the crew. Free schedule: each prompt does, at
    once. Which member decodes a part changes no bit, nor does when.
    """

    name = "generator"
    acknowledges: ClassVar[bool] = True

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        *,
        members: Callable[[], Sequence[Members]],
        board: PolicyBoard[Weights],
        parts: int | None,
        turns: Channel[TurnTaken] | None = None,
        rows: Channel[PartAsked] | None = None,
        handed_over: set[int] | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`members`: makes the sources of those who decode. `parts`: `schedule.parts`; None: the schedule is free.
        `turns`: where turns of episodes are answered, where the policy acts. `rows`: the way by which it is asked for
        parts of evaluations, a side channel, since some come when all groups have been handed over. `handed_over` and
        `recorded` are as for `Rounds`."""
        super().__init__(inbox, [groups] if turns is None else [groups, turns], report)
        self._rounds = Rounds(inbox, groups, handed_over=handed_over, recorded=recorded)
        self._make_members, self._asked_by = members, rows
        self.sources: Sequence[Members] = ()
        self._board, self._parts = board, parts
        self._crew = Crew(
            self._hand_over,
            board=board,
            report=self.report,
            pinned=parts is not None,
            turns=None if turns is None else turns.send,
        )
        self._open: dict[int, _Round] = {}
        self._unsent: list[Prompt] = []
        self._rows: dict[str, _Rows] = {}
        self._rows_of: dict[int, _Rows] = {}
        """Group → the part that it is of."""
        self._working: TaskGroup

    @property
    def made(self) -> int:
        """Tokens that the longest completion under way has, as of a second ago."""
        return self._crew.made

    def members(self) -> Sequence[MemberStatus]:
        """Everybody who decodes."""
        return [status for source in self.sources for status in source.statuses()]

    @property
    def needs(self) -> str:
        """What members need, where any does."""
        return next((source.needs for source in self.sources if source.needs), "")

    async def run(self) -> None:
        """Run while members work."""
        async with anyio.create_task_group() as self._working:
            await super().run()

    async def start(self) -> None:
        """Let members come."""
        self.sources = self._make_members()
        self._working.start_soon(self._crew.watch)
        for source in self.sources:
            self._working.start_soon(source.run, self._crew)

    async def handle(self, message: Prompt | PartAsked | Observation) -> None:
        """Collect the prompts of a round and have it decoded when it is whole; or have decoded what is there."""
        if isinstance(message, PartAsked):
            self._evaluate(message)
        elif isinstance(message, Observation):
            self.inbox.done(message)  # who comes after would ask again
            await self._crew.observe(message)
        elif self._parts is not None:
            if prompts := self._rounds.gather(message):
                await self._begin(prompts, self._board.pinned_for(message.slot.step))
        else:
            self._unsent.append(message)
            if not len(self.inbox):
                prompts, self._unsent = self._unsent, []
                for prompt in prompts:
                    await self._begin([prompt], None)

    async def finish(self) -> None:
        """Say that no more groups come, go on with evaluations for as long as there are any, and let members end
        well."""
        if self._asked_by is not None:
            for channel in self.outputs:
                if not channel.closed:
                    channel.close()
            self._asked_by.keep_open()
            await self._handle_all()
        for source in self.sources:
            await source.finish()

    async def stop(self) -> None:
        """End the members' work."""
        self._working.cancel_scope.cancel()
        for round_ in self._open.values():
            round_.kept.close()

    async def _begin(self, prompts: list[Prompt], version: int | None) -> None:
        kept = ExitStack()
        begun = _Round(prompts, set(), kept)
        for part in parts_of(prompts, self._parts, version):
            if await self._rounds.left(part.prompts, as_one=True):
                begun.left |= {prompt.gid for prompt in part.prompts}
                self._crew.submit(part)
        if begun.left:
            self._open |= dict.fromkeys(begun.left, begun)
            kept.enter_context(self.inbox.kept_open())
        else:
            self._rounds.finish(prompts)

    def _evaluate(self, asked: PartAsked) -> None:
        """Have a part of an evaluation decoded, unless an Evaluator that has failed had asked for it already."""
        rows = self._rows.get(asked.part.name)
        if rows is not None:
            self.inbox.done(rows.asked)
            rows.asked = asked
            for group in rows.came:
                asked.answer(group)
            return
        rows = self._rows[asked.part.name] = _Rows(asked)
        self._rows_of |= {prompt.gid: rows for prompt in asked.part.prompts}
        self._crew.submit(asked.part)

    def _answer(self, rows: _Rows, group: RolloutGroup) -> None:
        rows.came.append(group)
        rows.asked.answer(group)
        part = rows.asked.part
        if len(rows.came) == len(part.prompts):
            del self._rows[part.name]
            self.inbox.done(rows.asked)

    async def _hand_over(self, group: RolloutGroup) -> None:
        gid = group.prompt.gid
        if (rows := self._rows_of.pop(gid, None)) is not None:
            self._answer(rows, group)
            return
        await self._rounds.hand_over(group)
        begun = self._open.pop(gid)
        begun.left.remove(gid)
        if not begun.left:
            self._rounds.finish(begun.prompts)
            begun.kept.close()
