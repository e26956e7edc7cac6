from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from troupe.grpo import LearnerConfig, make_batch
from troupe.learning import as_rollouts, assemble, completion_log_probs, is_usable
from troupe.messages import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Slot
from troupe.policy import CompletedGroup, Completion, load_policy


def rollout(*ids: int, reason: FinishReason = "stop") -> Rollout:
    log_probs = tuple(-0.25 * (t + 1) for t in range(len(ids)))
    return Rollout(
        token_ids=ids,
        log_probs=log_probs,
        sampling_log_probs=tuple(10 * x for x in log_probs),
        versions=(0,) * len(ids),
        finish_reason=reason,
        text="",
    )


def group(
    place: int,
    prompt_ids: tuple[int, ...],
    rollouts: tuple[Rollout, ...],
    logged: dict[str, float] | None = None,
    **scores: tuple[float | None, ...],
) -> ScoredGroup:
    prompt = Prompt(
        gid=place, slot=Slot(step=0, place=place), epoch=0, row=place, prompt="?", prompt_ids=prompt_ids, columns={}
    )
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


def test_assemble_tells_what_can_be_told_before_learning() -> None:
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


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 3], [1]], ids=["ragged", "equal prompts", "one"])
def test_log_probs_are_those_of_each_row_alone(tiny_model: Path, rows: list[int]) -> None:
    policy = load_policy(tiny_model)
    prompts, completions = [PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows]
    zeros = [[0.0] * len(ids) for ids in completions]
    batch = make_batch(prompts, completions, zeros, [0.0] * len(rows), pad_id=257)
    log_probs, entropies = completion_log_probs(policy.config, 1.0)(policy.weights, batch)
    expected = np.array(policy.compute_log_probs(prompts, completions))
    mask = np.array(batch.completion_mask) > 0
    assert log_probs.dtype == mx.float32
    np.testing.assert_allclose(np.array(log_probs)[mask], expected[mask], rtol=0, atol=1e-5)
    assert np.isfinite(np.array(log_probs)).all()
    assert np.isfinite(np.array(entropies)).all()


def test_temperature_scales_logits_before_log_probs_and_entropies(tiny_model: Path) -> None:
    policy, temperature = load_policy(tiny_model), 0.6
    batch = make_batch(PROMPTS, COMPLETIONS, [[0.0] * len(ids) for ids in COMPLETIONS], [0.0] * 4, pad_id=0)
    log_probs, entropies = completion_log_probs(policy.config, temperature)(policy.weights, batch)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = np.array(policy.model(mx.array([prompt + completion])), dtype=np.float64)[0] / temperature
        scaled = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        scaled -= logits.max(-1, keepdims=True)
        for t, token in enumerate(completion):
            distribution = scaled[len(prompt) - 1 + t]
            assert log_probs[row, t].item() == pytest.approx(distribution[token], abs=1e-5)
            assert entropies[row, t].item() == pytest.approx(-(np.exp(distribution) * distribution).sum(), abs=1e-5)
