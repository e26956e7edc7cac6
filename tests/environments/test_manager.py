"""Episodes at arm's length: equal answers wherever they run, faults that cost one episode, and nothing asked twice."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from tests.environments import acting
from tests.environments.acting import away, forget, notes
from tests.environments.playing import (
    FIRST,
    PROMPT,
    config_of,
    no_sleep,
    played,
    playing,
    saying,
    timeless,
    told,
    until,
)
from tests.rewards.scoring import is_alive
from troupe.environments.events import EnvironmentEvents, View
from troupe.environments.ledger import EpisodeName
from troupe.environments.loading import load_world
from troupe.environments.manager import EnvironmentManager
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.messages import Incident
from troupe.messages.evaluations import gid_of

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

SCRIPT = [
    saying("one"),
    saying(add={"number": 5}, double={"number": 4}, later={"what": "a"}, wait={"what": "b"}),
    saying(double={"number": "x"}, nothing={}, do={"what": "raise"}, wait_1={"what": "raise"}, act={"what": "leave"}),
    saying("stop"),
]


async def test_loop_threads_and_processes_give_equal_answers() -> None:
    all_answers, all_notes, endings = [], [], []
    for run in ("loop", "thread", "process"):
        async with playing(run, tools=("double", "act", "wait")) as (manager, incidents):
            answers = await played(manager, *SCRIPT, start=3)
            endings.append(await manager.close(FIRST, len(SCRIPT)))
            assert [seen.total for seen in manager.environments(0) or ()] == [10]
            assert incidents == []
        all_answers.append([timeless(answer) for answer in answers])
        all_notes.append(sorted(note for note in notes() if note not in ("made", "close")))
        forget()
    assert all_answers[0] == all_answers[1] == all_answers[2]
    assert all_notes[0] == all_notes[1] == all_notes[2]
    assert endings[0] == endings[1] == endings[2]
    opening, first, second, third, last = all_answers[0]
    assert opening.messages[-1]["content"] == "Count from 3"
    assert (told(first), first.reward, first.done, first.info) == ("4 one", 0.5, False, {"n": [1, 2]})
    assert [message["content"] for message in second.messages] == ["9", "8", "2 a", "b"]
    assert [message["content"] for message in third.messages] == [
        "xx",
        "{'error': 'Tool nothing not found.'}",
        "{'error': 'no such thing'}",
        "{'error': '3'}",
        "{'error': 'no such thing'}",
    ]
    assert last.done
    assert (endings[0].reward, endings[0].attributes, endings[0].failed) == (
        10.0,
        {"total": 10, "words": ["one", "a", "stop"]},
        "",
    )


def test_a_row_that_is_evaluated_is_told_by_its_number() -> None:
    told, events = list[Incident](), EnvironmentEvents(EnvironmentConfig())
    events.listen(told.append)
    talk: Any = SimpleNamespace(name=EpisodeName(gid_of(5, 0, 3), 1), spec=SimpleNamespace(is_live=False))
    events.tell("tool_error", "no", talk, 2)
    assert (told[0].message, told[0].gid) == ("evaluation, row 3: tools, sample 1, turn 2: no", None)
    events.sets = ("held_out", "games")
    talk.name = EpisodeName(gid_of(5, 1, 3), 1)
    events.tell("tool_error", "no", talk, 2)
    assert told[1].message == "evaluation of games, row 3: tools, sample 1, turn 2: no"


@pytest.mark.parametrize("run", ["thread", pytest.param("process", marks=pytest.mark.slow)])
async def test_a_tool_that_hangs_is_an_error_to_read_and_its_environment_is_brought_back(run: str) -> None:
    async with playing(run, tools=("act", "wait"), turn_timeout_s=0.5) as (manager, incidents):
        hung = saying(add={"number": 2}, act={"what": "hang"})
        answers = await played(manager, hung, saying(add={"number": 2}, do={"what": "hang"}), saying("on"), start=1)
        assert [call.error for call in answers[1].calls] == ["", "no answer within 0.5 s"]
        assert [call.result for call in answers[2].calls] == ["5", "{'error': 'no answer within 0.5 s'}"]
        assert told(answers[3]) == "6 on"
        both = await manager.answer(FIRST, 4, (4,), saying(wait={"what": "hang"}, later={"what": "x"}))
        assert sorted(bool(call.error) for call in both.calls) == [False, True]
    assert [incident.kind for incident in incidents] == ["tool_timeout"] * 3
    assert "environment Counter, group 0, sample 0, turn 1: tool act: no answer within 0.5 s" in incidents[0].message
    assert notes().count("act hang") == notes().count("do hang") == 1


@pytest.mark.parametrize(
    ("run", "what", "kind", "why"),
    [
        ("thread", "raise", "environment_error", "step failed: ValueError: no such thing"),
        ("thread", "hang", "environment_timeout", "step: no answer within 0.5 s"),
        ("thread", "exit", "environment_error", "os._exit(7)"),
        ("process", "exit", "environment_died", "exit code 7"),
        pytest.param("process", "hang", "environment_timeout", "step: no answer within 0.5 s", marks=pytest.mark.slow),
        pytest.param("process", "raise", "environment_error", "ValueError: no such thing", marks=pytest.mark.slow),
        pytest.param("process", "flood", "environment_error", "the result has 100,000,0", marks=pytest.mark.slow),
        pytest.param("thread", "flood", "environment_error", "the result has 100,000,0", marks=pytest.mark.slow),
    ],
)
async def test_a_step_that_fails_costs_its_own_episode_only(run: str, what: str, kind: str, why: str) -> None:
    async with playing(run, turn_timeout_s=0.5 if what == "hang" else 60.0) as (manager, incidents):
        other = EpisodeName(1, 0)
        await played(manager, saying("a"), name=other)
        failed = (await played(manager, saying(what)))[-1]
        assert why in failed.failed
        assert why in (await manager.answer(FIRST, 2, (2,), saying("more"))).failed
        ending = await manager.close(FIRST, 2)
        assert (ending.reward, why in ending.failed) == (None, True)
        (on,) = await played(manager, saying("b"), name=other, first=2)
        assert told(on) == "2 b"
        assert [each.kind for each in incidents if each.gid is not None] == [kind]
        assert incidents[0].gid == 0
        assert notes().count("step a") == (2 if run == "process" and what in ("hang", "exit") else 1)


async def test_a_tool_that_returns_too_much_or_ends_its_process_or_spoils_it_is_an_error_to_read() -> None:
    async with playing("process", None, tools=("act",)) as (manager, incidents):
        turns = [saying(act={"what": what}) for what in ("flood", "exit", "garbage")]
        flood, exits, garbage = (await played(manager, *turns))[1:]
        assert "the result has 100,000,005 bytes; the limit is 1,000,000" in told(flood)
        assert told(exits) == told(garbage) == "{'error': 'its process ended while it was called'}"
        assert [incident.kind for incident in incidents] == ["tool_died"] * 2
        assert "its process did not answer as it should" in incidents[1].message
        assert (await manager.answer(FIRST, 4, (4,), saying(act={"what": "killed"}))).failed
        assert manager.environments(0) is None
        assert (await manager.close(FIRST, 4)).failed


async def test_what_needs_a_process_is_said_once() -> None:
    async with playing("thread", None, tools=("act",)) as (manager, incidents):
        answers = await played(manager, *[saying(act={"what": "exit"})] * 2)
        assert "refused in the process that trains; it needs environment.run" in told(answers[1])
    assert [incident.kind for incident in incidents] == ["environment_needs_process"]


async def test_nothing_is_asked_twice_and_who_goes_loses_nothing() -> None:
    async with playing("thread", tools=("act",)) as (manager, _):
        first = await played(manager, saying("a"), saying(later={"what": "b"}))
        assert await played(manager, saying("a"), saying(later={"what": "b"})) == first
        async with anyio.create_task_group() as group:
            group.start_soon(manager.answer, FIRST, 3, (3,), saying(later={"what": "c"}))
            await until(lambda: "later c" in notes())
            group.cancel_scope.cancel()
        again = await manager.answer(FIRST, 3, (3,), saying(later={"what": "c"}))
        assert told(again) == "3 c"
        endings = [await manager.close(FIRST, 3) for _ in range(2)]
        assert endings[0] == endings[1]
    assert Counter(notes())["later c"] == Counter(notes())["reward"] == Counter(notes())["step a"] == 1


@pytest.mark.parametrize(
    ("factory", "notes_then"), [("Saving", ["load", "step z"]), ("Counter", ["reset 0", "step a", "step z"])]
)
async def test_another_turn_of_a_number_goes_on_from_the_one_before(factory: str, notes_then: list[str]) -> None:
    async with playing("loop", factory) as (manager, incidents):
        await played(manager, saying("a"), saying("b"), saying("c"))
        await manager.close(FIRST, 3)
        before = len(notes())
        other = await manager.answer(FIRST, 2, (7,), saying("z"))
        assert told(other) == "2 z"
        assert [note for note in notes()[before:] if note not in ("made", "close")] == notes_then
        assert told(await manager.answer(FIRST, 3, (3,), saying("c"))) == "3 c"
        assert (await manager.close(FIRST, 3)).reward == 3.0
        assert incidents == []


async def test_instances_are_used_again_when_their_group_is_settled() -> None:
    async with playing("thread") as (manager, _):
        names = [EpisodeName(0, sample) for sample in range(2)]
        for name in names:
            await played(manager, saying("a"), name=name)
            await manager.close(name, 1)
        kept = manager.environments(0)
        assert kept is not None
        assert len({id(each) for each in kept}) == 2
        manager.settled(0)
        await anyio.sleep(0.05)
        await played(manager, name=EpisodeName(1, 0), start=9)
        (again,) = manager.environments(1) or [None]
        assert again is not None
        assert any(again is each for each in kept)
        assert (again.total, again.words) == (9, [])
    assert notes().count("made") == 3  # one to look at
    assert len(again._threads) == 1
    async with playing("thread", wants_attributes=False) as (manager, _):
        for sample in range(3):
            await played(manager, name=EpisodeName(0, sample))
            await manager.close(EpisodeName(0, sample), 0)
            await anyio.sleep(0.05)
    assert notes().count("made") == 3 + 2  # one after the other


@pytest.mark.parametrize("run", ["thread", pytest.param("process", marks=pytest.mark.slow)])
async def test_one_that_says_so_is_used_for_one_episode_only(run: str) -> None:
    async with playing(run, "Once") as (manager, _):
        for gid in range(3):
            await played(manager, saying("a"), name=EpisodeName(gid, 0))
            await manager.close(EpisodeName(gid, 0), 1)
            manager.forget(gid)
            await until(partial(closed, gid + 1))
    assert notes().count("made") == notes().count("close") == 4  # with the one to look at


async def test_what_may_not_be_asked_twice_waits_and_is_asked_once() -> None:
    async with playing("thread", "Away", breaker_failures=1, breaker_max_wait_s=0.05) as (manager, _):
        for sample in range(2):
            await played(manager, name=EpisodeName(1, sample))
        away(True)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(played, manager, name=EpisodeName(2, 0)))
            await until(lambda: manager.down)
            answers = [await manager.answer(EpisodeName(1, 0), 1, (1,), saying("raise"))]
            assert manager.down
            answers.append(await manager.answer(EpisodeName(1, 1), 1, (1,), saying("a")))
            assert not manager.down
            away(False)
    assert [bool(answer.failed) for answer in answers] == [True, False]
    assert notes().count("step raise") == 1


async def test_a_view_has_what_is_plain_and_cannot_be_changed() -> None:
    async with playing("process") as (manager, _):
        await played(manager, saying("a"))
        await manager.close(FIRST, 1)
        (view,) = manager.environments(0) or [None]
    assert isinstance(view, View)
    assert (view.total, view.words) == (1, ["a"])
    with pytest.raises(AttributeError, match="no attribute 'hidden'"):
        _ = view.hidden
    with pytest.raises(AttributeError, match="only be read"):
        view.total = 3


async def test_an_environment_that_is_away_is_waited_for() -> None:
    async with playing("thread", "Away", breaker_failures=2, breaker_max_wait_s=0.05) as (manager, incidents):
        (fine,) = await played(manager)
        assert not fine.failed
        away(True)
        answers: dict[int, Any] = {}

        async def begin(gid: int) -> None:
            (answers[gid],) = await played(manager, name=EpisodeName(gid, 0))

        async with anyio.create_task_group() as group:
            for gid in range(1, 6):
                group.start_soon(begin, gid)
            await until(lambda: manager.down)
            assert "nobody is there" in manager.down["Away"]
            await anyio.sleep(0.2)
            away(False)
        assert sum(bool(answer.failed) for answer in answers.values()) == 1  # before it was taken to be down
        assert not manager.down
        await until(lambda: incidents[-1].kind == "environment_back")
    assert [incident.kind for incident in incidents] == ["environment_error", "environment_down", "environment_back"]


async def test_one_that_is_down_is_tried_even_where_nobody_waits() -> None:
    async with playing("thread", "Away", breaker_failures=1, breaker_max_wait_s=0.05) as (manager, _):
        await played(manager)
        away(True)
        with anyio.move_on_after(0.2):
            await manager.open(EpisodeName(1, 0), PROMPT, {})
        assert manager.down
        away(False)
        await until(lambda: not manager.down)


async def test_what_may_be_asked_again_is() -> None:
    async with playing("thread", "Flaky", retries=2) as (manager, incidents):
        assert told((await played(manager, saying("a")))[1]) == "1 a"
    assert notes().count("flaky") == 1
    assert incidents == []


async def test_code_that_has_never_worked_ends_the_run_and_bad_rows_do_not() -> None:
    async with playing("loop", breaker_failures=3) as (manager, _):
        for gid in range(2):
            for sample in range(4):
                (answer,) = await played(manager, name=EpisodeName(gid, sample), act="raise")
                assert answer.failed
        with pytest.raises(WorldError, match="environment Counter has not been reset once, and has failed in 3 groups"):
            await played(manager, name=EpisodeName(2, 0), act="raise")
    async with playing("loop", breaker_failures=3) as (manager, _):
        await played(manager)
        for gid in range(1, 9):
            (answer,) = await played(manager, name=EpisodeName(gid, 0), act="raise")
            assert answer.failed


async def test_processes_load_what_python_gave_by_name_or_refuse_it() -> None:
    config = EnvironmentConfig(run="process", processes=1)
    world = load_world(config, tools=[acting.double], environment_factory=acting.Counter)
    async with EnvironmentManager(world, config, sleep=no_sleep) as manager:
        answers = await played(manager, saying(double={"number": 2}, add={"number": 1}))
        assert [message["content"] for message in answers[1].messages] == ["4", "1"]
        with pytest.raises(WorldError, match="plain data only"):
            await manager.open(EpisodeName(1, 0), PROMPT, {"start": object()})
    with pytest.raises(
        WorldError, match="environment Counter cannot be loaded by name in another process, for it is a lambda"
    ):
        EnvironmentManager(load_world(config, environment_factory=lambda: acting.Counter()), config)


async def test_processes_end_with_the_manager_and_a_hung_one_at_once() -> None:
    config = config_of("process", "Counter", ("act",), processes=2, turn_timeout_s=0.5)
    async with EnvironmentManager(load_world(config), config) as manager:
        pids = {worker._child.pid for pool in pools_of(manager) for worker in pool._all}
        assert len(pids) == 4
        (_, hung) = await played(manager, saying(act={"what": "hang"}))
        assert "no answer" in told(hung)
        assert sum(map(is_alive, pids)) == 3
        pids |= {worker._child.pid for pool in pools_of(manager) for worker in pool._all}
    assert not any(map(is_alive, pids))
    assert os.getpid() not in pids


def closed(times: int) -> bool:
    return notes().count("close") >= times


def pools_of(manager: EnvironmentManager) -> list[Any]:
    runner: Any = manager._answerer.runner
    return [runner._environments, runner._tools]
