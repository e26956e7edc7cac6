"""Rewards exchanged while groups are being scored."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.rewards.scoring import Scoring, until
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import Incident, RolloutGroup
from troupe.rewards import RewardActor, RewardManager, RewardSample, batch_reward

pytestmark = pytest.mark.anyio


class Judge(RewardActor):
    """Gives one mark to every sample, when it may."""

    def __init__(self, mark: float, *, opens: bool = True, closes: bool = True) -> None:
        self.mark, self.opens, self.closes = mark, opens, closes
        self.events: list[str] = []
        self.go = anyio.Event()

    async def start(self) -> None:
        self.events.append("start")
        if not self.opens:
            raise OSError("no connection")

    async def score(self, sample: RewardSample) -> float | None:
        await self.go.wait()
        if self.mark < 0:
            raise OSError("away")
        return self.mark

    async def stop(self) -> None:
        self.events.append("stop")
        if not self.closes:
            raise OSError("will not close")


def group(place: int, size: int = 9) -> RolloutGroup:
    return make_group(make_prompt(0, place, batch_size=size))


async def test_groups_under_way_keep_the_old_one_and_it_stops_after_the_last_of_them() -> None:
    old, new = Judge(1.0, closes=False), Judge(2.0)
    scoring = Scoring(old)
    stopped: list[Incident] = []

    async def exchange() -> None:
        stopped.extend(await scoring.manager.exchange("Judge", new))

    async with scoring.manager, anyio.create_task_group() as tasks:
        tasks.start_soon(scoring.score, group(0))
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(exchange)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(scoring.score, group(1))
        new.go.set()
        await anyio.wait_all_tasks_blocked()
        assert scoring.results[1].scores == {"Judge": (2.0, 2.0, 2.0)}
        assert (old.events, new.events) == (["start"], ["start"])
        assert scoring.manager.versions == {"Judge": 1}
        old.go.set()
    assert scoring.results[0].scores == {"Judge": (1.0, 1.0, 1.0)}
    assert (old.events, new.events) == (["start", "stop"], ["start", "stop"])
    assert [incident.message.split(" (")[0] for incident in stopped] == [
        "reward Judge: did not stop: OSError: will not close"
    ]


async def test_what_cannot_take_over_leaves_the_old_one() -> None:
    old, broken = Judge(1.0), Judge(2.0, opens=False)
    old.go.set()
    scoring = Scoring(old)
    scoring.manager.check_columns({"answer"})
    async with scoring.manager:
        with pytest.raises(RewardError, match="there is no reward 'judge' to be exchanged; there are: Judge"):
            await scoring.manager.exchange("judge", old)
        with pytest.raises(RewardError, match="reward Judge did not start: OSError: no connection"):
            await scoring.manager.exchange("Judge", broken)
        with pytest.raises(RewardError, match="requires hint"):
            await scoring.manager.exchange("Judge", lambda completions, hint: [])
        with pytest.raises(RewardError, match="is unknown"):
            await scoring.manager.exchange("Judge", "lenght")
        with pytest.raises(RewardError, match="is called once a group, and its replacement would be once a batch"):
            await scoring.manager.exchange("Judge", batch_reward(lambda completions: []))
        await scoring.score(group(0))
        assert scoring.manager.versions == {"Judge": 0}
    assert scoring.results[0].scores == {"Judge": (1.0, 1.0, 1.0)}
    assert broken.events == ["start", "stop"]


async def test_an_exchange_is_a_way_out_when_the_old_one_is_down() -> None:
    old, new = Judge(-1.0), Judge(2.0)
    old.go.set()
    new.go.set()
    scoring = Scoring(old, breaker_failures=1)
    told: list[str] = []
    scoring.manager.listen(lambda incident: told.append(incident.kind))
    async with scoring.manager:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for place in range(3):
                    tasks.start_soon(scoring.score, group(place))
                await until(lambda: scoring.manager.down)
                await scoring.manager.exchange("Judge", new)
    assert [scoring.results[place].scores["Judge"] for place in range(3)] == [(2.0, 2.0, 2.0)] * 3
    assert told == ["reward_down", "reward_exchanged", "reward_back"]
    assert old.events == ["start", "stop"]


async def test_a_round_that_has_begun_stays_whole_with_the_old_one() -> None:
    @batch_reward
    def old(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    @batch_reward
    def new(completions: list[str]) -> list[float]:
        return [2.0] * len(completions)

    scoring = Scoring(old)
    async with scoring.manager, anyio.create_task_group() as tasks:
        tasks.start_soon(scoring.score, group(0, 2))
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(scoring.manager.exchange, "old", new)
        await anyio.wait_all_tasks_blocked()
        await scoring.score(group(1, 2))
        for place in range(2):
            scoring.manager.settled(group(place, 2))
    assert [scoring.results[place].rewards for place in range(2)] == [(1.0, 1.0, 1.0)] * 2
    assert (await scoring.manager.compute_rewards(["p"], ["a"])).scores == {"old": (2.0,)}


async def test_a_round_that_waits_for_a_reward_that_is_down_moves_to_the_new_one() -> None:
    @batch_reward
    async def old(completions: list[str]) -> list[float]:
        raise OSError("away")

    @batch_reward
    async def new(completions: list[str]) -> list[float]:
        return [2.0] * len(completions)

    scoring = Scoring(old, breaker_failures=1)
    async with scoring.manager:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for place in range(3):
                    tasks.start_soon(scoring.score, group(place, 3))
                await until(lambda: scoring.manager.down)
                await scoring.manager.exchange("old", new)
    assert [scoring.results[place].rewards for place in range(3)] == [(2.0, 2.0, 2.0)] * 3


async def test_of_two_exchanges_at_once_the_later_one_scores_in_the_end() -> None:
    class Slow(Judge):
        async def start(self) -> None:
            await self.go.wait()
            await super().start()

    old, slow, last = Judge(1.0), Slow(2.0), Judge(3.0)
    last.go.set()
    scoring = Scoring(old)
    async with scoring.manager:
        async with anyio.create_task_group() as tasks:
            for judge in (slow, last):
                tasks.start_soon(scoring.manager.exchange, "Judge", judge)
                await anyio.wait_all_tasks_blocked()
            slow.go.set()
        await scoring.score(group(0))
        assert scoring.manager.versions == {"Judge": 2}
        assert (old.events, slow.events, last.events) == (["start", "stop"], ["start", "stop"], ["start"])
    assert scoring.results[0].scores == {"Judge": (3.0, 3.0, 3.0)}


async def test_the_file_of_a_successor_is_imported_while_the_loop_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(
        "from pathlib import Path\n"
        "import time\n"
        "while not Path(__file__).with_name('go').exists():\n"
        "    time.sleep(0.001)\n"
        "def judge(completions):\n"
        "    return [2.0] * len(completions)\n"
    )
    scoring = Scoring(lambda completions: [1.0] * len(completions))
    async with scoring.manager:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(scoring.manager.exchange, "<lambda>", f"{file}:judge")
                await scoring.score(group(0))
                (tmp_path / "go").touch()
            await scoring.score(group(1))
    assert [scoring.results[place].rewards for place in range(2)] == [(1.0,) * 3, (2.0,) * 3]


async def test_the_managers_end_stops_the_old_one_too_where_its_groups_never_ended() -> None:
    old, new = Judge(1.0), Judge(2.0)
    scoring = Scoring(old)
    async with scoring.manager:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scoring.score, group(0))
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(scoring.manager.exchange, "Judge", new)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert old.events == ["start"]
    assert (old.events, new.events) == (["start", "stop"], ["start", "stop"])


async def test_before_the_start_it_is_a_plain_replacement() -> None:
    old, new = Judge(1.0), Judge(2.0)
    scoring = Scoring(old)
    await scoring.manager.exchange("Judge", new)
    assert (old.events, new.events) == ([], [])


OTHERS = {
    "good": "def f(completions, **k): return [1.0] * len(completions)",
    "ends": "import os\nos._exit(0)",
    "hangs": "import time\ntime.sleep(600)",
    "wrong": "1 / 0",
    "wide": "def f(completions, **k): return []\nf.scope = 'batch'",
    "asks": "def f(completions, no_such_column): return []",
}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("good:f", None),
        ("good:nope", "good.py: has no 'nope'"),
        ("missing:f", "missing.py: no such file"),
        ("ends:f", "its process ended while it was loaded: .* ended with exit code 0"),
        pytest.param("hangs:f", "was not loaded after 2 s", marks=pytest.mark.slow),
        ("wrong:f", "wrong.py:1: the file does not import: ZeroDivisionError"),
        ("wide:f", "its replacement would be once a batch"),
        ("asks:f", "requires no_such_column"),
    ],
)
async def test_a_successor_can_be_looked_at_before_it_is_asked_for(
    tmp_path: Path, other: str, said: str | None
) -> None:
    file, _, name = other.partition(":")
    if file in OTHERS:
        (tmp_path / f"{file}.py").write_text(OTHERS[file], encoding="utf-8")
    spec = f"{tmp_path / file}.py:{name}"
    async with RewardManager("length", look_s=2.0 if other == "hangs:f" else 60.0) as manager:
        manager.check_columns(set())
        if said is None:
            await manager.examine("length_reward", spec)
            await manager.examine("length_reward", "diversity")
        else:
            with pytest.raises(RewardError, match=said):
                await manager.examine("length_reward", spec)
        assert manager.versions == {"length_reward": 0}
        with pytest.raises(RewardError, match="there is no reward 'other' to be exchanged"):
            await manager.examine("other", spec)


@pytest.mark.alone
async def test_a_file_that_is_loaded_beside_a_run_may_not_fork(tmp_path: Path) -> None:
    path = tmp_path / "forks.py"
    path.write_text("import os\nif not os.fork():\n    os._exit(0)\ndef f(completions, **k): return []\n")
    async with RewardManager("length") as manager:
        with pytest.raises(RewardError, match=r"forks.py:2: the file does not import: .*os.fork\(\)"):
            await manager.exchange("length_reward", f"{path}:f")
        assert manager.versions == {"length_reward": 0}
