"""Rows of evaluations, decoded by the generator's crew: beside the groups of training and after them, whoever fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from tests.support.fakes import Reports, make_group, make_prompt
from troupe.actors.evaluator.decoding import CrewDecoder
from troupe.actors.generator.crew import Crew
from troupe.actors.generator.parts import Part, PartAsked
from troupe.actors.generator.remote import RemoteGenerator
from troupe.messages import Evaluate, MemberStatus, Observation, Prompt, RolloutGroup
from troupe.runtime.board import PolicyBoard
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import Restarts, Role, run_roles

pytestmark = pytest.mark.anyio
ROWS = Evaluate(version=3, weights={})


class OneMember:
    """A member that decodes a part when it may, and a source of it."""

    name = needs = ""

    def __init__(self) -> None:
        self.decoded: list[str] = []
        self.may = anyio.Event()
        self.fails: list[str] = []
        """Parts at which the source fails, once each, with the part's first group handed over."""
        self.has_finished = False

    async def observe(self, observation: Observation) -> None: ...

    async def run(self, crew: Crew) -> None:
        while True:
            await self.may.wait()
            for part in await crew.take(self):
                await self._decode(crew, part)

    async def _decode(self, crew: Crew, part: Part) -> None:
        for prompt in part.prompts:
            await crew.completed(self, make_group(prompt))
            if part.name in self.fails:
                self.fails.remove(part.name)
                raise OSError("no idea")
        self.decoded.append(part.name)

    def statuses(self) -> Sequence[MemberStatus]:
        return ()

    async def finish(self) -> None:
        self.has_finished = True


class Rig:
    """A generator with one member, and what it is asked by."""

    def __init__(self) -> None:
        self.inbox, self.scorer, self.member = Mailbox("generator"), Mailbox("scorer"), OneMember()
        self.prompts: Channel[Prompt] = self.inbox.channel("prompts", Prompt, bound=9)
        self.asked: Channel[PartAsked] = self.inbox.channel("rows", PartAsked, bound=9, side=True)
        groups, board = self.scorer.channel("rollouts", RolloutGroup, bound=9), PolicyBoard[Any](0)
        board.publish(0, {})
        self.make = lambda: RemoteGenerator(
            self.inbox,
            groups,
            members=lambda: [self.member],
            board=board,
            parts=1,
            rows=self.asked,
            report=Reports().reporter("generator"),
        )
        self.decoder = CrewDecoder(self.asked, 1)
        self.counted = 0

    async def run(self) -> None:
        await run_roles([Role(self.make)], Restarts(limit=1, first_s=0.01))

    async def answer(self, *rows: int) -> None:
        prompts = [make_prompt(-1, row) for row in rows]
        groups = await self.decoder.complete(prompts, ROWS, self._count)
        assert [group.prompt for group in groups] == prompts

    def _count(self) -> None:
        self.counted += 1


async def test_training_comes_first_and_evaluations_go_on_when_it_is_over() -> None:
    rig = Rig()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.answer, 5, 6)
            await anyio.wait_all_tasks_blocked()
            await rig.prompts.send(make_prompt(0, 0, round_size=1))
            rig.prompts.close()
            tasks.start_soon(rig.run)
            await anyio.wait_all_tasks_blocked()
            rig.member.may.set()
            trained = [group async for group in rig.scorer]  # it ends, so that who comes behind comes to an end
            await rig.answer(7)
            assert not rig.member.has_finished
            rig.asked.close()
    assert rig.member.decoded == ["0.0.0", "e.3.1.5", "e.3.1.7"]
    assert rig.member.has_finished
    assert (rig.counted, len(trained)) == (3, 1)


async def test_a_generator_that_fails_goes_on_with_what_it_was_asked_for() -> None:
    rig = Rig()
    rig.member.fails = ["e.3.1.5"]
    rig.member.may.set()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.run)
            await rig.answer(5, 6)
            rig.asked.close()
            rig.prompts.close()
    assert (rig.member.decoded, rig.counted) == (["e.3.1.5"], 2)


async def test_what_an_evaluator_that_failed_had_asked_for_answers_the_next_one() -> None:
    rig = Rig()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.run)
            with anyio.move_on_after(0.01):
                await rig.answer(5, 6)
            tasks.start_soon(rig.answer, 5, 6)
            await anyio.wait_all_tasks_blocked()
            rig.member.may.set()
            await rig.asked.settled()
            rig.asked.close()
            rig.prompts.close()
    assert (rig.member.decoded, rig.counted) == (["e.3.1.5"], 2)
