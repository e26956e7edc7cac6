"""Prompter: slot order, credits, the end of the stream, draining."""

from __future__ import annotations

import anyio
import pytest

from tests.support.fakes import ended, taken
from troupe.actors.ledgers import PromptLedger
from troupe.actors.prompter import Prompter
from troupe.actors.schedule import PromptSchedule
from troupe.dataset import PromptDataset
from troupe.messages import Drain, GroupClosed, Hold, Pause, Prompt, Replace, Resume, Slot, Step
from troupe.runtime.board import Credits
from troupe.runtime.mailbox import Channel, Mailbox

pytestmark = pytest.mark.anyio
P, ROWS, STRIDE = 3, 4, 2**48


class Rig:
    """A prompter with three prompts a step, and both its neighbours' ends in hand."""

    def __init__(
        self, *, credits_: int, first_step: int = 0, total_steps: int = 3, replaces: bool = False, rows: int = ROWS
    ) -> None:
        self.inbox, self.generator = Mailbox("prompter"), Mailbox("generator")
        self.closed: Channel[GroupClosed | Replace] = self.inbox.channel("closed", GroupClosed, Replace, bound=9)
        self.drain: Channel[Drain] = self.inbox.channel("drain", Drain, bound=1, overflow="newest", side=True)
        self.control: Channel[Hold | Pause | Resume | Step] = self.inbox.channel(
            "control", Hold, Pause, Resume, Step, bound=9, side=True
        )
        dataset = PromptDataset.from_rows([{"prompt": f"row {i}", "answer": str(i)} for i in range(rows)])
        self.credits = Credits(credits_)
        self.schedule = PromptSchedule(dataset, [(i + 1,) for i in range(rows)], batch_size=P, seed=0, shuffle=False)
        self.prompts = self.generator.channel("prompts", Prompt, bound=9)
        self.ledger = PromptLedger(next=first_step * P, end=total_steps * P)
        self.replaces = replaces
        self.prompter = self.another()

    def another(self) -> Prompter:
        """One more prompter on the same ledger."""
        return Prompter(
            self.inbox,
            self.prompts,
            schedule=self.schedule,
            credits=self.credits,
            ledger=self.ledger,
            replaces=self.replaces,
        )

    async def ask(self, *requests: Hold | Pause | Resume | Step) -> list[int]:
        for request in requests:
            self.control.send_nowait(request)
        return await self.issued()

    async def close(self, *gids: int) -> None:
        for gid in gids:
            slot = Slot(step=gid % STRIDE // P, place=gid % STRIDE % P, attempt=gid // STRIDE)
            await self.closed.send(GroupClosed(gid=gid, slot=slot, state="trained", version=1))
        await anyio.wait_all_tasks_blocked()

    async def replace(self, *slots: Slot) -> None:
        await self.closed.send(Replace(slots=slots))
        await anyio.wait_all_tasks_blocked()

    async def issued_prompts(self) -> list[Prompt]:
        await anyio.wait_all_tasks_blocked()
        return await taken(self.generator)

    async def issued(self) -> list[int]:
        return [prompt.gid for prompt in await self.issued_prompts()]


async def test_issues_in_slot_order_as_far_as_credits_reach() -> None:
    rig = Rig(credits_=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        await anyio.wait_all_tasks_blocked()
        prompts = await taken(rig.generator)
        assert [(p.gid, p.slot.step, p.slot.place) for p in prompts] == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]
        assert [(p.epoch, p.row, p.prompt, p.columns) for p in prompts[2:]] == [
            (0, 2, "row 2", {"answer": "2"}),
            (0, 3, "row 3", {"answer": "3"}),
        ]
        await rig.close(2)
        assert await rig.issued() == [4]
        await rig.close(0, 1)
        assert await rig.issued() == [5, 6]
        assert not ended(rig.generator)
        await rig.close(3, 4, 5)
        assert await rig.issued() == [7, 8]
        assert ended(rig.generator), "the last prompt ends the stream, though its groups are alive"
        await rig.close(6, 7, 8)
        rig.closed.close()


async def test_goes_on_at_the_first_step_of_a_resumed_run() -> None:
    rig = Rig(credits_=6, first_step=1, total_steps=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [3, 4, 5]
        assert ended(rig.generator)
        rig.closed.close()


@pytest.mark.parametrize("first_step", [2, 5])
async def test_a_run_that_is_done_issues_nothing(first_step: int) -> None:
    rig = Rig(credits_=3, first_step=first_step, total_steps=2)
    rig.closed.close()
    await rig.prompter.run()
    assert await rig.issued() == []
    assert ended(rig.generator)


async def test_drain_amid_a_step_finishes_that_step_and_no_further() -> None:
    rig = Rig(credits_=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2, 3]
        rig.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        assert not ended(rig.generator), "step 1 has begun, so places 1 and 2 of it are still to come"
        await rig.close(0, 1, 2)
        assert await rig.issued() == [4, 5]
        assert ended(rig.generator)
        rig.drain.send_nowait(Drain())  # a second request changes nothing
        await rig.close(3, 4, 5)
        assert await rig.issued() == []
        rig.closed.close()


async def test_drain_between_steps_ends_at_once() -> None:
    rig = Rig(credits_=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        rig.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        assert ended(rig.generator)
        await rig.close(0, 1, 2)
        assert await rig.issued() == []
        rig.closed.close()


async def test_drain_before_the_start_begins_no_step() -> None:
    rig = Rig(credits_=3)
    rig.drain.send_nowait(Drain())
    rig.closed.close()
    await rig.prompter.run()
    assert await rig.issued() == []
    assert ended(rig.generator)


async def test_no_step_begins_without_rows_even_where_that_is_known_amid_sending() -> None:
    class Ending(PromptSchedule):
        end: int | None = None

    rig = Rig(credits_=6)
    dataset = PromptDataset.from_rows([{"prompt": f"row {i}"} for i in range(ROWS)])
    rig.schedule = schedule = Ending(dataset, [(1,)] * ROWS, batch_size=P, seed=0, shuffle=False)
    rig.prompts = rig.generator.channel("few prompts", Prompt, bound=1)
    rig.prompter = rig.another()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        await anyio.wait_all_tasks_blocked()
        schedule.end = 1
        assert [gid for _ in range(6) for gid in await rig.issued()] == [0, 1, 2]
        rig.closed.close()


async def test_a_group_closed_twice_is_a_fault() -> None:
    rig = Rig(credits_=3)
    await rig.prompter.start()
    closed = GroupClosed(gid=1, slot=Slot(step=0, place=1), state="trained", version=1)
    await rig.prompter.handle(closed)
    await rig.prompter.handle(closed)  # the same message, as a Prompter gets it whose predecessor failed
    closed = GroupClosed(gid=1, slot=Slot(step=0, place=1), state="trained", version=1)
    with pytest.raises(ValueError, match="group 1 is not alive"):
        await rig.prompter.handle(closed)


async def test_replacements_take_over_the_credits_and_are_one_round() -> None:
    rig = Rig(credits_=P, replaces=True, rows=20, total_steps=2)
    first, third = Slot(step=0, place=0), Slot(step=0, place=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        await rig.replace(first, third)
        prompts = await taken(rig.generator)
        assert [(p.gid, p.slot.place, p.slot.attempt, p.round_size) for p in prompts] == [
            (STRIDE, 0, 1, 2),
            (2 + STRIDE, 2, 1, 2),
        ]
        assert [p.row for p in prompts] == [
            rig.schedule.prompt(Slot(step=0, place=place, attempt=1)).row for place in (0, 2)
        ]
        assert rig.credits.live == {STRIDE, 1, 2 + STRIDE}
        await rig.replace(Slot(step=0, place=2, attempt=1))
        [last] = await taken(rig.generator)
        assert (last.gid, last.round_size) == (2 + 2 * STRIDE, 1)
        await rig.close(STRIDE, 1, 2 + 2 * STRIDE)
        assert await rig.issued() == [3, 4, 5], "every credit came back once"
        await rig.close(3, 4, 5)
        rig.closed.close()


async def test_the_stream_stays_open_for_replacements_until_every_group_is_closed() -> None:
    rig = Rig(credits_=P, replaces=True, total_steps=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        await rig.replace(Slot(step=0, place=1))
        assert await rig.issued() == [1 + STRIDE]
        await rig.close(0, 1 + STRIDE)
        assert not ended(rig.generator)
        await rig.close(2)
        assert ended(rig.generator)
        rig.closed.close()


async def test_drain_amid_a_round_of_replacements() -> None:
    rig = Rig(credits_=P, replaces=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        rig.drain.send_nowait(Drain())
        await anyio.wait_all_tasks_blocked()
        await rig.replace(Slot(step=0, place=0))
        assert await rig.issued() == [STRIDE], "the step has begun and is finished"
        await rig.close(STRIDE, 1, 2)
        assert await rig.issued() == []
        assert ended(rig.generator)
        rig.closed.close()


async def test_replacing_a_group_that_is_not_alive_is_a_fault() -> None:
    rig = Rig(credits_=P, replaces=True)
    await rig.prompter.start()
    replace = Replace(slots=(Slot(step=0, place=1),))
    await rig.prompter.handle(replace)
    await rig.prompter.handle(replace)
    replace = Replace(slots=(Slot(step=0, place=1),))
    with pytest.raises(ValueError, match="group 1 is not alive"):
        await rig.prompter.handle(replace)


async def test_a_pause_amid_a_step_finishes_that_step_and_begins_none_until_resumed() -> None:
    rig = Rig(credits_=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2, 3]
        assert await rig.ask(Pause(), Pause()) == []
        await rig.close(0, 1, 2)
        assert await rig.issued() == [4, 5], "step 1 had begun"
        await rig.close(3, 4, 5)
        assert await rig.issued() == []
        assert not ended(rig.generator)
        assert await rig.ask(Resume()) == [6, 7, 8]
        assert ended(rig.generator)
        rig.closed.close()


async def test_steps_are_begun_one_by_one_while_paused() -> None:
    rig = Rig(credits_=9, total_steps=9)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.ask(Step()) == [0, 1, 2, 3, 4, 5, 6, 7, 8], "without a pause it changes nothing"
        await rig.ask(Pause())
        await rig.close(*range(9))
        assert await rig.issued() == []
        assert await rig.ask(Step()) == [9, 10, 11]
        await rig.close(9, 10, 11)
        assert await rig.ask(Step(), Step()) == [12, 13, 14, 15, 16, 17]
        await rig.close(*range(12, 18))
        assert await rig.ask(Step(steps=2)) == [18, 19, 20, 21, 22, 23]
        rig.drain.send_nowait(Drain())
        await rig.issued()
        assert ended(rig.generator), "a paused run can be drained"
        rig.closed.close()


async def test_a_pause_before_the_start_begins_no_step() -> None:
    rig = Rig(credits_=3)
    rig.control.send_nowait(Pause())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == []
        assert await rig.ask(Step()) == [0, 1, 2]
        tasks.cancel_scope.cancel()


async def test_replacements_go_on_while_paused_or_held() -> None:
    rig = Rig(credits_=P, replaces=True, rows=20)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        await rig.ask(Pause(), Hold(reasons=("judge is down",)))
        await rig.replace(Slot(step=0, place=1))
        assert await rig.issued() == [1 + STRIDE]
        await rig.close(0, 1 + STRIDE, 2)
        assert await rig.issued() == []
        tasks.cancel_scope.cancel()


async def test_a_hold_lasts_until_there_is_no_reason_left_and_is_apart_from_a_pause() -> None:
    rig = Rig(credits_=P, total_steps=5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        await rig.ask(Hold(reasons=("judge is down", "runner is down")))
        await rig.close(0, 1, 2)
        assert await rig.issued() == []
        assert rig.ledger.held == ("judge is down", "runner is down")
        assert await rig.ask(Hold(reasons=("runner is down",))) == []
        assert await rig.ask(Pause(), Hold(reasons=())) == [], "it is paused still"
        await rig.ask(Hold(reasons=("judge is down",)))
        assert await rig.ask(Resume()) == [], "it is held still"
        assert await rig.ask(Hold(reasons=())) == [3, 4, 5]
        tasks.cancel_scope.cancel()


async def test_rows_of_groups_that_are_sent_back_are_prompted_again() -> None:
    rig = Rig(credits_=P, replaces=True, rows=20)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        rows = [prompt.row for prompt in (await rig.issued_prompts())]
        await rig.closed.send(Replace(slots=(Slot(step=0, place=2),), rows=(rows[2],)))
        [again] = await rig.issued_prompts()
        assert (again.gid, again.row, again.round_size) == (2 + STRIDE, rows[2], 1)
        tasks.cancel_scope.cancel()


class NoRoomError(Exception):
    """What a send fails with."""


@pytest.mark.parametrize("nth", range(8))
async def test_the_successor_of_a_prompter_that_failed_amid_sending_issues_the_rest(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(credits_=4, replaces=True, rows=20)
    sends, send = iter(range(99)), rig.prompts.send

    async def failing_send(prompt: Prompt) -> None:
        if next(sends) == nth:
            raise NoRoomError
        await send(prompt)

    monkeypatch.setattr(rig.prompts, "send", failing_send)
    work = [GroupClosed(gid=0, slot=Slot(step=0, place=0), state="trained", version=1)]
    requests = [Replace(slots=(Slot(step=0, place=1), Slot(step=0, place=2))), *work, Pause(), Step()]
    prompter, failures = rig.another(), 0
    for do in (prompter.start, *(lambda m=m: rig.prompter.handle(m) for m in requests)):
        try:
            await do()
        except NoRoomError:
            failures += 1
            rig.prompter = rig.another()
            await (
                rig.prompter.start()
                if rig.ledger.last_acted_on is None
                else rig.prompter.handle(rig.ledger.last_acted_on)
            )
    assert failures == (nth < 7)
    assert await rig.issued() == [0, 1, 2, 3, 1 + STRIDE, 2 + STRIDE, 4]
    assert rig.credits.live == {1 + STRIDE, 2 + STRIDE, 3, 4} == set(rig.ledger.alive)
    assert rig.ledger.steps_allowed == 3


async def test_a_replacement_takes_over_a_credit_that_would_not_be_given_now() -> None:
    """A free run that goes on with a smaller max_staleness has more groups alive than may begin."""
    rig = Rig(credits_=3, replaces=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        assert await rig.issued() == [0, 1, 2]
        rig.credits.limit = 1
        await rig.replace(Slot(step=0, place=1))
        assert await rig.issued() == [1 + STRIDE]
        assert rig.credits.live == {0, 1 + STRIDE, 2} == set(rig.ledger.alive)
        tasks.cancel_scope.cancel()


async def test_reasons_of_several_senders_stand_beside_each_other() -> None:
    rig = Rig(credits_=P, total_steps=5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.prompter.run)
        await rig.issued()
        await rig.ask(Hold(reasons=("judge is down",)))
        await rig.ask(Hold(sender="environment", reasons=("game is down",)))
        assert list(rig.ledger.held) == ["judge is down", "game is down"]
        await rig.ask(Hold(reasons=()))
        assert list(rig.ledger.held) == ["game is down"]
        tasks.cancel_scope.cancel()
