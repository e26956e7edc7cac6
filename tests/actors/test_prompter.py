"""Prompter: slot order, credits, the end of the stream, draining."""

from __future__ import annotations

import anyio
import pytest

from tests.fakes import ended, taken
from troupe.actors.prompter import Prompter
from troupe.dataset import PromptDataset
from troupe.messages import Drain, GroupClosed, Prompt, Replace, Slot
from troupe.runtime import Channel, Credits, Mailbox
from troupe.schedule import PromptSchedule

pytestmark = pytest.mark.anyio
P, ROWS, STRIDE = 3, 4, 2**48


class Stage:
    """A prompter with three prompts a step, and both its neighbours' ends in hand."""

    def __init__(
        self, *, credits_: int, first_step: int = 0, total_steps: int = 3, replaces: bool = False, rows: int = ROWS
    ) -> None:
        self.inbox, self.generator = Mailbox("prompter"), Mailbox("generator")
        self.closed: Channel[GroupClosed | Replace] = self.inbox.channel("closed", GroupClosed, Replace, bound=9)
        self.drain: Channel[Drain] = self.inbox.channel("drain", Drain, bound=1, overflow="newest", side=True)
        dataset = PromptDataset.from_rows([{"prompt": f"row {i}", "answer": str(i)} for i in range(rows)])
        self.credits = Credits(credits_)
        self.schedule = PromptSchedule(dataset, [(i + 1,) for i in range(rows)], batch_size=P, seed=0, shuffle=False)
        self.prompter = Prompter(
            self.inbox,
            self.generator.channel("prompts", Prompt, bound=9),
            schedule=self.schedule,
            credits=self.credits,
            first_step=first_step,
            total_steps=total_steps,
            replaces=replaces,
        )

    async def close(self, *gids: int) -> None:
        for gid in gids:
            slot = Slot(step=gid % STRIDE // P, place=gid % STRIDE % P, attempt=gid // STRIDE)
            await self.closed.send(GroupClosed(gid=gid, slot=slot, state="trained", version=1))
        await anyio.wait_all_tasks_blocked()

    async def replace(self, *slots: Slot) -> None:
        await self.closed.send(Replace(slots=slots))
        await anyio.wait_all_tasks_blocked()

    async def issued(self) -> list[int]:
        await anyio.wait_all_tasks_blocked()
        return [prompt.gid for prompt in await taken(self.generator)]


async def test_issues_in_slot_order_as_far_as_credits_reach() -> None:
    stage = Stage(credits_=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        await anyio.wait_all_tasks_blocked()
        prompts = await taken(stage.generator)
        assert [(p.gid, p.slot.step, p.slot.place) for p in prompts] == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]
        assert [(p.epoch, p.row, p.prompt, p.columns) for p in prompts[2:]] == [
            (0, 2, "row 2", {"answer": "2"}),
            (0, 3, "row 3", {"answer": "3"}),
        ]
        await stage.close(2)
        assert await stage.issued() == [4]
        await stage.close(0, 1)
        assert await stage.issued() == [5, 6]
        assert not ended(stage.generator)
        await stage.close(3, 4, 5)
        assert await stage.issued() == [7, 8]
        assert ended(stage.generator), "the last prompt ends the stream, though its groups are alive"
        await stage.close(6, 7, 8)
        stage.closed.close()


async def test_goes_on_at_the_first_step_of_a_resumed_run() -> None:
    stage = Stage(credits_=6, first_step=1, total_steps=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [3, 4, 5]
        assert ended(stage.generator)
        stage.closed.close()


@pytest.mark.parametrize("first_step", [2, 5])
async def test_a_run_that_is_done_issues_nothing(first_step: int) -> None:
    stage = Stage(credits_=3, first_step=first_step, total_steps=2)
    stage.closed.close()
    await stage.prompter.run()
    assert await stage.issued() == []
    assert ended(stage.generator)


async def test_drain_amid_a_step_finishes_that_step_and_no_further() -> None:
    stage = Stage(credits_=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [0, 1, 2, 3]
        stage.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        assert not ended(stage.generator), "step 1 has begun, so places 1 and 2 of it are still to come"
        await stage.close(0, 1, 2)
        assert await stage.issued() == [4, 5]
        assert ended(stage.generator)
        stage.drain.send_nowait(Drain())  # a second request changes nothing
        await stage.close(3, 4, 5)
        assert await stage.issued() == []
        stage.closed.close()


async def test_drain_between_steps_ends_at_once() -> None:
    stage = Stage(credits_=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [0, 1, 2]
        stage.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        assert ended(stage.generator)
        await stage.close(0, 1, 2)
        assert await stage.issued() == []
        stage.closed.close()


async def test_drain_before_the_start_begins_no_step() -> None:
    stage = Stage(credits_=3)
    stage.drain.send_nowait(Drain())
    stage.closed.close()
    await stage.prompter.run()
    assert await stage.issued() == []
    assert ended(stage.generator)


async def test_a_group_closed_twice_is_a_fault() -> None:
    stage = Stage(credits_=3)
    await stage.prompter.start()
    closed = GroupClosed(gid=1, slot=Slot(step=0, place=1), state="trained", version=1)
    await stage.prompter.handle(closed)
    with pytest.raises(ValueError, match="group 1 is not alive"):
        await stage.prompter.handle(closed)


async def test_replacements_take_over_the_credits_and_are_one_round() -> None:
    stage = Stage(credits_=P, replaces=True, rows=20, total_steps=2)
    first, third = Slot(step=0, place=0), Slot(step=0, place=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [0, 1, 2]
        await stage.replace(first, third)
        prompts = await taken(stage.generator)
        assert [(p.gid, p.slot.place, p.slot.attempt, p.round_size) for p in prompts] == [
            (STRIDE, 0, 1, 2),
            (2 + STRIDE, 2, 1, 2),
        ]
        assert [p.row for p in prompts] == [
            stage.schedule.prompt(Slot(step=0, place=place, attempt=1)).row for place in (0, 2)
        ]
        assert stage.credits.live == {STRIDE, 1, 2 + STRIDE}
        await stage.replace(Slot(step=0, place=2, attempt=1))
        [last] = await taken(stage.generator)
        assert (last.gid, last.round_size) == (2 + 2 * STRIDE, 1)
        await stage.close(STRIDE, 1, 2 + 2 * STRIDE)
        assert await stage.issued() == [3, 4, 5], "every credit came back once"
        await stage.close(3, 4, 5)
        stage.closed.close()


async def test_the_stream_stays_open_for_replacements_until_every_group_is_closed() -> None:
    stage = Stage(credits_=P, replaces=True, total_steps=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [0, 1, 2]
        await stage.replace(Slot(step=0, place=1))
        assert await stage.issued() == [1 + STRIDE]
        await stage.close(0, 1 + STRIDE)
        assert not ended(stage.generator)
        await stage.close(2)
        assert ended(stage.generator)
        stage.closed.close()


async def test_drain_amid_a_round_of_replacements() -> None:
    stage = Stage(credits_=P, replaces=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.prompter.run)
        assert await stage.issued() == [0, 1, 2]
        stage.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        await stage.replace(Slot(step=0, place=0))
        assert await stage.issued() == [STRIDE], "the step has begun and is finished"
        await stage.close(STRIDE, 1, 2)
        assert await stage.issued() == []
        assert ended(stage.generator)
        stage.closed.close()


async def test_replacing_a_group_that_is_not_alive_is_a_fault() -> None:
    stage = Stage(credits_=P, replaces=True)
    await stage.prompter.start()
    replace = Replace(slots=(Slot(step=0, place=1),))
    await stage.prompter.handle(replace)
    with pytest.raises(ValueError, match="group 1 is not alive"):
        await stage.prompter.handle(replace)
