"""Advantages by hand, and where exactness beats rounding. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troupe.grpo.advantages import compute_advantages, reward_statistics
from troupe.grpo.config import Aggregation, ScaleRewards


def test_a_group_by_hand() -> None:
    # mean 2, standard deviation with ddof 1: √((1 + 1) / 2) = 1
    advantages = compute_advantages(mx.array([1.0, 2.0, 3.0]), 3)
    np.testing.assert_allclose(np.array(advantages), [-1 / 1.0001, 0, 1 / 1.0001], rtol=1e-6)


def test_the_batch_scale_divides_every_group_by_one_deviation() -> None:
    rewards = mx.array([0.0, 2.0, 4.0, 10.0])
    sigma = np.std([0, 2, 4, 10], ddof=1) + 1e-4
    advantages = compute_advantages(rewards, 2, "batch")
    np.testing.assert_allclose(np.array(advantages), np.array([-1, 1, -3, 3]) / sigma, rtol=1e-6)
    assert compute_advantages(rewards, 2, "none").tolist() == [-1.0, 1.0, -3.0, 3.0]


def test_weights_and_missing_scores() -> None:
    nan = math.nan
    table = mx.array([[1.0, 4.0], [nan, 2.0], [nan, nan], [3.0, nan]])
    # weighted sums: 1·2 + 4·0.5 = 4, 1, missing, 6
    advantages = compute_advantages(table, 4, "none", weights=[2.0, 0.5])
    np.testing.assert_allclose(np.array(advantages), [4 - 11 / 3, 1 - 11 / 3, 0, 6 - 11 / 3], rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@settings(max_examples=40, deadline=None)  # the first call compiles kernels
@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9))
def test_equal_rewards_give_exactly_nothing(
    scale: ScaleRewards, aggregation: Aggregation, reward: float, generations: int
) -> None:
    rewards = mx.full((2 * generations, 2), reward)
    advantages = compute_advantages(rewards, generations, scale, multi_objective_aggregation=aggregation)
    assert advantages.tolist() == [0.0] * (2 * generations)


AWKWARD = st.floats(allow_nan=False, width=32)
"""Any float32: subnormal, near overflow, infinite, −0."""


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(AWKWARD | st.just(math.nan), min_size=3, max_size=3),
    st.lists(st.floats(-100, 100, width=32) | st.just(math.nan), min_size=15, max_size=15),
    st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3),
)
def test_a_constant_group_gets_exactly_nothing_beside_any_other(
    scale: ScaleRewards, aggregation: Aggregation, constant: list[float], others: list[float], weights: list[float]
) -> None:
    table = np.vstack(
        [np.tile(np.array(constant, dtype=np.float32), (5, 1)), np.array(others, dtype=np.float32).reshape(5, 3)]
    )
    advantages = compute_advantages(mx.array(table), 5, scale, weights=weights, multi_objective_aggregation=aggregation)
    assert advantages[:5].tolist() == [0.0] * 5
    assert np.isfinite(np.array(advantages)).all()


def test_three_times_nine_tenths_beside_another_group() -> None:
    rewards = mx.array([0.9, 0.9, 0.9, 0.0, 1.0, 0.0])
    scales: list[ScaleRewards] = ["group", "batch", "none"]
    for scale in scales:
        assert np.array(compute_advantages(rewards, 3, scale))[:3].tolist() == [0.0, 0.0, 0.0]


def test_statistics_by_hand() -> None:
    table = mx.array([[1.0, 0.5], [3.0, math.nan], [2.0, 0.5], [2.0, 0.5]])
    statistics = reward_statistics(table, 2, weights=[1.0, 2.0], names=["right", "short"])
    assert statistics["rewards/right/mean"] == 2.0
    assert statistics["rewards/right/std"] == pytest.approx(math.sqrt(2 / 3))
    assert statistics["rewards/short/mean"] == 0.5
    assert statistics["rewards/short/std"] == 0.0
    assert statistics["reward"] == pytest.approx((2 + 3 + 3 + 3) / 4)
    assert statistics["reward_std"] == pytest.approx(0.5)
    assert statistics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize(
    ("rewards", "generations", "weights", "names", "message"),
    [
        (mx.zeros((3,)), 2, None, None, "3 rewards do not make groups of num_generations = 2"),
        (mx.zeros((3,)), 0, None, None, "num_generations = 0"),
        (mx.zeros((0,)), 1, None, None, r"shape \(0,\)"),
        (mx.zeros((2, 1, 1)), 1, None, None, r"shape \(2, 1, 1\)"),
        (mx.zeros((2, 3)), 2, [1.0], None, "1 weights for 3 reward functions"),
        (mx.zeros((2, 3)), 2, None, ["a"], "1 names for 3 reward functions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    rewards: mx.array, generations: int, weights: list[float] | None, names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reward_statistics(rewards, generations, weights=weights, names=names)
