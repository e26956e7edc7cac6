"""What rewards get of episodes: conversations, environments, and the reward that an environment gives itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from tests.rewards import process_rewards
from tests.rewards.scoring import no_sleep
from tests.support.episodes import acted, episode
from troupe.errors import RewardError
from troupe.messages import Episode, Prompt, RolloutGroup, Slot
from troupe.rewards import (
    EnvironmentView,
    RewardActor,
    RewardManager,
    RewardSample,
    RewardsConfig,
    batch_reward,
    default_reward,
    get_environment_reward,
)
from troupe.rewards.builtin import completion_text

pytestmark = pytest.mark.anyio
TALK = [{"role": "user", "content": "Play."}]
WON, LOST = episode((0, 2), (3, 5), reward=1.0), episode((0, 4), reward=0.0)
FAILED = episode((0, 1), failed="its process ended")


class Game:
    def __init__(self, moves: int) -> None:
        self.moves = moves


def group(*episodes: Episode, prompt: Any = TALK, place: int = 0, round_size: int = 1, **columns: Any) -> RolloutGroup:
    asked = Prompt(
        gid=7 + place,
        slot=Slot(step=0, place=place),
        epoch=0,
        row=0,
        prompt=prompt,
        prompt_ids=(1,),
        columns=columns,
        round_size=round_size,
    )
    return RolloutGroup(prompt=asked, rollouts=tuple(acted(4) for _ in episodes), episodes=episodes)


def manager(rewards: Any, live: Sequence[Any] | None = None, **settings: Any) -> RewardManager:
    return RewardManager(rewards, config=RewardsConfig(**settings), environments=lambda gid: live, sleep=no_sleep)


async def test_a_conversation_is_given_as_trl_gives_it_with_live_environments() -> None:
    seen: dict[str, Any] = {}
    games = [Game(3), Game(1)]

    def look(**everything: Any) -> list[float]:
        seen.update(everything)
        return [environment.moves for environment in everything["environments"]]

    opening = msgspec.structs.replace(LOST.opening, messages=({"role": "user", "content": "Play. Begin at 5."},))
    result = await manager(look, games).score_group(group(WON, msgspec.structs.replace(LOST, opening=opening)))
    assert result.scores == {"look": (3.0, 1.0)}
    assert seen["environments"][0] is games[0]
    assert seen["environment_rewards"] == [1.0, 0.0]
    assert seen["prompts"] == [TALK, [{"role": "user", "content": "Play. Begin at 5."}]]
    assert seen["completions"] == [
        [
            {"role": "assistant", "content": "turn 0"},
            {"role": "user", "content": "seen 0"},
            {"role": "assistant", "content": "turn 1"},
        ],
        [{"role": "assistant", "content": "turn 0"}],
    ]
    assert seen["completion_ids"] == [[10, 11, 12, 13]] * 2


async def test_a_text_stays_a_text_and_who_does_not_ask_gets_no_environment() -> None:
    def look(prompts: Any, completions: Any) -> list[float]:
        assert completions == ["", ""]
        assert prompts == ["Play.", "Play. Begin."]
        return [1.0, 2.0]

    opening = msgspec.structs.replace(LOST.opening, messages=({"role": "user", "content": "Play. Begin."},))
    begun = msgspec.structs.replace(LOST, opening=opening)
    result = await manager(look).score_group(group(WON, begun, prompt="Play."))
    assert result.scores == {"look": (1.0, 2.0)}


async def test_an_environment_that_is_gone_is_known_by_its_attributes_and_can_only_be_read() -> None:
    def moves(environments: Any, **columns: Any) -> list[float]:
        return [environment.moves for environment in environments]

    told = msgspec.structs.replace(LOST, attributes={"moves": 5})
    result = await manager(moves, [Game(2), None]).score_group(group(WON, told))
    assert result.scores == {"moves": (2.0, 5.0)}
    assert (await manager(moves).score_group(group(told))).scores == {"moves": (5.0,)}
    view = EnvironmentView("Game", {"moves": 5})
    with pytest.raises(AttributeError, match="'score' is none of them; there are: moves"):
        _ = view.score
    with pytest.raises(AttributeError, match="can only be read"):
        view.moves = 3
    incidents = (await manager(process_rewards.sets).score_group(group(told))).incidents
    assert ["can only be read" in incident.message for incident in incidents] == [True]


async def test_the_reward_of_an_environment_is_one_by_name() -> None:
    result = await manager("environment").score_group(group(WON, episode((0, 4)), LOST))
    assert list(result.scores.values()) == [(1.0, None, 0.0)]
    assert result.rewards == (1.0, None, 0.0)
    assert result.faulted == ()
    mixed = manager([get_environment_reward("Game", ["a", "b"]), get_environment_reward("Quiz", ["c"])])
    found = await mixed.score_group(group(WON, LOST, environment="c"))
    assert found.scores == {"Game": (None, None), "Quiz": (1.0, 0.0)}


async def test_failed_episodes_are_not_scored_and_spoil_nothing() -> None:
    asked: list[Any] = []

    class Judge(RewardActor):
        async def score(self, sample: RewardSample) -> float:
            asked.append((sample.index, sample.environment.moves, sample.completion[-1]))
            return float(sample.index)

    def look(completions: Any, environments: Any, log_extra: Any) -> list[float]:
        log_extra("moves", [environment.moves for environment in environments])
        return [len(completions)] * len(completions)

    games = [Game(3), Game(4), Game(5)]
    async with manager([look, Judge()], games) as rewards:
        result = await rewards.score_group(group(FAILED, WON, LOST))
    assert result.scores == {"look": (None, 2.0, 2.0), "Judge": (None, 1.0, 2.0)}
    assert (result.faulted, result.rewards) == ((0,), (None, 3.0, 4.0))
    assert result.extra == {"moves": (None, 4, 5)}
    assert result.incidents == (), "who failed has told of it"
    assert sorted(asked, key=str)[0] == (1, 4, {"role": "assistant", "content": "turn 1"})


async def test_a_group_whose_episodes_all_failed_is_missing_without_a_call() -> None:
    def never(completions: Any) -> list[float]:
        raise AssertionError

    result = await manager(never).score_group(group(FAILED, FAILED))
    assert result.scores == {"never": (None, None)}
    assert (result.faulted, result.incidents) == ((0, 1), ())


async def test_rounds_are_scored_without_what_failed() -> None:
    calls: list[int] = []

    @batch_reward
    def compare(completions: Any, environment_rewards: Any) -> list[float]:
        calls.append(len(completions))
        return list(environment_rewards)

    rewards = manager(compare)
    results = await rewards.score_groups(
        [group(FAILED, WON), group(FAILED, FAILED, place=1), group(LOST, WON, place=2)]
    )
    assert calls == [3]
    assert [result.scores["compare"] for result in results] == [(None, 1.0), (None, None), (0.0, 1.0)]
    assert [result.faulted for result in results] == [(0,), (0, 1), ()]


async def test_a_reward_in_a_process_gets_views_of_environments() -> None:
    told = [msgspec.structs.replace(one, attributes={"moves": moves}) for one, moves in ((WON, 2), (LOST, 3))]
    async with manager(process_rewards.moves, [Game(0)] * 3, run=["process"], processes=1) as rewards:
        result = await rewards.score_group(group(FAILED, *told))
    assert result.incidents == ()
    assert result.scores == {"moves": (None, 12.0, 3.0)}


def test_what_is_about_environments_is_refused_where_there_are_none() -> None:
    without = RewardManager("environment")
    with pytest.raises(
        RewardError, match=r"is about environments, and there are none; name one by environment.factory"
    ):
        without.check_columns({"answer"})
    with pytest.raises(RewardError, match=r"process_rewards\.py:[0-9]+: reward moves is about environments"):
        RewardManager(process_rewards.moves).check_columns(set())
    manager(["environment", process_rewards.moves]).check_columns({"answer"})
    with pytest.raises(RewardError, match="but the dataset's columns are: level; add the column"):
        manager("exact_answer").check_columns({"level"})


def test_an_environment_that_gives_rewards_is_the_default() -> None:
    assert default_reward({"answer"}, "rows.jsonl", environment_rewards=True) == "environment"
    assert default_reward({"answer"}, "rows.jsonl") == "exact_answer"


def test_the_last_answer_is_the_policys_own() -> None:
    said = [{"role": "assistant", "content": "4"}, {"role": "tool", "name": "add", "content": "5"}]
    assert completion_text(said) == "4"
    assert completion_text([{"role": "tool", "content": "5"}]) == "5"
    assert completion_text([]) == ""
