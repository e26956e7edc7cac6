"""Rewards of one's own: every way to write one, and everything that they may do wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import mlx.core as mx
import numpy as np
import pytest

from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.runs import (
    STORED,
    column,
    completions,
    done,
    incidents,
    lines,
    names_in,
    policy_of,
    refused,
    summary,
    train,
)
from troupe import RewardActor, RewardSample, Supervisor
from troupe.policy import load_policy

TRAIN = ("train", "-m", "m", "-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--max-steps", "2")
SHORT = ("--set", "generation.max_completion_length=8", "--lr", "0.01")


async def in_the_loop(completion_ids: list[list[int]], **_: Any) -> list[float]:
    await anyio.lowlevel.checkpoint()
    return weigh_ids(completion_ids)


class Judge(RewardActor):
    """Has a life of its own."""

    def __init__(self) -> None:
        self.lived: list[str] = []

    async def start(self) -> None:
        self.lived.append("start")

    async def score(self, sample: RewardSample) -> float:
        self.lived.append("score")
        return sum(sample.completion_ids) % 13 / 13

    async def stop(self) -> None:
        self.lived.append("stop")


class Scale:
    """An object that can be called."""

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> tuple[float, ...]:
        return tuple(weigh_ids(completion_ids))


def as_array(completion_ids: list[list[int]], **_: Any) -> Any:
    return np.array(weigh_ids(completion_ids))


def as_mlx(completion_ids: list[list[int]], **_: Any) -> Any:
    return mx.array([sum(ids) % 13 for ids in completion_ids]) / 13


@pytest.mark.parametrize("reward", [in_the_loop, Judge(), Scale(), as_array], ids=["async", "actor", "object", "numpy"])
def test_however_a_reward_is_written_the_policy_is_the_same(
    tmp_path: Path, ragged_model: Path, plain: Path, reward: Any
) -> None:
    result = train(ragged_model, tmp_path, reward)
    assert same_bits(policy_of(result.folder), policy_of(plain))
    assert result.incidents == {}


def test_scores_may_be_mlx_arrays(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    result = train(ragged_model, tmp_path, as_mlx)
    assert column(result.folder, "reward")[0] == pytest.approx(column(plain, "reward")[0], abs=1e-6)


def test_a_judge_is_started_once_before_and_stopped_once_after_all_its_scores(
    tmp_path: Path, ragged_model: Path
) -> None:
    judge = Judge()
    train(ragged_model, tmp_path, judge)
    assert judge.lived == ["start", *["score"] * 24, "stop"]


def test_a_reward_that_returns_nan_for_one_completion_does_not_stop_the_run(tmp_path: Path, ragged_model: Path) -> None:
    def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [math.nan, *weigh_ids(completion_ids[1:-1]), math.inf] if len(completion_ids) > 2 else []

    result = train(ragged_model, tmp_path, sometimes, generation__num_generations=4)
    assert result.complete
    assert result.closed_groups == {"trained": 8}
    assert [c.scores["sometimes"] is None for c in completions(result.folder, gid=0)] == [True, False, False, True]
    assert [c.advantage == 0.0 for c in completions(result.folder, gid=0)] == [True, False, False, True]
    assert all(math.isfinite(loss) for loss in column(result.folder, "loss"))
    assert not same_bits(policy_of(result.folder), load_policy(ragged_model).weights)


def test_completions_that_a_reward_has_nothing_to_say_about_are_left_out_of_its_mean(
    tmp_path: Path, ragged_model: Path
) -> None:
    def picky(completions: list[str], **_: Any) -> list[float | None]:
        return [None, 1.0, 3.0]

    result = train(ragged_model, tmp_path, picky)
    assert column(result.folder, "rewards/picky/mean") == [2.0] * 4
    assert result.incidents == {}, "None is an answer, not a fault"
    first = completions(result.folder, gid=0)
    assert [c.reward for c in first] == [None, 1.0, 3.0]
    assert first[1].advantage == pytest.approx(-math.sqrt(0.5), abs=1e-3)


def test_a_group_with_a_single_score_is_set_aside_and_told_and_the_others_are_trained(
    tmp_path: Path, ragged_model: Path
) -> None:
    def mostly_none(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float | None]:
        return [1.0, None, None] if prompts[0] == "ab" else weigh_ids(completion_ids)  # type: ignore[return-value]

    result = train(ragged_model, tmp_path, mostly_none, learner__max_steps=5)
    stored = completions(result.folder)
    assert {c.state for c in stored if c.prompt == "ab"} == {"quarantined"}
    assert {c.state for c in stored if c.prompt != "ab"} == {"trained"}
    assert {c.advantage for c in stored if c.prompt == "ab"} == {None}
    assert result.closed_groups == {"quarantined": 4, "trained": 6}, "two rows of five begin with these two letters"


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        (True, "reward_error", "ValueError: cannot parse this one"),
        pytest.param(False, "reward_timeout", "", marks=pytest.mark.slow),
    ],
    ids=["raises", "hangs"],
)
def test_a_reward_that_fails_once_costs_one_group_and_says_why(
    tmp_path: Path, ragged_model: Path, fails: bool, kind: str, said: str
) -> None:
    calls: list[int] = []

    async def shaky(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3 and fails:
            raise ValueError("cannot parse this one")
        if len(calls) == 3:
            await anyio.Event().wait()
        return weigh_ids(completion_ids)

    result = train(ragged_model, tmp_path, shaky, rewards__timeout_s=2.0)
    assert result.complete
    assert result.closed_groups == {"trained": 7, "quarantined": 1}
    told = dict(incidents(result.folder))
    assert "shaky" in told[kind]
    assert said in told[kind]
    assert result.incidents == dict.fromkeys(told, 1)


def test_a_second_try_that_works_leaves_no_gap(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    calls: list[int] = []

    def fails_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("not yet")
        return weigh_ids(completion_ids)

    result = train(ragged_model, tmp_path, fails_first, rewards__retries=1)
    assert result.incidents == {}
    assert same_bits(policy_of(result.folder), policy_of(plain))


def test_a_missing_score_does_not_stop_the_other_reward_from_counting(tmp_path: Path, ragged_model: Path) -> None:
    def silent(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    result = train(ragged_model, tmp_path, weigh_ids, silent)
    assert result.closed_groups == {"trained": 8}
    assert all(c.reward == c.scores["weigh_ids"] for c in completions(result.folder))
    assert all(value is None or math.isnan(value) for value in column(result.folder, "rewards/silent/mean"))


def test_weights_are_what_the_reward_is_summed_with(tmp_path: Path, ragged_model: Path) -> None:
    def size(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    result = train(ragged_model, tmp_path, weigh_ids, size, rewards__weights=[2.0, -0.5])
    for c in completions(result.folder):
        assert c.scores["size"] == len(c.token_ids)
        assert c.reward == pytest.approx(2.0 * c.scores["weigh_ids"] - 0.5 * c.scores["size"])  # type: ignore[operator]
    for line in lines(result.folder):
        expected = 2.0 * line["rewards/weigh_ids/mean"] - 0.5 * line["rewards/size/mean"]
        assert line["reward"] == pytest.approx(expected, rel=1e-5)


def test_a_reward_of_weight_0_is_watched_and_teaches_nothing(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    def watched(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    result = train(ragged_model, tmp_path, weigh_ids, watched, rewards__weights=[1.0, 0.0])
    assert same_bits(policy_of(result.folder), policy_of(plain))
    assert all(value > 0 for value in column(result.folder, "rewards/watched/mean"))


def test_a_reward_that_gives_everybody_the_same_teaches_nothing(tmp_path: Path, ragged_model: Path) -> None:
    def ones(completions: list[str], **_: Any) -> list[float]:
        return [0.1] * len(completions)

    result = train(ragged_model, tmp_path, ones)
    assert same_bits(policy_of(result.folder), load_policy(ragged_model).weights)
    assert column(result.folder, "frac_reward_zero_std") == [1.0] * 4
    assert column(result.folder, "reward_std") == [0.0] * 4


def test_two_rewards_of_one_name_are_told_apart(tmp_path: Path, ragged_model: Path) -> None:
    def make(value: float) -> Callable[..., list[float]]:
        def score(completions: list[str], **_: Any) -> list[float]:
            return [value * index for index in range(len(completions))]

        return score

    result = train(ragged_model, tmp_path, make(1.0), make(10.0))
    assert column(result.folder, "rewards/score/mean") == [1.0] * 4
    assert column(result.folder, "rewards/score_2/mean") == [10.0] * 4


def test_what_a_reward_logs_is_in_the_metrics_and_beside_each_completion(tmp_path: Path, ragged_model: Path) -> None:
    def talks(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("shouted", [text.upper() for text in completions])
        log_metric("letters", float(sum(map(len, completions))))
        return [float(len(text)) for text in completions]

    result = train(ragged_model, tmp_path, talks)
    stored = completions(result.folder)
    assert all(c.extra == {"shouted": c.text.upper()} for c in stored)
    for line in lines(result.folder):
        letters = sum(len(c.text) for c in stored if c.step == line["step"])
        assert line["letters"] == pytest.approx(letters / 2), "the mean over the two groups of the step"
    shown = done("inspect", result.folder, "--best", "1", "--step", "all")
    assert "shouted" in shown


def test_a_reward_may_look_at_how_far_training_is(tmp_path: Path, ragged_model: Path) -> None:
    seen: list[tuple[int, int]] = []

    def rising(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [trainer_state.global_step + score for score in weigh_ids(completion_ids)]

    result = train(ragged_model, tmp_path, rising)
    assert sorted(seen) == [(step, 4) for step in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [math.floor(value) for value in column(result.folder, "reward")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("code", "spec", "said"),
    [
        ("def f(completions)\n    return []\n", "r.py:f", "r.py:1"),
        ("import nothing_like_this\n\ndef f(completions): ...\n", "r.py:f", "nothing_like_this"),
        ("def score(completions, **_): ...\n", "r.py:scores", "did you mean score"),
        ("f = 3\n", "r.py:f", "cannot be called"),
        ("def f(): ...\n", "r.py:f", "completions"),
        ("", "lenght", "did you mean length"),
        ("", "format:([", "regular expression"),
        ("", "gone.py:f", "no such file"),
    ],
    ids=["syntax", "import", "name", "no function", "arguments", "built in", "pattern", "file"],
)
def test_reward_code_that_cannot_be_used_is_told_in_one_message_before_the_model_is_looked_for(
    desk: Path, code: str, spec: str, said: str
) -> None:
    (desk / "r.py").write_text(code)
    message = refused("train", "-m", "nowhere", "-d", "p.json", "-o", "out", "--reward", spec)
    assert said in message
    assert "nowhere" not in message
    assert names_in(desk) == {"m", "p.json", "r.py"}


def test_too_few_scores_end_the_run_with_the_rewards_name_and_leave_no_folder(desk: Path) -> None:
    (desk / "r.py").write_text("def short(completions, **_):\n    return [1.0]\n")
    message = refused(*TRAIN, *SHORT, "-o", "out", "--reward", "r.py:short")
    assert "reward short returned 1 scores for 3 completions" in message
    assert names_in(desk) == {"m", "p.json", "r.py"}


def test_too_few_scores_later_in_a_run_leave_what_was_learned(desk: Path) -> None:
    (desk / "r.py").write_text(
        "import pathlib, time\ncalls = []\n"
        "def late(completions, **_):\n    calls.append(1)\n"
        "    until_s = time.monotonic() + 60\n"
        "    while len(calls) == 6 and not list(pathlib.Path('out').glob('checkpoints/step-*/MANIFEST.json')):\n"
        "        assert time.monotonic() < until_s\n"
        "        time.sleep(0.005)\n"
        "    return [1.0] if len(calls) == 6 else [float(len(text)) for text in completions]\n"
    )
    train = (*TRAIN[:-1], "5", *SHORT, "-o", "out", "--set", "checkpoint.every=1")
    message = refused(*train, "--reward", "r.py:late")
    assert "reward late returned 1 scores for 3 completions" in message
    assert [line["step"] for line in lines("out")] == [1, 2]
    (desk / "r.py").write_text("def late(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    said = done("train", "-o", "out", "--resume")
    assert "going on after step" in said
    assert "5 of 5 steps" in said


def test_a_reward_file_beside_its_run_file_is_found_from_anywhere(desk: Path) -> None:
    folder = desk / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "near.py").write_text("SCALE = 3.0\n")
    (folder / "r.py").write_text(
        "from near import SCALE\n"
        "def scaled(completions, **_):\n    return [SCALE * len(text) for text in completions]\n"
    )
    (folder / "run.toml").write_text(
        'output = "out"\n[model]\npath = "../../m"\n[data]\npath = "../../p.json"\n'
        '[rewards]\nfunctions = ["r.py:scaled"]\n[learner]\nmax_steps = 1\nbatch_size = 2\n'
        "[generation]\nnum_generations = 2\nmax_completion_length = 6\n"
    )
    done("train", "deep/er/run.toml")
    assert (desk / "out").is_dir(), "runs land where one works"
    assert all(c.scores["scaled"] == 3.0 * len(c.text) for c in completions("out"))


def test_a_pattern_with_colons_and_a_built_in_work_together_from_the_command_line(desk: Path) -> None:
    rewards = ("--reward", r"format:.*[a-z: ].*", "--reward", "soft_overlong:8:4", "--reward", "repetition_penalty")
    done(*TRAIN, *SHORT, "-o", "out", *rewards)
    for c in completions("out"):
        assert c.scores["soft_overlong_punishment_reward"] == pytest.approx(-max(0, len(c.token_ids) - 4) / 4)
        assert c.scores["format_reward"] in (0.0, 1.0)
        assert -1.0 <= c.scores["repetition_penalty_reward"] <= 0.0  # type: ignore[operator]
    assert summary("out").complete


def test_held_out_rows_that_nobody_scores_are_told_as_such(desk: Path) -> None:
    (desk / "r.py").write_text(
        "def only_groups(completions, **_):\n"
        "    return [float(len(t)) for t in completions] if len(completions) > 1 else [None]\n"
    )
    flags = ("--reward", "r.py:only_groups", "--reward", "length", "--set", "data.eval_path=p.json")
    said = done(*TRAIN, *SHORT, "-o", "out", *flags)
    assert "held-out only_groups" not in said
    assert "held-out length_reward: " in said
    assert "nan" not in said
    assert summary("out").rewards_before.keys() == summary("out").rewards_after.keys() == {"length_reward"}


def test_functions_without_a_name_of_their_own_can_be_rewards_too(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    result = train(ragged_model, tmp_path, lambda completion_ids, **_: weigh_ids(completion_ids), partial(weigh_ids))
    assert result.closed_groups == {"trained": 8}
    assert {"rewards/<lambda>/mean", "rewards/weigh_ids/mean"} <= lines(result.folder)[0].keys()
    assert column(result.folder, "rewards/<lambda>/mean") == column(result.folder, "rewards/weigh_ids/mean")


@pytest.mark.anyio
async def test_a_judge_that_is_down_for_good_is_replaced_and_the_run_goes_on(
    tmp_path: Path, ragged_model: Path
) -> None:
    async def gone(completions: list[str], **_: Any) -> list[float]:
        raise ConnectionError("the judge is gone")

    (tmp_path / "r.py").write_text("def other(completions, **_):\n    return [float(len(t)) for t in completions]\n")
    settings = STORED | {"rewards__breaker_failures": 1, "rewards__breaker_max_wait_s": 0.01}
    async with Supervisor(tiny_config(ragged_model, tmp_path, **settings), [gone]) as run:
        with anyio.fail_after(60):
            while run.status().phase != "held":  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert "the judge is gone" in run.status().rewards_down["gone"]
        run.set("rewards.gone", f"{tmp_path / 'r.py'}:other")
        with anyio.fail_after(60):
            await run.wait()
    assert run.result.complete
    assert run.result.closed_groups == {"trained": 8}
    assert all(c.scores["gone"] == len(c.text) for c in completions(run.folder))
