"""The crew: parts go round among members that come and go, and every group is handed over once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import Reports, make_group, make_prompt
from troupe.actors.generator.crew import _REMEMBERED, Crew
from troupe.actors.generator.parts import Part, parts_of
from troupe.actors.generator.queue import MOST_PASSED_OVER
from troupe.errors import RunError
from troupe.messages import Observation, RolloutGroup, TurnTaken
from troupe.runtime.board import PolicyBoard

pytestmark = pytest.mark.anyio


class Someone:
    """A member that does what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.observed: list[Observation] = []

    async def observe(self, observation: Observation) -> None:
        self.observed.append(observation)


class Rig:
    """A crew, and what it has handed over."""

    def __init__(self, *, pinned: bool = True, most_losses: int = 5) -> None:
        self.groups: list[RolloutGroup] = []
        self.turns: list[TurnTaken] = []
        self.reports = Reports()

        async def hand_over(group: RolloutGroup) -> None:
            self.groups.append(group)

        async def ask(turn: TurnTaken) -> None:
            self.turns.append(turn)

        self.crew = Crew(
            hand_over,
            board=PolicyBoard(0),
            report=self.reports.reporter("generator"),
            pinned=pinned,
            turns=ask,
            most_losses=most_losses,
        )

    def submit(self, step: int, size: int, parts: int) -> list[Part]:
        made = parts_of([make_prompt(step, place, batch_size=size) for place in range(size)], parts, step)
        for part in made:
            self.crew.submit(part)
        return made

    async def complete(self, member: Someone, part: Part) -> None:
        for prompt in part.prompts:
            assert await self.crew.completed(member, make_group(prompt)) == "taken"


def names(parts: Sequence[Part]) -> list[str]:
    return [part.name for part in parts]


def test_prompts_of_a_part_are_those_of_equal_places_modulo_the_parts() -> None:
    prompts = [make_prompt(3, place, 1, round_size=4) for place in (6, 1, 3, 0)]
    parts = parts_of(prompts, 3, 2)
    assert names(parts) == ["3.1.0", "3.1.1"]
    assert [[prompt.slot.place for prompt in part.prompts] for part in parts] == [[0, 3, 6], [1]]
    assert {part.version for part in parts} == {2}
    assert names(parts_of(prompts, None, None)) == ["3.1.0", "3.1.1", "3.1.3", "3.1.6"]


async def test_the_oldest_step_comes_first_and_what_came_back_before_all() -> None:
    rig, one, other = Rig(), Someone("one"), Someone("other")
    rig.submit(5, 2, 2)
    rig.submit(4, 2, 2)
    assert names(await rig.crew.take(one)) == ["4.0.0"]
    assert names(await rig.crew.take(one, most=2)) == ["4.0.1", "5.0.0"]
    rig.crew.lost(one, "unplugged", ["5.0.0"])
    assert rig.crew.leases(one) == ("4.0.0", "4.0.1")
    rig.submit(3, 1, 1)
    assert names(await rig.crew.take(other, most=3)) == ["5.0.0", "3.0.0", "5.0.1"]


async def test_who_waits_gets_an_even_share() -> None:
    rig, members = Rig(), [Someone(str(number)) for number in range(3)]
    taken: dict[str, list[Part]] = {}

    async def take(member: Someone, most: int) -> None:
        taken[member.name] = await rig.crew.take(member, most=most)

    async with anyio.create_task_group() as tasks:
        for member in members:
            tasks.start_soon(take, member, 9)
        await anyio.wait_all_tasks_blocked()
        rig.submit(0, 7, 7)
    assert sorted(len(parts) for parts in taken.values()) == [2, 2, 3]
    assert rig.crew.queued == 0


async def test_who_stops_waiting_gets_nothing() -> None:
    rig, one, other = Rig(), Someone("one"), Someone("other")
    with anyio.move_on_after(0.01):
        await rig.crew.take(one)
    rig.submit(0, 1, 1)
    assert names(await rig.crew.take(other)) == ["0.0.0"]
    assert rig.crew.leases(one) == ()


async def test_a_second_answer_is_compared_to_the_bit() -> None:
    rig, slow, quick, stranger = Rig(), Someone("slow"), Someone("quick"), Someone("stranger")
    (part,) = rig.submit(0, 1, 1)
    await rig.crew.take(slow)
    rig.crew.lost(slow, "silent for 15 s")
    await rig.crew.take(quick)
    group = make_group(part.prompts[0])
    assert await rig.crew.completed(stranger, group) == "foreign"
    assert await rig.crew.completed(quick, group) == "taken"
    assert await rig.crew.completed(slow, group) == "known"
    assert await rig.crew.completed(stranger, group) == "foreign"
    first = group.rollouts[0]
    nearly = msgspec.structs.replace(first, log_probs=(first.log_probs[0] + 2**-20, *first.log_probs[1:]))
    other = msgspec.structs.replace(group, rollouts=(nearly, *group.rollouts[1:]))
    assert await rig.crew.completed(slow, other) == "differs"
    assert rig.groups == [group]
    (incident,) = await rig.reports.incidents()
    assert (incident.kind, incident.gid) == ("answers_differ", group.prompt.gid)
    assert "slow" in incident.message
    assert rig.crew.prompt(group.prompt.gid) is part.prompts[0], "late answers are read, too"


async def test_in_the_free_schedule_a_second_answer_may_be_another() -> None:
    rig, one = Rig(pinned=False), Someone("one")
    (part,) = rig.submit(0, 1, 1)
    await rig.crew.take(one)
    assert await rig.crew.completed(one, make_group(part.prompts[0], version=3)) == "taken"
    assert await rig.crew.completed(one, make_group(part.prompts[0], version=4)) == "known"
    assert len(rig.groups) == 1


async def test_who_comes_back_goes_on_with_what_nobody_has_taken() -> None:
    rig, one, other = Rig(), Someone("one"), Someone("other")
    rig.submit(0, 3, 3)
    assert names(await rig.crew.take(one, most=3)) == ["0.0.0", "0.0.1", "0.0.2"]
    rig.crew.lost(one, "silent for 15 s")
    assert names(await rig.crew.take(other)) == ["0.0.0"]
    assert rig.crew.renew(one, ["0.0.0", "0.0.1", "7.0.0"]) == ["0.0.0", "7.0.0"]
    assert rig.crew.leases(one) == ("0.0.1",)
    assert rig.crew.renew(one, []) == [], "its part has gone back"
    assert sorted(names(await rig.crew.take(other, most=3))) == ["0.0.1", "0.0.2"]
    assert rig.crew.renew(other, ["0.0.0", "0.0.1", "0.0.2"]) == []


async def test_a_part_that_costs_one_member_after_another_ends_the_run() -> None:
    rig = Rig(most_losses=3)
    part, _ = rig.submit(2, 4, 2)
    for number in range(5):
        with anyio.move_on_after(0) as going_on:
            await rig.crew.watch()
        assert going_on.cancelled_caught
        member = Someone(f"worker {number}")
        await rig.crew.take(member)
        if number == 2:  # not in vain
            await rig.crew.completed(member, make_group(part.prompts[0]))
        rig.crew.lost(member, "killed by SIGKILL")
    with pytest.raises(RunError, match=r"3 members in a row .* at places 0, 2 \(part 2\.0\.0\), the last one worker 4"):
        await rig.crew.watch()


async def test_answers_to_turns_go_to_who_asked_and_to_nobody_else() -> None:
    rig, one, other = Rig(), Someone("one"), Someone("other")
    (part,) = rig.submit(0, 2, 1)
    turn = TurnTaken(
        prompt=part.prompts[0], sample=0, turn=0, token_ids=(), finish_reason="stop", start=0, room=9, asker=77
    )
    await rig.crew.take(one)
    await rig.crew.turn_taken(other, turn)
    assert rig.turns == [], "it is not its part"
    await rig.crew.turn_taken(one, turn)
    (asked,) = rig.turns
    answer = Observation(gid=part.prompts[0].gid, sample=0, turn=0, ids=(1,), asker=asked.asker)
    await rig.crew.observe(answer)
    assert one.observed == [msgspec.structs.replace(answer, asker=77)]
    await rig.crew.completed(one, make_group(part.prompts[0]))
    rig.crew.lost(one, "gone")
    await rig.crew.take(other)
    await rig.crew.turn_taken(other, turn)  # what is decoded together goes on together, whatever was there before
    await rig.crew.observe(answer)
    assert other.observed == [], "what another asked for"
    await rig.crew.observe(msgspec.structs.replace(answer, asker=rig.turns[1].asker))
    assert len(other.observed) == 1


def rows_of(number: int) -> Part:
    return Part(step=0, number=number, set=0, version=0, prompts=(make_prompt(-1, number),))


async def test_rows_of_evaluations_come_last_one_at_a_time_and_not_too_late() -> None:
    rig, one, other = Rig(), Someone("one"), Someone("other")
    for number in range(3):
        rig.crew.submit(rows_of(number))
    rig.submit(0, 2, 2)
    assert names(await rig.crew.take(one, most=4)) == ["0.0.0", "0.0.1", "e.0.0.0"]
    with anyio.move_on_after(0.01) as waiting:
        await rig.crew.take(one)
    assert waiting.cancelled_caught, "nobody has two of them"
    with anyio.move_on_after(0.01) as waiting:
        await rig.crew.take(other, rows=False)
    assert waiting.cancelled_caught
    rig.crew.lost(one, "unplugged")
    assert names(await rig.crew.take(other)) == ["0.0.0"], "what came back of training is before what came back of rows"
    rig.submit(7, 2 * MOST_PASSED_OVER, 2 * MOST_PASSED_OVER)
    taken = names(await rig.crew.take(other, most=2 * MOST_PASSED_OVER))
    assert taken.index("e.0.0.0") <= MOST_PASSED_OVER
    assert not {"e.0.0.1", "e.0.0.2"} & {*taken}


async def test_what_is_open_is_not_forgotten_however_many_rows_are_evaluated_meanwhile() -> None:
    rig, slow, other = Rig(), Someone("slow"), Someone("other")
    (part,) = rig.submit(0, 2, 1)
    await rig.crew.take(slow)
    await rig.crew.completed(slow, make_group(part.prompts[0]))
    many = _REMEMBERED + 1
    rows = Part(step=0, number=0, set=0, version=0, prompts=tuple(make_prompt(-1, 100 + row) for row in range(many)))
    rig.crew.submit(rows)
    await rig.crew.take(other)
    await rig.complete(other, rows)
    rig.crew.lost(slow, "unplugged")
    await rig.crew.take(other)
    assert await rig.crew.completed(other, make_group(part.prompts[0])) == "known", "it decodes the whole part"
    assert await rig.crew.completed(other, make_group(part.prompts[1])) == "taken"
    assert len(rig.groups) == 2 + many


ACTS = st.sampled_from(["submit", "take", "complete", "complete late", "lose", "come back", "forget"])


@given(st.lists(st.tuples(ACTS, st.integers(0, 3), st.integers(0, 9)), max_size=60), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_every_group_is_handed_over_once(acts: list[tuple[str, int, int]], parts: int) -> None:
    anyio.run(play, acts, parts)


async def play(acts: list[tuple[str, int, int]], parts: int) -> None:
    rig, members = Rig(most_losses=10**9), [Someone(f"member {number}") for number in range(4)]
    held: dict[str, dict[str, Part]] = {member.name: {} for member in members}
    had: list[tuple[Someone, Part]] = []
    submitted: list[int] = []

    async def act(what: str, member: Someone, number: int) -> None:
        mine = held[member.name]
        chosen: Any = list(mine.values())[number % len(mine)] if mine else None
        if what == "submit":
            submitted.extend(prompt.gid for part in rig.submit(len(submitted), 4, parts) for prompt in part.prompts)
        elif what == "take" and rig.crew.queued:
            for part in await rig.crew.take(member, most=1 + number % 2):
                mine[part.name] = part
                had.append((member, part))
        elif what == "complete" and chosen is not None:
            prompt = chosen.prompts[number % len(chosen.prompts)]
            assert await rig.crew.completed(member, make_group(prompt)) in ("taken", "known")
        elif what == "complete late" and had:
            late, part = had[number % len(had)]
            assert await rig.crew.completed(late, make_group(part.prompts[0])) in ("taken", "known")
        elif what == "lose":
            rig.crew.lost(member, "lost")
        elif what == "come back":
            for name in rig.crew.renew(member, list(mine)):
                del mine[name]
        elif what == "forget":
            mine.clear()
            rig.crew.renew(member, [])

    for what, who, number in acts:
        await act(what, members[who], number)
        leased = [name for member in members for name in rig.crew.leases(member)]
        assert len(leased) == len(set(leased)), "a part has one holder"
    for member in members:
        rig.crew.lost(member, "in the end")
    while rig.crew.queued:
        for part in await rig.crew.take(members[0], most=9):
            for prompt in part.prompts:
                await rig.crew.completed(members[0], make_group(prompt))
    assert sorted(group.prompt.gid for group in rig.groups) == sorted(submitted)
