"""Rewards and environments on workers: the same answers as in processes here, whatever becomes of workers; and nothing
runs there that their owner has not named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.rewards import process_rewards
from tests.rewards.scoring import is_alive, no_sleep
from tests.support.services import Liar, Site, at_site
from troupe.cluster.call_wire import Offered
from troupe.cluster.link import Link
from troupe.cluster.services import OwnCode, Serving, _Refused
from troupe.errors import ConfigError, RewardError
from troupe.rewards import RewardManager, RewardsConfig
from troupe.rewards.processes.calls import Broken, Loaded, Scores
from troupe.runtime.elsewhere import Code, Service
from troupe.runtime.frames import encode
from troupe.runtime.machine import VERSION

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

FILE = process_rewards.__file__


def on_workers(site: Site, *rewards: Any, processes: int = 1, retries: int = 0, **settings: Any) -> RewardManager:
    config = RewardsConfig(run=tuple("worker" for _ in rewards), processes=processes, retries=retries, **settings)
    return RewardManager(rewards, config=config, sleep=no_sleep, elsewhere=site.calls)


async def score(manager: RewardManager, *completions: str, **columns: Any) -> Any:
    return await manager.compute_rewards(["p"] * len(completions), list(completions), **columns)


async def until(condition: Any, limit_s: float = 20.0) -> None:
    with anyio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 - of other tasks and processes
            await anyio.sleep(0.02)


async def test_files_modules_and_our_own_rewards_give_what_they_give_here() -> None:
    rewards = (f"{FILE}:lengths", process_rewards.later, "format:a+b", f"{FILE}:marks")
    texts, answers = ("aab", "c" * 1_100_000), ["x", "y"]
    here = RewardManager(rewards, config=RewardsConfig(run=("process",) * 4, processes=1))
    async with here:
        expected = await score(here, *texts, answer=answers)
    async with at_site() as site:
        named = (f"{FILE}:lengths", f"{process_rewards.__name__}:later", f"{FILE}:marks")
        site.join("w", OwnCode(["rewards"], rewards=named))
        async with on_workers(site, *rewards) as manager:
            assert await score(manager, *texts, answer=answers) == expected
            assert await score(manager, *texts, answer=answers) == expected
            leases = site.roster.statuses()[0].leases
            assert len(leases) == 4
        await until(lambda: not site.roster.statuses()[0].leases)
    assert expected.incidents == ()


@pytest.mark.slow
async def test_a_call_goes_to_another_worker_when_its_own_is_lost_in_the_middle(tmp_path: Path) -> None:
    own = OwnCode(["rewards"], rewards=[f"{FILE}:waits_for"])
    async with at_site(lease_s=2.0) as site, on_workers(site, f"{FILE}:waits_for") as manager:
        site.join("w1", own)
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                found.append(await score(manager, str(tmp_path), str(tmp_path)))

            tasks.start_soon(ask)
            await until(lambda: len(list(tmp_path.iterdir())) == 1)
            site.pull_cable("w1")
            site.join("w2", own)
            await until(lambda: len(list(tmp_path.iterdir())) == 2)
            (tmp_path / "go").touch()
        assert found[0].scores == {"waits_for": (2.0, 2.0)}
        assert found[0].incidents == ()
        assert site.kinds().count("worker_lost") == 1


async def test_without_a_worker_the_run_waits_and_says_so_and_nothing_is_missing() -> None:
    async with at_site() as site, on_workers(site, f"{FILE}:lengths") as manager:
        told: list[Any] = []
        manager.listen(told.append)
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                found.append(await score(manager, "ab"))

            tasks.start_soon(ask)
            await until(lambda: manager.down)
            assert "no worker that is here offers rewards: process_rewards.py:lengths" in manager.down["lengths"]
            assert "--offers rewards --reward process_rewards.py:lengths" in told[0].message
            site.join("w", OwnCode(["rewards"], rewards=[f"{FILE}:lengths"]))
        assert found[0].scores == {"lengths": (2.0,)}
        assert [incident.kind for incident in told] == ["waiting_for_workers", "reward_back"]
        assert not manager.down


async def test_a_reward_nobody_offers_can_be_exchanged_while_its_calls_wait() -> None:
    async with at_site() as site, on_workers(site, f"{FILE}:lengths") as manager:
        site.join("w", OwnCode(["rewards"]))
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                found.append(await score(manager, "ab"))

            tasks.start_soon(ask)
            await until(lambda: manager.down)
            await manager.exchange("lengths", "format:ab")
        assert found[0].scores == {"lengths": (1.0,)}


@pytest.mark.slow
async def test_a_call_past_its_limit_is_killed_there_and_missing(tmp_path: Path) -> None:
    async with at_site() as site, on_workers(site, f"{FILE}:pids", timeout_s=0.8) as manager:
        site.join("w", OwnCode(["rewards"], rewards=[f"{FILE}:pids"]))
        result = await score(manager, str(tmp_path / "pid"), "hang")
        assert result.scores == {"pids": (1.0, None)}
        assert [incident.kind for incident in result.incidents] == ["reward_timeout"]
        pids = [int(pid) for pid in (tmp_path / "pid").read_text().split()]
        await site.leave("w")
        await until(lambda: not any(map(is_alive, pids)))


class Twice:
    """A link on which the first answer to everything is lost."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def ask(self, verb: str, body: bytes = b"", *, wait_s: float = 10.0) -> bytes:
        await self._link.ask(verb, body, wait_s=wait_s)
        return await self._link.ask(verb, body, wait_s=wait_s)


async def test_what_is_asked_twice_is_done_once(tmp_path: Path) -> None:
    own = OwnCode(["rewards"], rewards=[f"{FILE}:pids"])
    serving = Serving("rewards", own)

    async def serve(link: Link) -> None:
        await serving.serve(Twice(link), b"")

    async with at_site() as site, on_workers(site, f"{FILE}:pids") as manager:
        site.join_as("w", serve, {"rewards": serving.details()})
        for _ in range(3):
            assert (await score(manager, str(tmp_path / "pids"))).scores == {"pids": (1.0,)}
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 3
        assert len(set(pids)) == 1
        assert site.kinds() == []


LIES = {
    "no message": b"\xc1\xff nonsense",
    "too few scores": encode(Scores([1.0], {}, {})),
    "no scores": encode({"type": "Scores", "scores": ["high"], "extra": {}, "metrics": {}}),
    "extra of another length": encode(Scores([1.0, 1.0], {"x": [1]}, {})),
    "out of turn": encode(Loaded()),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_is_no_answer_is_missing_and_told_and_after_three_the_worker_is_not_asked(lie: str) -> None:
    liar = Liar(LIES[lie])
    async with at_site() as site, on_workers(site, f"{FILE}:lengths", breaker_failures=0) as manager:
        code = Code.of(f"{FILE}:lengths", is_ours=False)
        details = encode(Offered(troupe=_version(), code=(code,)))
        site.join_as("liar", liar, {"rewards": details})
        for _ in range(3):
            result = await score(manager, "ab", "c")
            assert result.scores == {"lengths": (None, None)}
            assert result.faulted == (0, 1)
            assert result.incidents
        site.join("honest", OwnCode(["rewards"], rewards=[f"{FILE}:lengths"]))
        assert (await score(manager, "ab", "c")).scores == {"lengths": (2.0, 1.0)}
        offences = [incident.message for incident in site.incidents if incident.kind == "worker_offence"]
        assert len(offences) >= 3
        assert all("worker liar" in each for each in offences)
        assert liar.begun >= 3


async def test_that_the_convention_is_broken_ends_no_run_when_another_machine_says_so() -> None:
    async with at_site() as site, on_workers(site, f"{FILE}:lengths") as manager:
        details = encode(Offered(troupe=_version(), code=(Code.of(f"{FILE}:lengths", is_ours=False),)))
        site.join_as("liar", Liar(encode(Broken("return a list"))), {"rewards": details})
        result = await score(manager, "ab")
        assert result.scores == {"lengths": (None,)}
        assert "return a list" in result.incidents[0].message


async def test_another_file_or_another_troupe_is_not_asked_and_said(tmp_path: Path) -> None:
    other = tmp_path / "process_rewards.py"
    other.write_text("def lengths(completions): return [9.0 for _ in completions]\n")
    async with at_site() as site, on_workers(site, f"{FILE}:lengths") as manager:
        site.join("edited", OwnCode(["rewards"], rewards=[f"{other}:lengths"]))
        old = encode(Offered(troupe="0.1", code=(Code.of(f"{FILE}:lengths", is_ours=False),)))
        site.join_as("old", Liar(), {"rewards": old})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(score, manager, "ab")
            await until(lambda: manager.down)
            why = manager.down["lengths"]
            assert "worker edited has another process_rewards.py:lengths: its file differs from the run's" in why
            assert "worker old has Troupe 0.1" in why
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "code",
    [
        Code("reasoning_gym:create_dataset"),
        Code("length:lengths"),
        Code("os:system"),
        Code("subprocess:getoutput", "0" * 64),
        Code("process_rewards.py:lengths"),
        Code("process_rewards.py:lengths", "0" * 64),
        Code(f"{FILE}:acts", Code.of(f"{FILE}:acts", is_ours=False).sha256),
        Code("process_rewards.py:acts", Code.of(f"{FILE}:acts", is_ours=False).sha256),
    ],
    ids=lambda code: Path(code.name).name + (" with a sum" if code.sha256 else ""),
)
def test_a_run_cannot_have_a_worker_load_what_its_owner_has_not_named(code: Code) -> None:
    own = OwnCode(["rewards", "environments"], rewards=[f"{FILE}:lengths"])
    with pytest.raises(_Refused, match="not offered here"):
        own.reward(Service("rewards", {"": code}))
    with pytest.raises(_Refused, match="not offered here"):
        own.section(Service("environments", {"": code}))
    with pytest.raises(_Refused, match="not offered here"):
        own.section(Service("environments", {}, (code,)))


def test_a_file_that_changes_while_its_worker_runs_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("def judge(completions): return [1.0 for _ in completions]\n")
    own = OwnCode(["rewards"], rewards=[f"{file}:judge"])
    service = Service("rewards", {"": Code.of(f"{file}:judge", is_ours=False)})
    assert own.reward(service) == f"{file}:judge"
    file.write_text("def judge(completions): return [2.0 for _ in completions]\n")
    with pytest.raises(_Refused, match="was changed while the worker ran"):
        own.reward(service)


def test_what_cannot_be_offered_is_said() -> None:
    with pytest.raises(ConfigError, match=r"--reward x\.py:f is given, but this worker does not offer rewards"):
        OwnCode(["generate"], rewards=["x.py:f"])
    with pytest.raises(ConfigError, match="cannot be read"):
        OwnCode(["rewards"], rewards=["missing.py:f"])
    with pytest.raises(RewardError, match="give --serve HOST:PORT"):
        RewardManager(f"{FILE}:lengths", config=RewardsConfig(run=("worker",)))


def _version() -> str:
    return VERSION
