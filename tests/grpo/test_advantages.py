"""Advantages by hand and in float64, and where exactness beats rounding. TRL's figures are in test_trl_vectors.py."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troupe.grpo import compute_advantages, reward_statistics, spread_within_groups
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


G = 4
CHOICES = [(scale, "sum_then_normalize") for scale in ("group", "batch", "none")] + [("group", "normalize_then_sum")]
Table = list[list[float]]


def float64(table: Any) -> mx.array:
    return mx.array(table, dtype=mx.float64)


def oracle(table: Table, weights: list[float], scale: str, aggregation: str) -> np.ndarray:
    """TRL's formulas in float64, for whole tables whose groups differ."""
    scores = np.array(table).reshape(-1, G, len(weights))
    if aggregation == "normalize_then_sum":
        scores = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
        total = (scores * weights).sum(2).reshape(-1)
        return np.asarray((total - total.mean()) / (total.std(ddof=1) + 1e-4))
    total = (scores * weights).sum(2)
    centered = total - total.mean(1, keepdims=True)
    spread = total.std(ddof=1) if scale == "batch" else total.std(1, ddof=1, keepdims=True)
    return np.asarray(centered if scale == "none" else centered / (spread + 1e-4)).reshape(-1)


@pytest.mark.parametrize(("scale", "aggregation"), CHOICES)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, -1e8, 1e12])
def test_an_offset_changes_no_advantage(scale: ScaleRewards, aggregation: Aggregation, offset: float) -> None:
    dice = np.random.default_rng(3)
    steps = dice.permuted(np.tile(np.arange(G) / 4, (3, 2, 1)), axis=2)  # exact beside any of the offsets
    table = [[offset + a, 2 * offset + b] for first, second in steps for a, b in zip(first, second, strict=True)]
    weights = [1.0, 0.5]
    found = compute_advantages(
        float64(table), G, scale, weights=weights, multi_objective_aggregation=aggregation
    ).tolist()
    np.testing.assert_allclose(found, oracle(table, weights, scale, aggregation), rtol=2e-5, atol=1e-6)


def test_the_offset_of_one_group_leaves_the_bits_of_the_others() -> None:
    ordinary = [0.1, 0.7, 0.2, 0.4]
    alone = compute_advantages(float64(ordinary), G).tolist()
    both = compute_advantages(float64([*ordinary, 1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3]), G).tolist()
    assert both[:G] == alone  # type: ignore[index]
    np.testing.assert_allclose(both[G:], compute_advantages(mx.arange(4), G), rtol=1e-6)  # type: ignore[index]


def test_offsets_that_cancel_out_are_offsets_too() -> None:
    table = [[1e9 + i, 1e9 - i] for i in range(G)]
    found = compute_advantages(float64(table), G, "none", weights=[1.0, -1.0])
    assert found.tolist() == [-3.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize(("scale", "aggregation"), CHOICES)
def test_what_sums_of_equal_scores_leave_is_no_signal(scale: ScaleRewards, aggregation: Aggregation) -> None:
    table = float64([[0.1, 0.2], [0.2, 0.1], [0.3, 0.0], [0.1 + 0.2, 0.0]])
    if aggregation == "sum_then_normalize":
        assert compute_advantages(table, G, scale).tolist() == [0.0] * G
    noise = float64([1e8 + 1e-8 * i for i in range(G)])
    assert compute_advantages(noise, G, scale, multi_objective_aggregation=aggregation).tolist() == [0.0] * G


@pytest.mark.parametrize(("scale", "aggregation"), CHOICES)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, -1.0, 2.5, -20.3, math.nan]), min_size=16, max_size=16))
def test_ordinary_scores_have_the_bits_that_float32_gives_them(
    scale: ScaleRewards, aggregation: Aggregation, scores: list[float]
) -> None:
    table = [scores[i : i + 2] for i in range(0, 16, 2)]
    given: dict[str, Any] = {"weights": [1.0, 0.5], "multi_objective_aggregation": aggregation}
    wide, narrow = float64(table), mx.array(table)
    assert (
        compute_advantages(wide, G, scale, **given).tolist() == compute_advantages(narrow, G, scale, **given).tolist()
    )
    one, other = (reward_statistics(rewards, G, scale, **given) for rewards in (wide, narrow))
    np.testing.assert_array_equal(list(one.values()), list(other.values()))


def test_statistics_of_scores_with_an_offset() -> None:
    table = float64([1e8 + x for x in (0, 1, 2, 3, 5, 5, 5, 5)])
    found = reward_statistics(table, G)
    spread = np.std([0, 1, 2, 3, 5, 5, 5, 5], ddof=1)
    assert found["reward"] == pytest.approx(1e8, rel=1e-6)
    assert found["reward_std"] == pytest.approx(spread, rel=1e-6)
    assert found["rewards/r0/std"] == pytest.approx(spread, rel=1e-6)
    assert found["frac_reward_zero_std"] == 0.5
    assert spread_within_groups(table, G) == pytest.approx((np.std([0, 1, 2, 3], ddof=1) / 2, 0.5))


def test_rows_that_are_left_out_are_compared_with_nothing() -> None:
    rows = [[1.0, 1.0], [0.0, 3.0], [5.0, math.nan], [1.0, 2.0]]
    table, others = float64(rows), float64([*rows[:2], rows[3]])
    for scale, aggregation in CHOICES:
        choice: dict[str, Any] = {"multi_objective_aggregation": aggregation}
        found = compute_advantages(table, G, scale, left_out=[2], **choice).tolist()  # type: ignore[arg-type]
        without = compute_advantages(others, 3, scale, **choice).tolist()  # type: ignore[arg-type]
        assert found == pytest.approx([*without[:2], 0.0, without[2]])  # type: ignore[index]
    statistics = reward_statistics(table, G, left_out=[2])
    assert statistics["reward"] == pytest.approx((2 + 3 + 3) / 3)
    assert statistics["rewards/r0/mean"] == pytest.approx(7 / 4), "a score that is there counts for its function"


def test_the_spread_within_groups_is_not_that_of_the_batch() -> None:
    table = mx.array([1.0, 1.0, 3.0, 3.0, 0.0, 2.0])
    assert spread_within_groups(table, 2) == pytest.approx((math.sqrt(2) / 3, 2 / 3))
    assert reward_statistics(table, 2, "batch")["frac_reward_zero_std"] == 0.0, "TRL's figure there"
    lone = mx.array([1.0, math.nan, math.nan, math.nan])
    assert math.isnan(spread_within_groups(lone, 2)[0]), "no group has two rewards"
    cancelling = mx.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert spread_within_groups(cancelling, 2) == pytest.approx((math.sqrt(2) / 2, 0.5))
    assert spread_within_groups(cancelling, 2, multi_objective_aggregation="normalize_then_sum")[1] == 0.5
