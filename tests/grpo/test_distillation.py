"""On-policy distillation beside TRL's, and beside the divergence that it lowers, by finite differences in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.trl import assert_close
from troupe.grpo import LossConfig, distilled_advantages, grpo_loss, sampled_divergence, selective_log_softmax

VECTORS = Path(__file__).parents[1] / "data" / "trl"
CASES = json.loads((VECTORS / "distillation.json").read_text(encoding="utf-8"))
OF_SDFT = json.loads((VECTORS / "sdft.json").read_text(encoding="utf-8"))["losses"]


def loss_and_gradient(
    logits: mx.array, tokens: mx.array, mask: mx.array, teacher: mx.array, temperature: float, loss_type: Any
) -> tuple[mx.array, mx.array]:
    """Of the teacher alone, on-policy, by the logits."""
    own = selective_log_softmax(logits / temperature, tokens)
    advantages = distilled_advantages(mx.zeros(tokens.shape[0]), teacher, own, coef=1.0)

    def loss_of(logits: mx.array) -> mx.array:
        log_probs = selective_log_softmax(logits / temperature, tokens)
        return grpo_loss(log_probs, own, advantages, mask, LossConfig(loss_type=loss_type, epsilon_high=5.0))[0]

    loss, gradient = mx.value_and_grad(loss_of)(logits)
    return loss, gradient


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    logits, tokens = mx.array(case["logits"]), mx.array(case["tokens"])
    mask = (mx.arange(tokens.shape[1]) < mx.array(case["lengths"])[:, None]).astype(mx.float32)
    given = logits, tokens, mask, mx.array(case["teacher_log_probs"]), case["temperature"]
    loss, gradient = loss_and_gradient(*given, "cispo")  # whose value is −A·log π, too, where nothing has moved
    assert_close(loss.item(), case["loss"], 1e-5)
    assert_close(gradient.tolist(), case["gradient"], 1e-5)
    for other in ("dapo", "bnpo", "dppo", "m2po", "kl_cov"):
        assert_close(loss_and_gradient(*given, other)[1].tolist(), case["gradient"], 1e-5)


@pytest.mark.parametrize("case", OF_SDFT, ids=range(len(OF_SDFT)))
def test_a_policy_that_teaches_itself_learns_by_the_loss_and_gradient_of_trl(case: dict[str, Any]) -> None:
    logits, tokens = mx.array(case["logits"]), mx.array(case["tokens"])
    mask = (mx.arange(tokens.shape[1]) < mx.array(case["lengths"])[:, None]).astype(mx.float32)
    said, temperature = mx.array(case["teacher_log_probs"]), case["temperature"]
    _, gradient = loss_and_gradient(logits, tokens, mask, said, temperature, "grpo")
    assert_close(gradient.tolist(), case["gradient"], 1e-5)
    own = selective_log_softmax(logits / temperature, tokens)
    each = -distilled_advantages(mx.zeros(tokens.shape[0]), said, own, coef=1.0) * own * mask
    assert_close(mx.mean(mx.sum(each, axis=1) / mx.sum(mask, axis=1)).item(), case["loss"], 1e-5)


def test_in_the_mean_over_samples_the_gradient_is_that_of_the_reverse_divergence() -> None:
    dice = np.random.default_rng(0)
    V, step = 6, 1e-6
    student, teacher = dice.normal(0, 1, V), dice.normal(0, 1, V)

    def log_softmax(x: Any) -> Any:
        return x - np.log(np.sum(np.exp(x)))

    def divergence(x: Any) -> Any:
        return np.sum(np.exp(log_softmax(x)) * (log_softmax(x) - log_softmax(teacher)))

    by_differences = [(divergence(student + e) - divergence(student - e)) / (2 * step) for e in step * np.eye(V)]
    tokens, mask = mx.arange(V)[:, None], mx.ones((V, 1))  # each token once, to be weighed by its probability
    logits = mx.broadcast_to(mx.array(student, dtype=mx.float32), (V, 1, V))
    said = mx.array(log_softmax(teacher)[:, None], dtype=mx.float32)
    _, gradient = loss_and_gradient(logits, tokens, mask, said, 1.0, "dapo")
    weights = np.exp(log_softmax(student))
    expected = V * np.einsum("a,av->v", weights, np.array(gradient)[:, 0])  # the loss is a mean over V rows
    np.testing.assert_allclose(expected, by_differences, atol=2e-6)
    assert np.max(np.abs(by_differences)) > 0.05


def test_rewards_and_teacher_are_weighed_by_hand() -> None:
    said, own = mx.array([[-1.0, -2.0], [-0.5, 0.0]]), mx.array([[-1.5, -1.0], [-0.5, 0.0]])
    added = distilled_advantages(mx.array([1.0, -1.0]), said, own, coef=0.5, reward_coef=2.0)
    assert added.tolist() == [[2.25, 1.5], [-2.0, -2.0]]
    by_token = distilled_advantages(mx.array([[1.0, 2.0], [3.0, 4.0]]), said, own, coef=1.0, reward_coef=0.0)
    assert by_token.tolist() == [[0.5, -1.0], [0.0, 0.0]]
    mask = mx.array([[1.0, 1.0], [1.0, 0.0]])
    assert sampled_divergence(said, own, mask).item() == pytest.approx((-0.5 + 1.0 + 0.0) / 3)
