"""Environments and tools on workers: what an episode hears is what it hears in processes here, whatever becomes of
workers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from tests.environments.acting import notes
from tests.environments.playing import FILE, PROMPT, config_of, no_sleep, played, playing, saying, timeless, told, until
from tests.support.services import Liar, Site, at_site
from troupe.cluster.call_wire import Offered
from troupe.cluster.services import OwnCode
from troupe.environments.ledger import EpisodeName
from troupe.environments.loading import load_world
from troupe.environments.manager import EnvironmentManager
from troupe.environments.processes.wire import Broken, Done, Threw
from troupe.errors import WorldError
from troupe.messages import Incident
from troupe.runtime.elsewhere import Code
from troupe.runtime.frames import encode
from troupe.runtime.machine import VERSION

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

TURNS = 40


@pytest.fixture(autouse=True)
def _notes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTING_NOTES", str(tmp_path / "notes"))


def own(factory: str, tools: Sequence[str] = ()) -> OwnCode:
    return OwnCode(["environments"], environments=[f"{FILE}:{factory}"], tools=[f"{FILE}:{tool}" for tool in tools])


@asynccontextmanager
async def playing_at(
    site: Site, factory: str | None = "Counter", tools: Sequence[str] = (), **settings: Any
) -> AsyncIterator[tuple[EnvironmentManager, list[Incident]]]:
    config = config_of("worker", factory, tools, **settings)
    incidents: list[Incident] = []
    manager = EnvironmentManager(
        load_world(config), config, wants_attributes=True, sleep=no_sleep, jitter=lambda: 0.0, elsewhere=site.calls
    )
    manager.listen(incidents.append)
    async with manager:
        yield manager, incidents


async def whole(manager: EnvironmentManager) -> list[Any]:
    turns = [saying("one"), saying(add={"number": 3}, double={"number": 4}), saying(do={"what": "raise"}), saying("x")]
    answers = [timeless(each) for each in await played(manager, *turns, start=5)]
    return [*answers, await manager.close(EpisodeName(0, 0), 4)]


async def test_an_episode_hears_what_it_hears_in_processes_here() -> None:
    async with playing("process", "Counter", ("double",)) as (manager, _):
        expected = await whole(manager)
    async with at_site() as site:
        site.join("w", own("Counter", ["double"]), "environments")
        async with playing_at(site, "Counter", ("double",)) as (manager, incidents):
            assert await whole(manager) == expected
            assert len(site.roster.statuses()[0].leases) == 2
        assert incidents == []
        await until(lambda: notes()[-1] == "close")


@pytest.mark.slow
async def test_an_episode_goes_on_at_another_worker_and_tools_for_all_are_not_asked_again() -> None:
    async with at_site(lease_s=2.0) as site, playing_at(site, "Counter", ("double",)) as (manager, incidents):
        site.join("w1", own("Counter", ["double"]), "environments")
        await played(manager, saying("a"), saying(double={"number": 2}))
        site.pull_cable("w1")
        await until(lambda: "worker_lost" in site.kinds())
        site.join("w2", own("Counter", ["double"]), "environments")
        (answer,) = await played(manager, saying("b"), first=3)
        assert told(answer) == "2 b"
        assert incidents == []
        assert Counter(notes())["double 2"] == 1
        assert Counter(notes())["step a"] == 2


@pytest.mark.slow
async def test_with_on_lost_missing_a_lost_worker_costs_its_episodes_and_no_others() -> None:
    async with at_site(lease_s=2.0) as site, playing_at(site, on_lost="missing") as (manager, incidents):
        site.join("w1", own("Counter"), "environments")
        await played(manager, saying("a"))
        await site.leave("w1")
        site.join("w2", own("Counter"), "environments")
        (answer,) = await played(manager, saying("b"), first=2)
        assert answer.failed
        assert "on_lost" in answer.failed
        other = await played(manager, saying("c"), name=EpisodeName(1, 0))
        assert told(other[1]) == "1 c"
        assert len(incidents) == 1


async def test_without_a_worker_episodes_wait_and_the_run_says_so() -> None:
    async with at_site() as site, playing_at(site) as (manager, incidents):
        async with anyio.create_task_group() as group:
            group.start_soon(played, manager, saying("a"))
            await until(lambda: manager.down)
            assert "no worker that is here offers environments: acting.py:Counter" in manager.down["Counter"]
            site.join("w", own("Counter"), "environments")
        assert [incident.kind for incident in incidents] == ["waiting_for_workers", "environment_back"]
        assert not manager.down


LIES = {
    "no message": b"\xc1 nonsense",
    "that it cannot be loaded": encode(Broken("no")),
    "no step": encode(Done(encode(7))),
    "an endless reward": encode(Done(encode({"observation": "x", "reward": float("inf"), "done": False, "info": {}}))),
    "too much": encode(Done(encode("x" * 2_000_000))),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_is_no_answer_makes_its_episode_missing_and_ends_no_run(lie: str) -> None:
    async with at_site() as site, playing_at(site) as (manager, incidents):
        offered = Offered(troupe=VERSION, code=(Code.of(f"{FILE}:Counter", is_ours=False),))
        loaded = encode(Done())
        liar = Liar(LIES[lie], kind="environments", loaded=loaded, first=(loaded, encode(Done(encode(None)))))
        site.join_as("liar", liar, {"environments": encode(offered)})
        answers = await played(manager, saying("a"))
        assert not answers[0].failed
        assert answers[1].failed
        assert [incident.kind for incident in incidents] == ["environment_died"]
        assert "worker_offence" in site.kinds()


async def test_a_long_error_of_a_tool_is_cut() -> None:
    async with at_site() as site, playing_at(site, None, ("double",)) as (manager, _):
        offered = Offered(troupe=VERSION, tools=(Code.of(f"{FILE}:double", is_ours=False),))
        liar = Liar(encode(Threw("x" * 1_000_000, "y" * 1_000_000, False)), kind="environments", loaded=encode(Done()))
        site.join_as("liar", liar, {"environments": encode(offered)})
        answers = await played(manager, saying(double={"number": 1}))
        assert len(str(answers[1].messages[0]["content"])) < 11_000


def test_without_a_run_that_is_served_it_is_refused() -> None:
    config = config_of("worker", "Counter")
    with pytest.raises(WorldError, match="give --serve HOST:PORT"):
        EnvironmentManager(load_world(config), config)


async def play(manager: EnvironmentManager, name: EpisodeName, heard: dict[EpisodeName, list[str]]) -> None:
    await manager.open(name, PROMPT, {})
    heard[name] = []
    for turn in range(1, TURNS + 1):
        said = saying(double={"number": turn}) if turn == 1 else saying(f"{name.sample} {turn}")
        answer = await manager.answer(name, turn, (turn,), said)
        heard[name].append(answer.failed or told(answer))
        await anyio.sleep(0.02)
    heard[name].append(str((await manager.close(name, TURNS)).reward))


async def heard_with(losses: int, factory: str) -> dict[EpisodeName, list[str]]:
    """What 8 episodes have heard while so many workers were lost at random moments."""
    heard: dict[EpisodeName, list[str]] = {}
    chance = random.Random(7)
    async with (
        at_site(lease_s=5.0) as site,
        playing_at(site, factory, ("double",), processes=2) as (manager, incidents),
        anyio.create_task_group() as group,
    ):
        for number in range(2):
            site.join(f"w{number}", own(factory, ["double"]), "environments")

        async def lose() -> None:
            await until(lambda: len(heard) == 8 and all(heard.values()))  # a tool for all is not called a second time
            for number in range(losses):
                await until(lambda number=number: site.processes(f"w{number}") or site.processes(f"w{number + 1}"))  # type: ignore[misc]
                await anyio.sleep(chance.uniform(0.0, 1.5))
                (site.pull_cable if number % 2 else site.kill)(f"w{number}")
                site.join(f"w{number + 2}", own(factory, ["double"]), "environments")

        group.start_soon(lose)
        async with anyio.create_task_group() as episodes:
            for sample in range(8):
                episodes.start_soon(play, manager, EpisodeName(sample // 4, sample % 4), heard)
        group.cancel_scope.cancel()
        told_of = {"waiting_for_workers", "environment_back"}
        assert not [incident.message for incident in incidents if incident.kind not in told_of]
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["Counter", "Saving"])
async def test_workers_that_are_lost_change_nothing_that_an_episode_hears(factory: str) -> None:
    straight = await heard_with(0, factory)
    assert all(len(each) == TURNS + 1 for each in straight.values())
    assert await heard_with(8, factory) == straight
