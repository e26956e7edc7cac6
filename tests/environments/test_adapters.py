"""Environments of other packages: each played, on an environment of its own package."""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.extras import extra
from troupe.environments import StepResult
from troupe.environments.adapters import adapted
from troupe.environments.adapters.options import check_version, read_options
from troupe.environments.describing import describe
from troupe.environments.loading import load_world
from troupe.environments.results import checked_step
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.run.tables import anchored_environment

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

DATA = Path(__file__).parents[1] / "data" / "environments"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DATA))


def made(spec: str) -> Any:
    return adapted(*spec.split(":", 1))()


def played(environment: Any, *texts: str) -> list[StepResult]:
    return [checked_step(environment.step(text), "it") for text in texts]


class TestGymnasium:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        extra("gymnasium")

    def test_a_real_environment_in_words(self) -> None:
        lake = made(f"gymnasium:FrozenLake-v1?is_slippery=false&wrapper={DATA}/gym_words.py:Words")
        assert describe(lake).label == "FrozenLake-v1"
        assert describe(lake).reset_requires == ("seed",)
        assert lake.reset(seed=1, prompt=[]) == "you are at 0"
        (down, odd, *_, last) = played(lake, " down\n", "DOWN", "down", "right", "right", "down", "right")
        assert (down.observation, down.done) == ("you are at 4", False)
        assert (odd.observation or "").startswith("That is no action of Text(")
        assert (last.observation, last.reward, last.done) == ("you are at 15", 1.0, True)
        assert lake.reset(seed=1) == "you are at 0"
        lake.close()

    def test_the_seed_says_which_world_it_is(self) -> None:
        def walk(seed: int) -> list[Any]:
            lake = made(f"gymnasium:FrozenLake-v1?wrapper={DATA}/gym_words.py:Words")  # slippery: drawn each step
            lake.reset(seed=seed)
            return [result.observation for result in played(lake, "down", "down")]

        assert walk(3) == walk(3)
        assert len({str(walk(seed)) for seed in range(12)}) > 1

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("FrozenLake-v1", "observation space Discrete(16), which is no text; give a wrapper"),
            ("NoSuchLake-v1", "cannot be made: NameNotFound"),
            ("FrozenLake-v1?wrapper=gym_words:Wrods", "did you mean Words"),
            ("FrozenLake-v1?size", "'size' is no option"),
        ],
    )
    def test_what_cannot_be_used_is_told_before_any_work(self, spec: str, told: str) -> None:
        with pytest.raises(WorldError) as caught:
            made(f"gymnasium:{spec}")
        assert told in str(caught.value)


class TestTextArena:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        extra("textarena")

    def test_a_game_alone(self) -> None:
        game = made("textarena:GuessTheNumber-v0?max_number=30")
        assert "between 1 and 30" in game.reset(seed=3)
        low, high, results = 1, 30, list[StepResult]()
        while not results or not results[-1].done:
            guess = (low + high) // 2
            results += played(game, str(guess))
            low, high = (guess + 1, high) if "higher" in str(results[-1].observation) else (low, guess - 1)
        assert [each.reward for each in results] == [0.0] * (len(results) - 1) + [1.0]
        assert results[-1].info["reason"].startswith("Congratulations")

    def test_what_was_said_is_not_told_again(self) -> None:
        game = made("textarena:GuessTheNumber-v0")
        game.reset(seed=3)
        (result,) = played(game, "I think that it is [20]")
        assert result.observation == "The target number is lower."

    def test_games_at_the_same_time_have_dice_of_their_own(self) -> None:
        def rolls(games: list[Any]) -> list[list[Any]]:
            told: list[list[Any]] = [[game.reset(seed=seed)] for seed, game in enumerate(games)]
            for move in ("up", "left", "up", "right"):
                random.seed(move)  # somebody else draws in between
                for own, game in zip(told, games, strict=True):
                    own += [each.observation for each in played(game, move)]
            return told

        together = rolls([made("textarena:2048-v0") for _ in range(3)])
        assert together == [rolls([made("textarena:2048-v0") for _ in range(n + 1)])[n] for n in range(3)]

    @pytest.mark.parametrize("player", [0, 1])
    def test_a_game_against_somebody(self, player: int) -> None:
        game = made(f"textarena:TicTacToe-v0?opponent={DATA}/first_free.py:first_free")
        opening = game.reset(seed=1, player=player)
        assert ("placed their symbol" in opening) == (player == 1)
        results = played(game, "[4]", "[8]" if player == 0 else "[2]", "[7]" if player == 0 else "[6]")
        assert (results[-1].done, results[-1].reward) == (True, -1.0 if player == 0 else 1.0)

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("GuesTheNumber-v0", "did you mean GuessTheNumber-v0"),
            ("TicTacToe-v0", "a game of two takes an opponent"),
            ("GuessTheNumber-v0?size=3", "unexpected keyword argument 'size'"),
        ],
    )
    def test_what_cannot_be_used_is_told_before_any_work(self, spec: str, told: str) -> None:
        with pytest.raises(WorldError) as caught:
            made(f"textarena:{spec}")
        assert told in str(caught.value)


class TestOpenEnv:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("openenv.core")  # large, like the next one, so that no other test waits for them

    @pytest.fixture
    def url(self) -> Iterator[str]:
        """Of a server with the environment of `open_count.py`."""
        uvicorn, served, count = extra("uvicorn"), extra("openenv.core.env_server"), extra("open_count")
        app = served.create_fastapi_app(count.Count, count.CountAction, count.CountObservation, max_concurrent_envs=4)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.should_exit = True
            thread.join(20)

    async def _count(self, spec: str) -> None:
        one, other = made(f"openenv:{spec}?observation=heard"), made(f"openenv:{spec}")
        assert await one.reset(goal=2, prompt=[]) == "count to 2"
        assert await other.reset(goal=1) == "count to 1"  # its only text
        results = [await one.step(text) for text in ("1", "x", "2")]
        assert [(each.observation, each.reward, each.done) for each in results] == [
            ("go on", 1.0, False),
            ("no", 0.0, False),
            ("go on", 1.0, True),
        ]
        assert results[-1].info["state"]["step_count"] == 2
        assert (await other.step("1")).done
        assert await one.reset(goal=5) == "count to 5"
        await one.close()
        await other.close()

    async def test_an_environment_of_a_server(self, url: str) -> None:
        await self._count(url)

    async def test_an_environment_that_lives_here(self) -> None:
        await self._count("open_count:Count")

    async def test_an_action_may_be_written_whole(self) -> None:
        environment = made("openenv:open_count:Move?observation=heard")
        await environment.reset()
        texts = ('{"x": 1, "y": 2}', '{"x": 1}', "left", "[1]")
        heard = [(await environment.step(text)).observation for text in texts]
        assert heard[0] == "at 1, 2"
        assert heard[1].startswith("That is no action: 1 validation error")
        assert all(each.startswith("An action is a JSON object") for each in heard[2:])

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("http://127.0.0.1:9", "no OpenEnv server answers there"),
            ("open_count:Count?action=word", "an action has no field 'word'; there are metadata, said"),
            ("open_count:Count?verb=said", "unknown option verb"),
            ("open_count:CountAction", "its step does not say what actions it takes"),
        ],
    )
    def test_what_cannot_be_used_is_told_before_any_work(self, spec: str, told: str) -> None:
        with pytest.raises(WorldError) as caught:
            made(f"openenv:{spec}")
        assert told in str(caught.value)


class TestVerifiers:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("verifiers.v1")

    async def test_a_taskset_answered_at_once_with_its_rubrics(self) -> None:
        environment = made("verifiers:vf_sums?largest=4")
        assert describe(environment).reset_requires == ("idx",)
        results = []
        for idx, text in [(2, "4"), (3, "456")]:
            await environment.reset(idx=idx)
            results.append(await environment.step(text))
        assert results[0] == StepResult(
            None, 1.5, True, {"rewards": {"right": 1.0, "short": 1.0}, "metrics": {"turns": 1.0}}
        )
        assert (results[1].reward, results[1].done) == (0.0, True)
        await environment.close()

    async def test_an_environment_of_several_turns(self) -> None:
        environment = made("verifiers:vf_countdown")
        await environment.reset(idx=2)
        results = [await environment.step(text) for text in ("2", "1", "x")]
        assert [each.observation for each in results] == ["and then?", "and then?", None]
        assert results[-1].reward == pytest.approx(2 / 3)
        assert results[-1].info["metrics"] == {"start": 3.0}
        await environment.reset(idx=0)
        await environment.close()

    async def test_their_own_games_of_textarena(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("textarena")
        nltk = pytest.importorskip("nltk")
        (tmp_path / "corpora" / "words").mkdir(parents=True)
        for name in ("en", "en-basic"):
            (tmp_path / "corpora" / "words" / name).write_text("crane\n")
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
        monkeypatch.setattr(nltk, "download", lambda *_, **__: True)
        environment = made("verifiers:textarena?game=Hangman-v0")
        await environment.reset(idx=0)
        wrong, right = [await environment.step(text) for text in ("[z]", "[crane]")]
        assert ("_" in wrong.observation, wrong.done) == (True, False)
        assert (right.reward, right.done, right.info["rewards"]) == (1.0, True, {"game_reward": 1.0})

    async def test_a_fault_of_theirs_is_raised(self) -> None:
        environment = made("verifiers:vf_sums")
        with pytest.raises(ValueError, match="has 5 tasks, none with idx 7"):
            await environment.reset(idx=7)

    def test_rows_of_its_tasks(self) -> None:
        from troupe.environments.adapters.verifiers import task_rows

        rows = task_rows("vf_sums?largest=2", 10)
        assert rows == [
            {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n}+{n}="}], "idx": n}
            for n in range(2)
        ]

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("no-such-taskset", "taskset 'no-such-taskset' not found"),
            ("vf_sums?size=3", "Extra inputs are not permitted"),
            ("vf_sums?env=user-sim", "2 agents (assistant, user), of which a policy can be one"),
            ("vf_boxes", "rewards that need a container (grows)"),
        ],
    )
    def test_what_cannot_be_used_is_told_before_any_work(self, spec: str, told: str) -> None:
        with pytest.raises(WorldError) as caught:
            made(f"verifiers:{spec}")
        assert told in str(caught.value)


@pytest.mark.parametrize("name", ["gymnasium", "textarena", "openenv", "verifiers"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(WorldError) as caught:
        load_world(EnvironmentConfig(factory=f"{name}:Some-v1"))
    assert f'"{name}:Some-v1" needs a package' in str(caught.value)
    assert "pip install" in str(caught.value)


def test_an_older_version_is_refused() -> None:
    check_version("pytest", (8, 3))
    with pytest.raises(WorldError, match=r"pytest is installed as .* need 99\.1 or later"):
        check_version("pytest", (99, 1))


def test_files_that_options_name_are_found_from_everywhere(tmp_path: Path) -> None:
    def anchored(spec: str) -> str:
        return str(anchored_environment({"factory": spec}, tmp_path / "a b")["factory"])

    spec = anchored("gymnasium:Lake-v1?size=4&wrapper=words.py:Words")
    assert spec == f"gymnasium:Lake-v1?size=4&wrapper={tmp_path}/a%20b/words.py:Words"
    assert read_options(spec.partition(":")[2], "gymnasium")[1]["wrapper"] == f"{tmp_path}/a b/words.py:Words"
    for plain in ("openenv:http://127.0.0.1:8000?action=said", "verifiers:gsm8k?split=train", "openenv:pack.age:Class"):
        assert anchored(plain) == plain
    assert anchored("openenv:count.py:Count") == f"openenv:{tmp_path}/a b/count.py:Count"
    assert anchored("count.py:Count") == f"{tmp_path}/a b/count.py:Count"
