"""Lanes: a batch's gradient is the same to the bit whoever computes which part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import mlx.core as mx
import pytest

from tests.grpo.test_step import (
    ENTROPY_SETTINGS,
    MANY_CHOSEN,
    bigram,
    bigram_weights,
    check_close,
    random_batch,
)
from tests.support.fakes import same_bits
from tests.support.ranks import with_ranks
from troupe.errors import RunError
from troupe.grpo.batch import Batch
from troupe.grpo.config import LearnerConfig, LossType
from troupe.grpo.lanes import Lanes
from troupe.grpo.optimizer import adamw_init
from troupe.grpo.ranks import OneRank, Ranks, check_alike, digest
from troupe.grpo.step import StepResult, train_on_batch


def train(config: LearnerConfig, ranks: Ranks, batch: Batch) -> StepResult:
    weights = bigram_weights()
    return train_on_batch(
        weights,
        adamw_init(weights),
        batch,
        bigram,
        config,
        lr=0.1,
        ref_weights=bigram_weights(7),
        max_completion_length=9,
        seed=3,
        ranks=ranks,
    )


def equal(ours: StepResult, theirs: StepResult) -> bool:
    return (
        same_bits(ours.weights, theirs.weights)
        and same_bits(ours.optimizer_state, theirs.optimizer_state)
        and repr(ours.metrics) == repr(theirs.metrics)
    )


def settings(number: int, loss_type: LossType) -> dict[str, Any]:
    """Another combination for each loss type; each of these is there several times."""
    some = ENTROPY_SETTINGS[number % len(ENTROPY_SETTINGS)]
    return {"beta": 0.1 if number % 3 else 0.0, "num_iterations": 1 + number % 2, **MANY_CHOSEN, **some}


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_one_two_and_four_ranks_come_to_the_same_bits(loss_type: LossType) -> None:
    number = get_args(LossType).index(loss_type)
    config = LearnerConfig(loss_type=loss_type, lanes=4, gradient_accumulation_steps=6, **settings(number, loss_type))
    batch = random_batch(bigram_weights(), rows=13)
    (one,) = with_ranks(1, lambda ranks: train(config, ranks, batch))
    for size in (2, 4) if loss_type == "dr_grpo" else (4,):
        results = with_ranks(size, lambda ranks: train(config, ranks, batch))
        assert all(equal(result, one) for result in results)
    plain = train(LearnerConfig(loss_type=loss_type, **settings(number, loss_type)), OneRank(), batch)
    check_close(one.weights, plain.weights, atol=1e-4)
    assert one.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-5)


def test_lanes_without_rows_are_left_out() -> None:
    config = LearnerConfig(lanes=8, loss_type="clip_cov", top_entropy_quantile=0.5, entropy_coef=0.1, **MANY_CHOSEN)
    batch = random_batch(bigram_weights(), rows=3)
    (one,) = with_ranks(1, lambda ranks: train(config, ranks, batch))
    for size in (2, 4, 8):
        assert all(equal(result, one) for result in with_ranks(size, lambda ranks: train(config, ranks, batch)))


def test_lanes_are_added_as_a_binary_tree() -> None:
    """Of numbers whose sum in another order is another one."""
    numbers = [mx.array([1.0, 1e8]), mx.array([1e8, 1.0]), mx.array([-1e8, 3.0]), mx.array([1.0, -1e8])]
    expected = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3])
    in_order = ((numbers[0] + numbers[1]) + numbers[2]) + numbers[3]
    assert not mx.array_equal(expected, in_order).item()
    parts = [random_batch(bigram_weights(), rows=1)] * 4

    def added(ranks: Ranks) -> mx.array:
        lanes = Lanes(parts, 4, ranks)
        sums = lanes.sums()
        for i in lanes.numbers:
            mx.eval(sums.add({"w": numbers[i] * 1}))
        return lanes.total(sums, at_once=1)["w"]

    mx.eval(numbers)
    for size in (1, 2, 4):
        assert all(mx.array_equal(total, expected).item() for total in with_ranks(size, added))


def test_with_one_lane_gradients_are_added_in_order_and_only_one_keeps_its_type() -> None:
    half = mx.array([0.1], mx.bfloat16)
    parts = [random_batch(bigram_weights(), rows=1)] * 3
    single, several = Lanes(parts[:1], 1, OneRank()).sums(), Lanes(parts, 1, OneRank()).sums()
    single.add({"w": half})
    for _ in parts:
        several.add({"w": half * 1})
    assert single.total()["w"].dtype == mx.bfloat16
    total = several.total()["w"]
    wide = half.astype(mx.float32)
    assert total.dtype == mx.float32
    assert total.item() == ((wide + wide) + wide).item()


def test_a_rank_with_other_weights_is_noticed() -> None:
    weights = {"w": mx.arange(10).astype(mx.bfloat16), "v": mx.ones((3, 4))}
    mx.eval(weights)

    def compared(ranks: Ranks) -> None:
        changed = mx.where(mx.arange(10) == 7, 7.03125, weights["w"]).astype(mx.bfloat16)
        check_alike(ranks, {**weights, "w": changed} if ranks.rank == 2 else weights)

    with pytest.raises(RunError, match="rank 2 has come to other weights than rank 0"):
        with_ranks(4, compared)
    assert digest(weights).item() == digest(dict(reversed(weights.items()))).item()
    assert digest(weights).item() != digest({**weights, "w": weights["w"][::-1]}).item()


def test_ranks_that_cannot_share_the_lanes_are_refused() -> None:
    parts = [random_batch(bigram_weights(), rows=1)]
    for size, lanes in ((4, 2), (3, 4)):
        ranks = OneRank()
        ranks.size = size
        with pytest.raises(ValueError, match=f"{size} ranks cannot share {lanes} lanes"):
            Lanes(parts, lanes, ranks)
    with pytest.raises(ValueError, match=r"lanes is 3.*power of two"):
        LearnerConfig(lanes=3)


def test_what_ranks_give_each_other_is_the_gradient_and_a_few_numbers() -> None:
    config = LearnerConfig(lanes=2, loss_type="dapo")
    batch = replace(random_batch(bigram_weights(), rows=8), pass_number=0)
    meetings = with_ranks(2, lambda ranks: (train(config, ranks, batch), ranks)[1])
    numbers = sum(weight.size for weight in bigram_weights().values())
    assert numbers < meetings[0].meeting.gathered < numbers + 64  # type: ignore[attr-defined]
