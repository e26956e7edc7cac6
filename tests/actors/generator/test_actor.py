"""Generator: whole steps, pinned versions, groups as they finish, an end in the middle of a decode."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import anyio
import pytest

from tests.support.fakes import FakeEngine, Reports, device_thread, ended, make_prompt, send_all, taken
from troupe.actors.generator.actor import Generator
from troupe.messages import Prompt, Rollout, RolloutGroup, Span
from troupe.policy import CompletedGroup, RolloutRequest
from troupe.runtime.board import PolicyBoard
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import run_roles

pytestmark = pytest.mark.anyio


class Rig:
    """A generator over a fake engine; version 0 is on the board."""

    def __init__(
        self, engine: FakeEngine, *, max_staleness: int = 0, most_at_once: int | None = None, parts: int = 1
    ) -> None:
        self.reports, self.inbox, self.scorer = Reports(), Mailbox("generator"), Mailbox("scorer")
        self.prompts: Channel[Prompt] = self.inbox.channel("prompts", Prompt, bound=9)
        self.board: PolicyBoard[Any] = PolicyBoard(max_staleness)
        self.board.publish(0, {"weights": 0})
        self.made_on = ""

        def make_engine() -> Any:
            self.made_on = threading.current_thread().name
            return engine

        self.handed_over: set[int] = set()
        self.make = partial(
            Generator,
            self.inbox,
            self.scorer.channel("rollouts", RolloutGroup, bound=9),
            engine=make_engine,
            device=device_thread("generator"),
            board=self.board,
            decode_text=lambda ids: bytes(ids).decode(),
            seed=7,
            most_at_once=most_at_once,
            parts=parts,
            handed_over=self.handed_over,
            report=self.reports.reporter("generator"),
        )
        self.generator = self.make()


async def test_a_step_is_decoded_part_by_part() -> None:
    engine = FakeEngine(order=[1, 0])
    rig = Rig(engine, parts=2)
    prompts = [make_prompt(0, place, batch_size=4) for place in range(4)]
    await send_all(rig.prompts, prompts)
    await rig.generator.run()
    assert [[request.key[2] for request in decode] for decode in engine.requests] == [[0, 2], [1, 3]]
    spans = [report for report in await taken(rig.reports.mailbox) if isinstance(report, Span)]
    assert [span.part for span in spans if span.name == "generate"] == ["0.0.0", "0.0.1"]
    assert {group.prompt.gid for group in await taken(rig.scorer)} == {prompt.gid for prompt in prompts}
    assert rig.handed_over == set(), "the round is done with"


async def test_a_step_is_decoded_when_complete_and_groups_leave_as_they_finish() -> None:
    engine = FakeEngine(order=[1, 0])
    rig = Rig(engine)
    first, second = make_prompt(0, 0), make_prompt(0, 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        await rig.prompts.send(second)  # out of order: slots decide what is decoded where
        await anyio.wait_all_tasks_blocked()
        assert engine.requests == []
        await rig.prompts.send(first)
        rig.prompts.close()
    assert [(r.prompt_ids, r.key) for r in engine.requests[0]] == [
        (first.prompt_ids, (7, 0, 0, 0)),
        (second.prompt_ids, (7, 0, 1, 0)),
    ]
    groups = await taken(rig.scorer)
    assert [group.prompt for group in groups] == [second, first]
    rollout = Rollout(
        token_ids=(72, 105, 34),
        log_probs=(-1.0, -2.0, -3.0),
        sampling_log_probs=(-1.5, -2.5, -3.5),
        versions=(0, 0, 0),
        finish_reason="length",
        text='Hi"',
    )
    assert groups[0].rollouts == (rollout, rollout)
    assert ended(rig.scorer)
    assert rig.made_on.startswith("troupe-generator")
    spans = [m for m in await taken(rig.reports.mailbox) if isinstance(m, Span)]
    assert [(s.name, s.step, s.gid, s.kind) for s in spans if s.name != "idle"] == [
        ("wait for policy", 0, None, "wait"),
        ("decode", 0, None, "work"),
        ("write text", 0, None, "work"),
        ("hand over", 0, second.gid, "work"),
        ("decode", 0, None, "work"),  # begun before the first group was handed over, or after: nobody waits for it
        ("write text", 0, None, "work"),
        ("hand over", 0, first.gid, "work"),
        ("generate", 0, None, "work"),
    ]


async def test_rounds_of_different_steps_and_attempts_do_not_mix() -> None:
    engine = FakeEngine(order=[0])
    rig = Rig(engine, max_staleness=1)
    sent = [
        make_prompt(1, 0, round_size=2),
        make_prompt(0, 1, 1, round_size=2),
        make_prompt(0, 0, 2, round_size=1),
        make_prompt(0, 0, 1, round_size=2),
        make_prompt(1, 1, round_size=2),
    ]
    await send_all(rig.prompts, sent)
    await run_roles([rig.generator])
    assert [[request.key[1:] for request in decoded] for decoded in engine.requests] == [
        [(0, 0, 2)],
        [(0, 0, 1), (0, 1, 1)],
        [(1, 0, 0), (1, 1, 0)],
    ]
    assert [version for _, version in engine.loaded] == [0, 0, 0]
    assert engine.released == 3, "each round gives the room back"


@pytest.mark.parametrize(("max_staleness", "versions"), [(0, [0, 1, 2]), (1, [0, 0, 1])])
async def test_every_step_waits_for_exactly_its_version(max_staleness: int, versions: list[int]) -> None:
    engine = FakeEngine(order=[0])
    rig = Rig(engine, max_staleness=max_staleness)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        for step in range(3):
            await rig.prompts.send(make_prompt(step, 0, round_size=1))
        rig.prompts.close()
        for version in range(3):
            await _until_decoded(engine, versions.count(0) if version == 0 else versions.index(version) + 1)
            await anyio.wait_all_tasks_blocked()
            assert [loaded for _, loaded in engine.loaded] == [v for v in versions if v <= version]
            if version < max(versions):
                rig.board.publish(version + 1, {"weights": version + 1})
            else:
                break
    assert [weights for weights, _ in engine.loaded] == [{"weights": version} for version in versions]


async def _until_decoded(engine: FakeEngine, steps: int) -> None:
    while len(engine.requests) < steps:
        await anyio.wait_all_tasks_blocked()


async def test_a_cancel_aborts_the_decode_and_waits_for_its_thread() -> None:
    inside, go_on = threading.Event(), threading.Event()
    stopped_after: list[bool] = []

    def between() -> None:
        inside.set()
        assert go_on.wait(10)
        stopped_after.append(engine.aborted)

    class ReleasedByAbort(FakeEngine):
        def abort(self) -> None:
            super().abort()
            go_on.set()

    engine = ReleasedByAbort(order=[0], between=between)
    rig = Rig(engine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        await rig.prompts.send(make_prompt(0, 0, round_size=1))
        await anyio.to_thread.run_sync(inside.wait, 10)
        tasks.cancel_scope.cancel()
    assert stopped_after == [True]
    assert await taken(rig.scorer) == []
    assert not ended(rig.scorer), "nobody takes a cancelled generator for one that is done"


async def test_a_prompt_is_in_hand_until_its_round_is_over() -> None:
    go_on = threading.Event()
    pauses_s = iter([0.0, 10.0])

    def between() -> None:
        go_on.wait(next(pauses_s))

    engine = FakeEngine(order=[1, 0], between=between)
    rig = Rig(engine)
    prompts = [make_prompt(0, 0), make_prompt(0, 1), make_prompt(1, 0)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        for prompt in prompts:
            await rig.prompts.send(prompt)
        while not len(rig.scorer):
            await anyio.wait_all_tasks_blocked()
        assert list(rig.inbox.in_hand) == prompts[:2]
        assert rig.handed_over == {1}
        go_on.set()
        while rig.inbox.in_hand != (prompts[2],):
            await anyio.wait_all_tasks_blocked()
        assert rig.handed_over == set(), "who is done with needs not be remembered"
        tasks.cancel_scope.cancel()


class Breaking(FakeEngine):
    """Fails after so many groups; the next decode goes well."""

    def __init__(self, order: Sequence[int], *, after: int) -> None:
        super().__init__(order)
        self.after = after

    def decode(self, requests: Sequence[RolloutRequest]) -> Iterator[CompletedGroup]:
        for i, group in enumerate(super().decode(requests)):
            if i == self.after:
                self.after = 99
                raise OSError("the device is gone")
            yield group


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("most_at_once", [None, 2])
async def test_a_successor_sends_only_what_was_not_sent(after: int, most_at_once: int | None) -> None:
    engine = Breaking([1, 0], after=after)
    rig = Rig(engine, most_at_once=most_at_once)
    prompts = [make_prompt(0, 0), make_prompt(0, 1)]
    await send_all(rig.prompts, prompts)
    with pytest.raises(OSError, match="the device is gone"):
        await run_roles([rig.generator])
    assert rig.handed_over == set([1][:after])
    rig.inbox.take_back()
    if most_at_once and after:
        engine.order = [0]  # in the free schedule only the one that is left is decoded again
    await run_roles([rig.make()])
    assert [group.prompt.gid for group in await taken(rig.scorer)] == [1, 0]
    assert len(engine.requests[1]) == (1 if most_at_once and after else 2)
    assert (rig.inbox.in_hand, rig.handed_over) == ((), set())


@pytest.mark.parametrize("most_at_once", [None, 2])
async def test_a_round_that_was_sent_whole_is_not_decoded_again(most_at_once: int | None) -> None:
    engine = FakeEngine(order=[0])
    rig = Rig(engine, most_at_once=most_at_once)
    rig.handed_over |= {0, 1}
    await send_all(rig.prompts, [make_prompt(0, 0), make_prompt(0, 1)])
    await run_roles([rig.generator])
    assert engine.requests == []
    assert (rig.inbox.in_hand, rig.handed_over, await taken(rig.scorer)) == ((), set(), [])


async def test_free_decodes_what_is_there_at_once() -> None:
    go_on = threading.Event()

    def between() -> None:
        assert go_on.wait(10)

    engine = FakeEngine(order=[0], between=between)
    rig = Rig(engine, most_at_once=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        await rig.prompts.send(make_prompt(4, 1))
        await _until_decoded(engine, 1)
        for step, place in [(4, 0), (3, 0), (5, 1)]:  # come while the first is decoded
            await rig.prompts.send(make_prompt(step, place))
        await anyio.wait_all_tasks_blocked()
        assert len(engine.requests) == 1
        go_on.set()
        rig.prompts.close()
    assert [[request.key[1:3] for request in decoded] for decoded in engine.requests] == [
        [(4, 1)],
        [(4, 0), (3, 0)],  # in order of arrival, two at the most
        [(5, 1)],
    ]
    assert {version for _, version in engine.loaded} == {0}, "nobody waits for a version"


async def test_free_takes_every_newer_version_amid_a_decode() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def between() -> None:
        inside.set()
        assert go_on.wait(10)

    engine = FakeEngine(order=[0], between=between)
    rig = Rig(engine, most_at_once=2)
    rig.board.publish(1, {"weights": 1})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.generator.run)
        await rig.prompts.send(make_prompt(7, 0))
        await anyio.to_thread.run_sync(inside.wait, 10)
        for version in (2, 3):
            rig.board.publish(version, {"weights": version})
            while engine.loaded[-1][1] != version:
                await anyio.wait_all_tasks_blocked()
        go_on.set()
        rig.prompts.close()
    loaded: list[Any] = list(engine.loaded)
    assert loaded == [({"weights": version}, version) for version in (1, 2, 3)]
    assert engine.released >= 1
