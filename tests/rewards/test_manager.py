"""RewardManager: scores combined, faults as missing scores and incidents, broken contracts as errors."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import anyio
import msgspec
import pytest

from tests.rewards.scoring import no_sleep
from tests.support.fakes import make_rollout
from troupe.errors import RewardError
from troupe.messages import Incident, Prompt, RolloutGroup, Slot
from troupe.rewards import RewardActor, RewardManager, RewardSample, RewardsConfig, exact_answer_reward

pytestmark = pytest.mark.anyio


manager = functools.partial(RewardManager, sleep=no_sleep)


def lengths(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


async def firsts(completions: list[str], **columns: Any) -> list[float | None]:
    return [10.0 if c.startswith("a") else None for c in completions]


async def nothing(completions: list[str]) -> list[None]:
    return [None] * len(completions)


class Judge(RewardActor):
    """Scores by a function of the sample and notes what happens to it."""

    def __init__(self, answer: Callable[[RewardSample], Any] = lambda sample: sample.index) -> None:
        self.answer = answer
        self.events: list[str] = []
        self.at_once = self.most_at_once = 0
        self.samples: list[RewardSample] = []

    async def start(self) -> None:
        self.events.append("start")

    async def score(self, sample: RewardSample) -> float | None:
        self.samples.append(sample)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await anyio.lowlevel.checkpoint()
            result: float | None = self.answer(sample)
            return result
        finally:
            self.at_once -= 1

    async def stop(self) -> None:
        self.events.append("stop")


async def test_weighted_sums_over_the_scores_that_are_there() -> None:
    rewards = manager([lengths, firsts], weights=[1.0, 0.5])
    result = await rewards.compute_rewards(["p"] * 2, ["ab", "xyz"])
    assert result.scores == {"lengths": (2.0, 3.0), "firsts": (10.0, None)}
    assert result.rewards == (7.0, 3.0)
    assert result.incidents == ()


async def test_a_sample_without_any_score_has_no_reward() -> None:
    result = await manager(nothing).compute_rewards(["p"] * 2, ["a", "b"])
    assert result.rewards == (None, None)
    assert (await manager([firsts, nothing]).compute_rewards(["p"] * 2, ["a", "b"])).rewards == (10.0, None)


async def test_columns_and_ids_reach_the_functions() -> None:
    seen: dict[str, Any] = {}

    def look(**everything: Any) -> list[float]:
        seen.update(everything)
        everything["log_metric"]("seen", 2.0)
        everything["log_extra"]("mark", ["x", "y"])
        return [0, 1]

    result = await manager([look, exact_answer_reward]).compute_rewards(
        ["p", "q"], ["a", "b"], completion_ids=[(1,), (2, 3)], answer=["a", "c"]
    )
    assert {key: seen[key] for key in ("prompts", "completions", "completion_ids", "answer", "trainer_state")} == {
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "completion_ids": [[1], [2, 3]],
        "answer": ["a", "c"],
        "trainer_state": None,
    }
    assert result.scores["exact_answer_reward"] == (1.0, 0.0)
    assert (result.metrics, result.extra) == ({"seen": 2.0}, {"mark": ("x", "y")})


def group(prompt: Any, **columns: Any) -> RolloutGroup:
    slot = Slot(step=0, place=0)
    asked = Prompt(gid=9, slot=slot, epoch=0, row=0, prompt=prompt, prompt_ids=(1,), columns=columns)
    return RolloutGroup(prompt=asked, rollouts=(make_rollout((5, 6), text="yes"), make_rollout((7,), text="no")))


async def test_groups_are_scored_as_trl_would() -> None:
    calls: list[dict[str, Any]] = []

    def look(prompts: Any, completions: Any, completion_ids: Any, gid: Any, trainer_state: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, "gid": gid})
        assert trainer_state == "state"
        return [1, 2]

    talk = [{"role": "user", "content": "q"}]
    rewards = manager(look)
    await rewards.score_group(group("q", gid="a column"), trainer_state="state")
    await rewards.score_group(group(talk, gid=None), trainer_state="state")
    ids = [[5, 6], [7]]
    assert calls == [
        {"prompts": ["q", "q"], "completions": ["yes", "no"], "ids": ids, "gid": ["a column"] * 2},
        {
            "prompts": [talk, talk],
            "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no")],
            "ids": ids,
            "gid": [None] * 2,
        },
    ]


async def test_hanging_and_raising_rewards_are_missing_and_named_and_the_others_scores_are_kept() -> None:
    calls: list[str] = []

    class Hangs(RewardActor):
        timeout_s = 0.01

        async def score(self, sample: RewardSample) -> float | None:
            calls.append("hangs")
            await anyio.sleep_forever()
            raise AssertionError

    def raises(completions: list[str]) -> list[float]:
        calls.append("raises")
        raise BaseExceptionGroup("many", [ValueError("x"), SystemExit()])

    async with manager([Hangs(), raises, lengths]) as rewards:
        result = await rewards.compute_rewards(["p"] * 2, ["a", "bb"])
    assert result.scores == {"Hangs": (None, None), "raises": (None, None), "lengths": (1.0, 2.0)}
    assert result.rewards == (None, None)
    assert result.faulted == (0, 1)
    assert [(i.actor, i.kind, i.gid) for i in result.incidents] == [
        ("scorer", "reward_timeout", None),
        ("scorer", "reward_error", None),
    ]
    assert result.incidents[0].message == "reward Hangs: samples 0, 1 of 2: no answer within 0.01 s"
    assert "BaseExceptionGroup" in result.incidents[1].message
    assert sorted(calls) == ["hangs"] * 4 + ["raises"] * 2


async def test_a_hanging_function_blocks_nobody_and_is_missing_for_the_whole_group() -> None:
    calls, release = [], threading.Event()

    async def hangs(completions: list[str]) -> list[float]:
        calls.append(1)
        await anyio.sleep_forever()
        raise AssertionError

    def blocks(completions: list[str]) -> list[float]:
        release.wait()
        return [1.0]

    config = RewardsConfig(timeout_s=0.01, retries=1)
    result = await manager([hangs, blocks], config=config).compute_rewards(["p"] * 2, ["a", "b"])
    release.set()
    assert result.scores == {"hangs": (None, None), "blocks": (None, None)}
    assert [incident.kind for incident in result.incidents] == ["reward_timeout"] * 2
    assert result.incidents[0].message == "reward hangs: no answer within 0.01 s"
    assert len(calls) == 2


async def test_a_retry_may_succeed_without_an_incident() -> None:
    outcomes = [OSError("busy")]

    async def flaky(completions: list[str]) -> list[float]:
        if outcomes:
            raise outcomes.pop()
        return [5.0]

    result = await manager(flaky).compute_rewards(["p"], ["a"])
    assert (result.rewards, result.incidents) == ((5.0,), ())


async def test_what_float32_cannot_hold_is_missing_for_its_sample_only() -> None:
    def odd(completions: list[str]) -> list[float]:
        return [-1e18, math.nan, -math.inf, 1e300]

    result = await manager([odd], weights=[2]).compute_rewards(["p"] * 4, ["a", "b", "c", "d"])
    assert result.scores == {"odd": (-1e18, None, None, None)}
    assert result.rewards == (-2e18, None, None, None)
    (incident,) = result.incidents
    assert incident.kind == "reward_nonfinite"
    assert incident.message == (
        "reward odd: returned nan for sample 1, -inf for sample 2, 1e+300 for sample 3; "
        "scores must be finite, 1e+18 at most"
    )


@pytest.mark.parametrize("result", [[1.0], "ab", None, ["1", "2"]])
async def test_a_broken_contract_ends_everything_at_once(result: Any) -> None:
    calls = []

    def broken(completions: list[str]) -> Any:
        calls.append(1)
        return result

    async def hangs(completions: list[str]) -> list[float]:
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(RewardError, match="reward broken returned"):
        await manager([hangs, broken]).compute_rewards(["p"] * 2, ["a", "b"])
    assert calls == [1]


async def test_errors_that_are_not_the_rewards_come_through() -> None:
    async def ends(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    async def leaves(completions: list[str]) -> list[float]:
        raise GeneratorExit

    with pytest.raises(KeyboardInterrupt):
        await manager(ends).compute_rewards(["p"], ["a"])
    result = await manager(leaves).compute_rewards(["p"], ["a"])
    assert "RuntimeError: the called code raised GeneratorExit" in result.incidents[0].message


async def test_cancelling_leaves_no_result_and_cancels_the_rewards() -> None:
    cancelled = []

    async def hangs(completions: list[str]) -> list[float]:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)
        raise AssertionError

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(manager([hangs, lengths]).compute_rewards, ["p"], ["a"])
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert cancelled == [True]


async def test_missing_columns_are_seen_before_sampling_and_at_the_call() -> None:
    rewards = manager([lengths, exact_answer_reward])
    with pytest.raises(RewardError, match="requires answer"):
        rewards.check_columns({"hint"})
    rewards.check_columns({"answer"})
    with pytest.raises(RewardError, match="requires answer"):
        await rewards.compute_rewards(["p"], ["a"], hint=["x"])


async def test_lists_of_different_lengths_are_refused() -> None:
    unequal: list[dict[str, Any]] = [
        {"prompts": ["p"] * 2},
        {"prompts": ["p"], "answer": []},
        {"prompts": ["p"], "completion_ids": []},
    ]
    for arguments in unequal:
        with pytest.raises(RewardError, match="for 1 completions; give one for each"):
            await manager(lengths).compute_rewards(completions=["a"], **arguments)


async def test_only_so_many_groups_are_scored_at_once() -> None:
    inside, most, go = 0, 0, anyio.Event()

    async def count(completions: list[str]) -> list[float]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await go.wait()
        inside -= 1
        return [1.0]

    rewards = manager(count, config=RewardsConfig(concurrency=2))
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(rewards.compute_rewards, ["p"], ["a"])
        await anyio.wait_all_tasks_blocked()
        assert inside == 2
        go.set()
    assert most == 2


def test_equal_names_get_suffixes_that_are_free() -> None:
    def named(name: str) -> Callable[..., list[float]]:
        def reward(completions: list[str]) -> list[float]:
            return []

        reward.__name__ = name
        return reward

    assert manager([named(n) for n in ("a", "a", "a_2", "a", "b")]).names == ("a", "a_3", "a_2", "a_4", "b")


def test_weights() -> None:
    assert manager([lengths, firsts]).weights == (1.0, 1.0)
    config = RewardsConfig(weights=(2.0, 0.0))
    assert manager([lengths, firsts], config=config).weights == (2.0, 0.0)
    assert manager([lengths, firsts], [3, 4], config).weights == (3.0, 4.0)
    with pytest.raises(RewardError, match=r"has 1 numbers for 2 rewards \(lengths, firsts\)"):
        manager([lengths, firsts], [1.0])
    with pytest.raises(RewardError, match="nan for reward firsts"):
        manager([lengths, firsts], [1.0, math.nan])
    with pytest.raises(RewardError, match="there is no reward"):
        manager([])
    with pytest.raises(RewardError, match="cannot be called"):
        manager([3])  # type: ignore[list-item]


async def test_what_a_reward_changes_reaches_neither_dataset_nor_other_rewards() -> None:
    def meddles(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], tags: list[Any]
    ) -> list[float]:
        prompts[0].append("changed")
        completions[0][0]["content"] = "changed"
        completion_ids[0].clear()
        tags[0]["seen"].append(1)
        return [0.0] * len(completions)

    class Meddler(RewardActor):
        async def score(self, sample: RewardSample) -> float | None:
            sample.columns["tags"]["seen"].append(2)
            assert isinstance(sample.prompt, list)
            sample.prompt.clear()
            return 0.0

    kept: dict[str, Any] = {}

    async def looks(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], tags: list[Any]
    ) -> list[float]:
        kept.update(prompts=prompts, completions=completions, completion_ids=completion_ids, tags=tags)
        return [0.0] * len(completions)

    row = {"prompt": [{"role": "user", "content": "p"}], "tags": {"seen": []}}
    async with manager([meddles, Meddler(), looks]) as rewards:
        for _ in range(2):
            await rewards.score_group(group(row["prompt"], tags=row["tags"]))
    assert row == {"prompt": [{"role": "user", "content": "p"}], "tags": {"seen": []}}
    assert kept == {
        "prompts": [row["prompt"]] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in ("yes", "no")],
        "completion_ids": [[5, 6], [7]],
        "tags": [row["tags"]] * 2,
    }


async def test_actors_score_sample_by_sample_within_their_own_limits() -> None:
    class Two(Judge):
        name, concurrency, timeout_s, retries = "two", 2, 30.0, 2

    judge = Two()
    async with manager([judge, lengths]) as rewards:
        result = await rewards.compute_rewards(
            ["p"] * 5, ["a", "b", "c", "d", "e"], completion_ids=[[i] for i in range(5)], answer=list("vwxyz")
        )
    assert result.scores["two"] == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert result.rewards == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert judge.most_at_once == 2
    assert judge.events == ["start", "stop"]
    assert sorted(judge.samples, key=lambda s: s.index)[3] == RewardSample(
        prompt="p", completion="d", completion_ids=(3,), columns={"answer": "y"}, gid=None, index=3
    )


async def test_an_actors_faults_are_summed_by_kind() -> None:
    def answer(sample: RewardSample) -> float | None:
        if sample.index in (1, 3):
            raise ValueError(f"no {sample.index}")
        return {0: math.nan, 2: None}.get(sample.index, 1.0)

    judge = Judge(answer)
    async with manager(judge) as rewards:
        result = await rewards.compute_rewards(["p"] * 5, ["a"] * 5)
    assert result.scores == {"Judge": (None, None, None, None, 1.0)}
    assert [incident.kind for incident in result.incidents] == ["reward_error", "reward_nonfinite"]
    assert result.incidents[0].message.startswith("reward Judge: samples 1, 3 of 5: ValueError: no 1 (")
    assert sum(sample.index == 1 for sample in judge.samples) == 2
    assert judge.samples[0].completion_ids == ()


async def test_a_score_that_raises_when_it_is_read_is_a_fault() -> None:
    class Unreadable:
        def __float__(self) -> float:
            raise RuntimeError("away")

    async with manager(Judge(lambda sample: Unreadable())) as rewards:
        result = await rewards.compute_rewards(["p"], ["a"])
    assert [incident.kind for incident in result.incidents] == ["reward_error"]


async def test_an_actor_that_breaks_the_contract_ends_everything() -> None:
    async with manager(Judge(lambda sample: "good")) as rewards:
        with pytest.raises(RewardError, match="reward Judge returned 'good'"):
            await rewards.compute_rewards(["p"] * 2, ["a"] * 2)


@pytest.mark.parametrize(
    ("key", "value"), [("concurrency", 0), ("timeout_s", 0.0), ("retries", -1), ("retries", "two")]
)
def test_an_actors_own_limits_have_bounds(key: str, value: object) -> None:
    judge = Judge()
    setattr(judge, key, value)
    with pytest.raises(RewardError, match=f"reward Judge: .*{key}"):
        manager(judge)


async def test_a_reward_that_does_not_start_stops_those_that_had() -> None:
    class Broken(Judge):
        async def start(self) -> None:
            await super().start()
            raise OSError("no connection")

    first, broken, never = Judge(), Broken(), Judge()
    with pytest.raises(RewardError, match="reward Broken did not start: OSError: no connection"):
        await manager([first, broken, never]).start()
    assert (first.events, broken.events, never.events) == (["start", "stop"], ["start", "stop"], [])


@pytest.mark.parametrize("fault", [asyncio.CancelledError(), SystemExit(2)])
async def test_a_start_that_ends_by_itself_is_a_fault_and_no_cancellation(fault: BaseException) -> None:
    class Broken(Judge):
        async def start(self) -> None:
            raise fault

    with pytest.raises(RewardError, match=f"reward Broken did not start: {type(fault).__name__}"):
        await manager(Broken()).start()


async def test_a_cancelled_start_stops_what_had_started() -> None:
    class Slow(Judge):
        async def start(self) -> None:
            await anyio.sleep_forever()

    first = Judge()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager([first, Slow()]).start)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert first.events == ["start", "stop"]


async def test_stopping_goes_on_past_faults_and_cancellation() -> None:
    class Broken(Judge):
        async def stop(self) -> None:
            raise OSError("gone")

    class Hangs(Judge):
        timeout_s = 0.01

        async def stop(self) -> None:
            await anyio.sleep_forever()

    first = Judge()
    rewards = manager([first, Broken(), Hangs()])
    await rewards.start()
    with anyio.CancelScope() as scope:
        scope.cancel()
        incidents = await rewards.stop()
    assert first.events == ["start", "stop"]
    assert [(i.kind, i.message.split("(")[0].strip()) for i in incidents] == [
        ("reward_timeout", "reward Hangs: did not stop: no answer within 0.01 s"),
        ("reward_error", "reward Broken: did not stop: OSError: gone"),
    ]
    assert await rewards.stop() == ()


async def test_an_actor_that_opens_nothing_needs_no_start_and_stop_of_its_own() -> None:
    class Simple(RewardActor):
        async def score(self, sample: RewardSample) -> float | None:
            return 2.0

    async with manager(Simple()) as rewards:
        assert (await rewards.compute_rewards(["p"], ["a"])).rewards == (2.0,)


def test_the_config_refuses_unknown_keys_and_bounds() -> None:
    assert msgspec.convert({"functions": ["length"], "weights": [1]}, RewardsConfig).weights == (1.0,)
    wrong: list[dict[str, Any]] = [{"timeout_s": 0}, {"retries": -1}, {"concurrency": 0}, {"min_scored": 0}, {"f": []}]
    for bad in wrong:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, RewardsConfig)


async def test_what_is_waited_for_and_faults_outside_of_a_run_as_they_happen() -> None:
    """The first group is given up, and told of, while the second is still tried."""
    told: list[Incident] = []
    given_up = anyio.Event()

    async def odd(prompts: list[str], **columns: Any) -> list[float]:
        if prompts[0] == "one":
            raise OSError("no one")
        await given_up.wait()
        return [1.0, 1.0]

    def tell(incident: Incident) -> None:
        told.append(incident)
        wait = scorers.waits["odd"]
        assert (wait.tries, wait.why, wait.for_s >= 0) == (3, "OSError: no one", True)
        given_up.set()

    scorers = manager([lengths, odd], config=RewardsConfig(retries=2))
    assert scorers.waits == {}
    results = await scorers.score_groups([group("one"), group("two")], tell=tell)
    assert [result.scores["odd"] for result in results] == [(None, None), (1.0, 1.0)]
    assert list(results[0].incidents) == told
    assert [(incident.kind, incident.gid) for incident in told] == [("reward_error", 9)]
    assert scorers.waits == {}, "nobody waits any more"
