"""Figures of scored groups against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import make_prompt, make_rollout
from troupe.actors.learner.statistics import (
    advantage_statistics,
    advantages_of,
    group_statistics,
    has_signal,
    is_truncated,
    num_tokens,
    score_table,
)
from troupe.grpo import LearnerConfig
from troupe.messages import FinishReason, Rollout, RolloutGroup, ScoredGroup

WEIGHTS = {"a": 1.0, "b": 2.0}


def rollout(length: int, reason: FinishReason = "stop") -> Rollout:
    return make_rollout((7,) * length, reason=reason)


def group(
    rollouts: Sequence[Rollout],
    scores: dict[str, tuple[float | None, ...]],
    *,
    place: int = 0,
    logged: dict[str, float] | None = None,
) -> ScoredGroup:
    made = RolloutGroup(prompt=make_prompt(0, place), rollouts=tuple(rollouts))
    return ScoredGroup(group=made, scores=scores, logged=logged or {})


def scored(**scores: tuple[float | None, ...]) -> ScoredGroup:
    size = len(next(iter(scores.values())))
    return group([rollout(1)] * size, scores)


TWO = [
    group(
        [rollout(2), rollout(5, "length")],
        {"a": (1.0, 0.0), "b": (0.5, None)},
        logged={"tone": 1.0, "reward": 9.0},
    ),
    group([rollout(4), rollout(1, "repetition")], {"a": (2.0, 2.0), "b": (0.0, 0.0)}, place=1, logged={"tone": 4.0}),
]


def test_figures_of_two_groups() -> None:
    totals = [1 + 2 * 0.5, 0.0, 2.0, 2.0]
    mean = sum(totals) / 4
    expected = {
        "tone": 2.5,
        "reward": mean,
        "reward_std": math.sqrt(sum((x - mean) ** 2 for x in totals) / 3),
        "frac_reward_zero_std": 0.5,
        "rewards/a/mean": 1.25,
        "rewards/a/std": math.sqrt((0.25**2 + 1.25**2 + 0.75**2 + 0.75**2) / 3),
        "rewards/b/mean": 0.5 / 3,
        "rewards/b/std": math.sqrt(((1 / 3) ** 2 + 2 * (1 / 6) ** 2) / 2),
        "completions/mean_length": 3.0,
        "completions/min_length": 1.0,
        "completions/max_length": 5.0,
        "completions/clipped_ratio": 0.5,
        "completions/mean_terminated_length": 3.0,
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 4.0,
    }
    assert group_statistics(TWO, LearnerConfig(), WEIGHTS) == pytest.approx(expected, rel=1e-6)
    assert num_tokens(TWO) == 2 * 2 + 2 * 3 + 12  # each completion with its prompt, of 2 and of 3 tokens
    assert num_tokens([]) == 0


def test_missing_scores_are_no_numbers_and_columns_follow_the_names() -> None:
    table: list[list[float]] = score_table(TWO, ["b", "a"]).tolist()  # type: ignore[assignment]
    assert table[0] == [0.5, 1.0]
    assert math.isnan(table[1][0])
    assert table[2:] == [[0.0, 2.0], [0.0, 2.0]]


def test_advantages_are_of_weighted_rewards_in_each_group() -> None:
    half = 1.0 / (math.sqrt(2.0) + 1e-4)
    assert advantages_of(TWO, LearnerConfig(), WEIGHTS).tolist() == pytest.approx([half, -half, 0.0, 0.0])


@pytest.mark.parametrize(
    ("reason", "cut"), [("stop", False), ("length", True), ("repetition", True), ("aborted", True)]
)
def test_what_did_not_end_by_itself_is_truncated(reason: FinishReason, cut: bool) -> None:
    assert is_truncated(rollout(3, reason)) == cut


def test_figures_of_advantages() -> None:
    assert advantage_statistics(mx.array([1.0, -1.0, 0.0, 2.0])) == pytest.approx(
        {
            "advantages/mean": 0.5,
            "advantages/std": math.sqrt((0.5**2 + 1.5**2 + 0.5**2 + 1.5**2) / 3),
            "advantages/abs_mean": 1.0,
            "advantages/frac_zero": 0.25,
        }
    )
    assert advantage_statistics(mx.array([3.0]))["advantages/std"] == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    ("made", "signal"),
    [
        (scored(a=(1.0, 1.0, 1.0), b=(0.0, 0.0, 0.0)), False),
        (scored(a=(0.9, 0.9, 0.9), b=(0.1, 0.1, 0.1)), False),
        (scored(a=(1.0, 1.0, 0.0), b=(0.0, 0.0, 0.0)), True),
        (scored(a=(2.0, 0.0, 1.0), b=(0.0, 1.0, 0.5)), False),  # weighted, all are 2
        (scored(a=(2.0, 0.0, 1.0), b=(1.0, 0.0, 0.5)), True),
        (scored(a=(1.0, None, 1.0), b=(0.0, None, 0.0)), False),
        (scored(a=(1.0, None, 0.5), b=(0.0, None, 0.0)), True),
        (scored(a=(1.0, None, None), b=(0.0, None, None)), False),  # alone there is nothing to compare with
    ],
)
def test_signal_is_a_difference_of_weighted_rewards(made: ScoredGroup, signal: bool, scale: str) -> None:
    assert has_signal(made, LearnerConfig(scale_rewards=scale), WEIGHTS) == signal  # type: ignore[arg-type]


def test_rewards_normalized_one_by_one_may_cancel_out() -> None:
    config = LearnerConfig(multi_objective_aggregation="normalize_then_sum")
    even = {"a": 1.0, "b": 1.0}
    assert not has_signal(scored(a=(1.0, 0.0), b=(0.0, 1.0)), config, even)
    assert has_signal(scored(a=(1.0, 0.0), b=(0.0, 1.0)), config, WEIGHTS)
    assert has_signal(scored(a=(1.0, 0.0), b=(1.0, 0.0)), config, even)
    assert not has_signal(scored(a=(1.0, 1.0), b=(3.0, 3.0)), config, even)


@settings(max_examples=40, deadline=None)
@given(
    score=st.floats(-1e6, 1e6, width=32),
    size=st.integers(1, 9),
    other=st.floats(-1e3, 1e3, width=32),
)
def test_a_constant_group_never_has_a_signal(score: float, size: int, other: float) -> None:
    assert not has_signal(scored(a=(score,) * size, b=(other,) * size), LearnerConfig(), WEIGHTS)
