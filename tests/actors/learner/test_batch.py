"""Groups as a batch, their figures against numbers worked out by hand, and log-probs with their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import make_prompt, make_rollout
from troupe.actors.learner.batch import CompletionLogProbs, as_rollouts, assemble
from troupe.actors.learner.gathering import is_usable
from troupe.actors.learner.measures import num_tokens
from troupe.actors.learner.rollouts import is_truncated, thought_statistics
from troupe.actors.learner.scores import (
    advantage_statistics,
    advantages_of,
    group_statistics,
    has_signal,
    score_table,
)
from troupe.grpo import Batch, LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.messages import FinishReason, Rollout, RolloutGroup, ScoredGroup
from troupe.policy import CompletedGroup, Completion, Weights, load_policy
from troupe.policy.gradient.backward import side_by_side


def rollout(*ids: int, reason: FinishReason = "stop") -> Rollout:
    log_probs = [-0.25 * (t + 1) for t in range(len(ids))]
    made = make_rollout(ids, log_probs=log_probs, reason=reason)
    return msgspec.structs.replace(made, sampling_log_probs=tuple(10 * x for x in log_probs))


def group(
    place: int,
    prompt_ids: tuple[int, ...],
    rollouts: tuple[Rollout, ...],
    logged: dict[str, float] | None = None,
    **scores: tuple[float | None, ...],
) -> ScoredGroup:
    prompt = msgspec.structs.replace(make_prompt(0, place), prompt_ids=prompt_ids)
    return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=rollouts), scores=scores, logged=logged or {})


GROUPS = [
    group(
        0,
        (1, 2, 3),
        (rollout(10, 11), rollout(12)),
        {"tone": 1.0, "only": 5.0, "reward": 99.0},
        exact=(1.0, 0.0),
        style=(0.5, None),
    ),
    group(
        1,
        (4,),
        (rollout(13, 14, 15, reason="length"), rollout(16)),
        {"tone": 2.0},
        exact=(None, None),
        style=(None, 2.0),
    ),
]


def test_assemble_equals_the_hand_worked_batch() -> None:
    made = assemble(GROUPS, LearnerConfig(), weights={"exact": 1.0, "style": 2.0}, pad_id=0)
    batch = made.batch
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [1, 2, 3], [0, 0, 4], [0, 0, 4]]
    assert batch.completion_ids.tolist() == [[10, 11, 0], [12, 0, 0], [13, 14, 15], [16, 0, 0]]
    assert batch.completion_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.sampling_log_probs.tolist() == [[-0.25, -0.5, 0], [-0.25, 0, 0], [-0.25, -0.5, -0.75], [-0.25, 0, 0]]
    assert (batch.prompt_lengths, batch.completion_lengths) == ((3, 3, 1, 1), (2, 1, 3, 1))
    assert batch.truncated == (False, False, True, False)
    # rewards 1 + 2·0.5 = 2 and 0: mean 1, σ = √2; in the other group one has none, the other is alone: both 0
    a = 1.0 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(np.array(batch.advantages), [a, -a, 0.0, 0.0], rtol=1e-6)


def test_assemble_describes_what_is_known_before_learning() -> None:
    metrics = assemble(GROUPS, LearnerConfig(), weights={"exact": 1.0, "style": 2.0}, pad_id=0).metrics
    expected = {
        "reward": 2.0,  # of 2, 0 and 4: the row without a score does not count, nor what a reward logs as "reward"
        "reward_std": 2.0,
        "rewards/exact/mean": 0.5,
        "rewards/style/mean": 1.25,
        "tone": 1.5,
        "only": 5.0,
        "completions/mean_length": 7 / 4,
        "completions/min_length": 1.0,
        "completions/max_length": 3.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 4 / 3,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 2.0,
        "num_tokens": 3 + 3 + 1 + 1 + 7.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_tokens_of_older_versions_are_left_out_of_the_loss_but_not_of_the_comparison() -> None:
    versions = [(1, 3), (2,), (1, 2, 2), (3,)]
    rollouts = [r for g in GROUPS for r in g.group.rollouts]
    aged = [msgspec.structs.replace(r, versions=v) for r, v in zip(rollouts, versions, strict=True)]
    groups = [
        msgspec.structs.replace(g, group=msgspec.structs.replace(g.group, rollouts=tuple(aged[2 * i : 2 * i + 2])))
        for i, g in enumerate(GROUPS)
    ]
    weights = {"exact": 1.0, "style": 2.0}
    whole, all_young = (assemble(groups, LearnerConfig(), weights=weights, pad_id=0, oldest=v) for v in (None, 1))
    assert all_young.batch.completion_mask.tolist() == whole.batch.completion_mask.tolist()
    batch = assemble(groups, LearnerConfig(), weights=weights, pad_id=0, oldest=2).batch
    assert batch.completion_mask.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert batch.advantages.tolist() == whole.batch.advantages.tolist()
    assert batch.completions == whole.batch.completions, "they are still what the tokens after them follow upon"
    few = assemble(groups, LearnerConfig(), weights=weights, pad_id=0, oldest=3)
    assert few.batch.completions == ((10, 11), (16,)), "rows without a token left are not computed"
    assert few.batch.completion_mask.tolist() == [[0, 1], [1, 0]]
    assert few.batch.sampling_log_probs.tolist() == [[-0.25, -0.5], [-0.25, 0]]
    assert few.batch.advantages.tolist() == whole.batch.advantages[mx.array([0, 3])].tolist()
    assert few.batch.truncated == (False, False)
    assert few.metrics == {**whole.metrics, "tokens/trained": 2.0}
    with pytest.raises(ValueError, match="none of the 4 rows"):
        assemble(groups, LearnerConfig(), weights=weights, pad_id=0, oldest=4)


def test_lengths_of_completions_none_of_which_ended() -> None:
    cut = rollout(5, 6, reason="length")
    made = assemble([group(0, (1,), (cut, cut), exact=(0.0, 1.0))], LearnerConfig(), weights={"exact": 1.0}, pad_id=0)
    assert made.metrics["completions/clipped_ratio"] == 1.0
    assert made.metrics["completions/mean_terminated_length"] == 0.0


def test_the_order_and_the_names_of_rewards_come_from_the_weights() -> None:
    weights = {"style": 2.0, "exact": 1.0}
    other = assemble(GROUPS, LearnerConfig(), weights=weights, pad_id=0)
    assert other.metrics["rewards/style/mean"] == 1.25
    first = assemble(GROUPS, LearnerConfig(), weights={"exact": 1.0, "style": 2.0}, pad_id=0)
    assert other.batch.advantages.tolist() == first.batch.advantages.tolist()


def test_usable_counts_rows_with_any_score() -> None:
    assert is_usable(GROUPS[0], 2)
    assert is_usable(GROUPS[1], 1)
    assert not is_usable(GROUPS[1], 2)
    assert not is_usable(group(0, (1,), (rollout(2),)), 1)


def test_completions_of_the_engine_become_rollouts() -> None:
    completion = Completion(
        token_ids=(72, 105),
        log_probs=(-1.0, -2.0),
        sampling_log_probs=(-0.5, -1.5),
        versions=(3, 4),
        finish_reason="length",
    )
    (made,) = as_rollouts(CompletedGroup(index=0, completions=(completion,)), lambda ids: bytes(ids).decode())
    assert made == Rollout(
        token_ids=(72, 105),
        log_probs=(-1.0, -2.0),
        sampling_log_probs=(-0.5, -1.5),
        versions=(3, 4),
        finish_reason="length",
        text="Hi",
    )


PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [250, 3, 1, 99]]
COMPLETIONS = [[20, 21, 22], [30], [40, 41, 42, 43, 44], [7, 8]]


def batch_of(rows: list[int]) -> Batch:
    prompts, completions = [PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows]
    return make_batch(prompts, completions, [[0.0] * len(ids) for ids in completions], [0.0] * len(rows), pad_id=257)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3], [0, 3], [1], [0, 0, 2]], ids=["ragged", "equal lengths", "one", "group"]
)
def test_log_probs_and_entropies_are_those_of_each_row_alone(
    tiny_model: Path, rows: list[int], temperature: float
) -> None:
    policy, batch = load_policy(tiny_model), batch_of(rows)
    log_probs, entropies = CompletionLogProbs(policy.config, temperature)(policy.weights, batch)
    assert log_probs.dtype == entropies.dtype == mx.float32
    assert log_probs.shape == entropies.shape == batch.completion_mask.shape
    padding = np.array(batch.completion_mask) == 0
    assert not np.array(log_probs)[padding].any()
    assert not np.array(entropies)[padding].any()
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        logits = np.array(policy.model(mx.array([prompt + completion])), dtype=np.float64)[0] / temperature
        logits -= logits.max(-1, keepdims=True)
        log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[len(prompt) - 1 : -1]
        chosen = log_p[np.arange(len(completion)), list(completion)]
        np.testing.assert_allclose(np.array(log_probs)[row, : len(completion)], chosen, atol=1e-5)
        expected = -(np.exp(log_p) * log_p).sum(-1)
        np.testing.assert_allclose(np.array(entropies)[row, : len(completion)], expected, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_gradient_of_its_own_is_that_of_mlx(tiny_model: Path, recompute: bool, entropy_gradient: bool) -> None:
    policy, batch = load_policy(tiny_model), batch_of([0, 0, 1, 3])
    log_probs_fn = CompletionLogProbs(policy.config, 0.8, recompute=recompute, entropy_gradient=entropy_gradient)

    def loss(log_probs: mx.array, entropies: mx.array) -> tuple[mx.array, mx.array]:
        return (log_probs * log_probs + entropies).sum(), mx.max(entropies)

    def of_weights(weights: Weights) -> tuple[mx.array, mx.array]:
        log_probs, entropies = log_probs_fn(weights, batch)
        return loss(log_probs, entropies if entropy_gradient else mx.stop_gradient(entropies))

    values: list[Any] = []
    portions = side_by_side([log_probs_fn.gradients(policy.weights, batch, loss)], (), values)
    ours = {name: gradient for portion in portions for name, gradient in portion.items()}
    ((value, highest),) = values
    (expected, same), theirs = mx.value_and_grad(of_weights)(dict(policy.weights))
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert highest.item() == pytest.approx(same.item(), rel=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(1.0, float(mx.abs(gradient).max()))
        np.testing.assert_allclose(np.array(ours[name]) / scale, np.array(gradient) / scale, atol=1e-5, err_msg=name)


def test_training_by_its_own_gradient_is_training_by_that_of_mlx(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    log_probs_fn = CompletionLogProbs(policy.config, 0.8, recompute=True)
    batch = replace(batch_of([0, 0, 1, 3, 2]), advantages=mx.array([1.0, -1.0, 0.5, -0.25, 2.0]))
    plain = LearnerConfig(num_iterations=2, vllm_importance_sampling_correction=False, max_grad_norm=0.0)
    for config in (plain, msgspec.structs.replace(plain, gradient_accumulation_steps=3, entropy_coef=0.1)):
        ours, theirs = (
            train_on_batch(policy.weights, adamw_init(policy.weights), batch, function, config, lr=0.0)
            for function in (log_probs_fn, log_probs_fn.__call__)
        )
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4, abs=1e-6)
        for name, moment in theirs.optimizer_state.items():
            scale = float(mx.abs(moment).max()) or 1.0
            np.testing.assert_allclose(
                np.array(ours.optimizer_state[name]) / scale, np.array(moment) / scale, atol=2e-5, err_msg=name
            )


WEIGHTS = {"a": 1.0, "b": 2.0}


def of_length(length: int, reason: FinishReason = "stop") -> Rollout:
    return make_rollout((7,) * length, reason=reason)


def group_of(
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
    return group_of([of_length(1)] * size, scores)


TWO = [
    group_of(
        [of_length(2), of_length(5, "length")],
        {"a": (1.0, 0.0), "b": (0.5, None)},
        logged={"tone": 1.0, "reward": 9.0},
    ),
    group_of(
        [of_length(4), of_length(1, "repetition")], {"a": (2.0, 2.0), "b": (0.0, 0.0)}, place=1, logged={"tone": 4.0}
    ),
]


def test_figures_of_two_groups() -> None:
    totals = [1 + 2 * 0.5, 0.0, 2.0, 2.0]
    mean = sum(totals) / 4
    expected = {
        "tone": 2.5,
        "reward": mean,
        "reward_std": math.sqrt(sum((x - mean) ** 2 for x in totals) / 3),
        **{f"reward/q{percent}": q for percent, q in ((10, 0.6), (25, 1.5), (50, 2.0), (75, 2.0), (90, 2.0))},
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
    assert is_truncated(of_length(3, reason)) == cut


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


def test_thoughts_that_the_limit_cut_are_counted() -> None:
    def group(*texts: str, finish: FinishReason = "length", opened: str = "") -> ScoredGroup:
        prompt = msgspec.structs.replace(make_prompt(0, 0), opened=opened)
        rollouts = [make_rollout([1, 2], text=text, reason=finish) for text in texts]
        return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=tuple(rollouts)), scores={})

    name = "completions/clipped_in_thoughts"
    assert thought_statistics([group("on", "and on")]) == {}, "nobody thinks"
    assert thought_statistics([group("<think>on", "<think>a</think>b", "c")]) == {name: pytest.approx(1 / 3)}
    assert thought_statistics([group("<think>on", finish="stop")]) == {name: 0.0}
    assert thought_statistics([group("on", "a</think>b", opened="<think>\n")]) == {name: 0.5}
    assert thought_statistics([group("<think>a</think>b<think>on")]) == {name: 1.0}, "the last thoughts count"
