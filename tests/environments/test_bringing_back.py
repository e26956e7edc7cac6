"""Episodes whose environment is gone: brought back by what it saved, by what was asked of it, or missing; and no call
that was answered is made again to a tool."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.environments.acting import notes
from tests.environments.playing import FIRST, played, playing, recorded, saying, told
from troupe.environments.ledger import EpisodeLedger, EpisodeName
from troupe.messages.episodes import Answer

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

TURNS = [
    saying("a"),
    saying(double={"number": 4}, add={"number": 5}, later={"what": "b"}),
    saying(act={"what": "raise"}),
]


async def killed(run: str, factory: str, *turns: Any, **settings: Any) -> EpisodeLedger:
    """What is recorded of a run that was killed after some turns."""
    async with playing(run, factory, ("double", "act"), **settings) as (manager, _):
        answers = await played(manager, *turns)
    return recorded(*answers)


def since(before: int) -> list[str]:
    """What was asked since, without what is said of instances."""
    return [note for note in notes()[before:] if note not in ("made", "close")]


@pytest.mark.parametrize(
    ("run", "factory", "again"),
    [
        ("loop", "Saving", ["load"]),
        ("process", "Saving", ["load"]),
        ("loop", "Counter", ["reset 2", "step a", "add 5", "later b"]),
        pytest.param("process", "Counter", ["reset 2", "step a", "add 5", "later b"], marks=pytest.mark.slow),
        ("loop", "Heavy", ["reset 2", "step a", "add 5", "later b"]),
    ],
)
async def test_an_episode_is_brought_back_when_it_is_needed(run: str, factory: str, again: list[str]) -> None:
    async with playing(run, factory, ("double", "act")) as (manager, incidents):
        answers = await played(manager, *TURNS, start=2)
    kinds = [incident.kind for incident in incidents]
    assert kinds == (["environment_unsaved"] if factory == "Heavy" else [])
    before = len(notes())
    async with playing(run, factory, ("double", "act"), ledger=recorded(*answers)) as (manager, incidents):
        assert await played(manager, *TURNS, start=2) == answers
        tool = await manager.answer(FIRST, 4, (4,), saying(double={"number": 1}))
        assert told(tool) == "2"
        assert since(before) == ["double 1"]
        assert told(await manager.answer(FIRST, 5, (5,), saying("c"))) == "9 c"
        assert since(before) == ["double 1", *again, "step c"]
        ending = await manager.close(FIRST, 5)
        assert (ending.reward, ending.attributes) == (9.0, {"total": 9, "words": ["a", "b", "c"]})
    assert [incident.kind for incident in incidents if incident.kind != "environment_unsaved"] == []


async def test_an_ending_that_is_recorded_needs_no_environment() -> None:
    async with playing("loop", "Counter") as (manager, _):
        await played(manager, saying("a"))
        ending = await manager.close(FIRST, 1)
        ledger = manager.ledger
    before = len(notes())
    async with playing("loop", "Counter", ledger=ledger) as (manager, _):
        await played(manager, saying("a"))
        assert await manager.close(FIRST, 1) == ending
        (view,) = manager.environments(0) or [None]
        assert view is not None
        assert view.total == 1
    assert since(before) == []


async def test_where_nothing_may_be_repeated_the_episode_is_missing() -> None:
    ledger = await killed("loop", "Counter", *TURNS)
    async with playing("loop", "Counter", ("double", "act"), ledger=ledger, on_lost="missing") as (manager, incidents):
        await played(manager, *TURNS)
        assert told(await manager.answer(FIRST, 4, (4,), saying(double={"number": 1}))) == "2"
        failed = await manager.answer(FIRST, 5, (5,), saying("c"))
        assert "environment.on_lost" in failed.failed
        assert (await manager.close(FIRST, 5)).failed == failed.failed
    assert [incident.kind for incident in incidents] == ["environment_error"]
    ledger = await killed("loop", "Saving", *TURNS)
    async with playing("loop", "Saving", ("double", "act"), ledger=ledger, on_lost="missing") as (manager, incidents):
        await played(manager, *TURNS)
        assert told(await manager.answer(FIRST, 4, (4,), saying("c"))) == "7 c"


async def test_an_environment_that_answers_otherwise_is_told_of_and_the_first_answer_holds() -> None:
    ledger = await killed("loop", "Changed", saying("a"), saying("b"))
    async with playing("loop", "Changed", ("double", "act"), ledger=ledger) as (manager, incidents):
        answers = await played(manager, saying("a"), saying("b"), saying("c"))
        assert [told(answer) for answer in answers[1:3]] == ["2 a", "3 b"]
        assert not answers[3].failed
    assert [incident.kind for incident in incidents] == ["environment_differs"]
    assert "group 0, sample 0, turn 0" in incidents[0].message


async def test_a_call_that_was_given_up_is_left_out() -> None:
    async with playing("thread", "Counter", turn_timeout_s=0.2) as (manager, _):
        turns = [saying(add={"number": 1}, do={"what": "hang"}), saying("a")]
        answers = await played(manager, *turns)
    before = len(notes())
    async with playing("thread", "Counter", ledger=recorded(*answers)) as (manager, incidents):
        assert told((await played(manager, *turns, saying("b")))[-1]) == "3 b"
    assert since(before) == ["reset 0", "add 1", "step a", "step b"]
    assert incidents == []


async def test_the_others_of_a_process_that_is_killed_are_brought_back() -> None:
    names = [EpisodeName(0, sample) for sample in range(3)]
    async with playing("process", "Saving", ("double",), turn_timeout_s=0.5) as (manager, incidents):
        for name in names:
            await played(manager, saying("a"), saying(double={"number": 3}), name=name)
        await manager.answer(names[0], 3, (3,), saying("hang"))
        for name in names[1:]:
            assert told(await manager.answer(name, 3, (3,), saying("b"))) == "2 b"
    assert [incident.kind for incident in incidents] == ["environment_timeout"]
    counted = Counter(notes())
    assert (counted["load"], counted["step a"], counted["step b"], counted["double 3"]) == (2, 3, 2, 3)


def test_a_ledger_gives_what_answers_just_these_tokens() -> None:
    answers = [Answer(said={}, state=str(turn)) for turn in range(3)]
    ledger = recorded(*answers)
    assert ledger.find(FIRST, 1, [1]) == answers[1]
    assert ledger.find(FIRST, 1, [2]) is None
    assert ledger.find(EpisodeName(0, 1), 1, [1]) is None
    assert ledger.before(FIRST, 9) == answers
    ledger.note(FIRST, -1, (2,), answers[0])
    ledger.cut(FIRST, -1)
    assert ledger.find(FIRST, -1, (2,)) is None
    assert ledger.before(FIRST, 3) == answers
    ledger.cut(FIRST, 1)
    assert ledger.before(FIRST, 3) == answers[:1]
    ledger.forget(0)
    assert ledger.before(FIRST, 3) == []
