"""AdamW against numpy in float64, clipping, learning rates against hand-worked points."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from troupe.grpo.optimizer import Scheduler, adamw_init, adamw_update, clip_by_global_norm, learning_rate


def adamw_by_definition(
    weight: np.ndarray, grads: list[np.ndarray], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> np.ndarray:
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, grad in enumerate(grads, start=1):
        weight = weight - lr * decay * weight
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        weight = weight - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return weight


def run(weights: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]], **rates: Any) -> dict[str, np.ndarray]:
    now = {name: mx.array(weight.astype(np.float32)) for name, weight in weights.items()}
    state = adamw_init(now)
    for grad in grads:
        now, state = adamw_update(now, {k: mx.array(g.astype(np.float32)) for k, g in grad.items()}, state, **rates)
        mx.eval(now, state)
    assert state["step"].item() == len(grads)
    return {name: np.array(weight) for name, weight in now.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_over_twenty_updates(decay: float) -> None:
    rng = np.random.default_rng(2)
    weights = {"matrix": rng.normal(size=(5, 3)), "vector": rng.normal(size=4)}
    grads = [{name: rng.normal(size=w.shape) * 10.0 ** -(i % 3) for name, w in weights.items()} for i in range(20)]
    rates: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6}
    result = run(weights, grads, **rates, weight_decay=decay)
    for name, weight in weights.items():
        held = decay if name == "matrix" else 0.0
        expected = adamw_by_definition(weight, [g[name] for g in grads], 1e-2, (0.9, 0.99), 1e-6, held)
        np.testing.assert_allclose(result[name], expected, atol=1e-6)


def test_the_first_update_moves_by_the_learning_rate() -> None:
    result = run({"w": np.array([[1.0, 1.0, 1.0]])}, [{"w": np.array([[0.5, -2.0, 0.0]])}], lr=1e-2)
    np.testing.assert_allclose(result["w"], [[0.99, 1.01, 1.0]], atol=1e-7)


def test_bfloat16_weights_keep_updates_too_small_for_them() -> None:
    weights = {"w": mx.full((2, 2), 1.0, dtype=mx.bfloat16)}
    state = adamw_init(weights)
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(
        ["step", "m.w", "v.w", "master.w"], mx.float32
    )
    for _ in range(100):
        grads = {"w": mx.ones((2, 2), dtype=mx.bfloat16)}
        weights, state = adamw_update(weights, grads, state, lr=1e-4)
        mx.eval(weights, state)
    assert weights["w"].dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(state["master.w"]), 0.99, atol=1e-5)
    np.testing.assert_allclose(np.array(weights["w"].astype(mx.float32)), 0.99, atol=4e-3)


def test_the_arguments_stay_as_they_are() -> None:
    weights = {"w": mx.array([[1.0]])}
    state = adamw_init(weights)
    adamw_update(weights, {"w": mx.array([[1.0]])}, state, lr=0.1)
    assert weights["w"].item() == 1.0
    assert (state["step"].item(), state["m.w"].item()) == (0.0, 0.0)


def test_clipping_scales_all_gradients_by_one_number() -> None:
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert norm.item() == 5.0
    np.testing.assert_allclose(np.array(clipped["a"]), [3 / 5.000001, 0.0], rtol=1e-6)
    np.testing.assert_allclose(np.array(clipped["b"]), [[4 / 5.000001]], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [6.0, 0.0, None])
def test_clipping_leaves_small_gradients_alone(max_norm: float | None) -> None:
    clipped, norm = clip_by_global_norm({"a": mx.array([3.0, 4.0])}, max_norm)
    assert norm.item() == 5.0
    assert clipped["a"].tolist() == [3.0, 4.0]


def test_the_norm_of_low_precision_gradients_is_taken_in_float32() -> None:
    grads = {"a": mx.full((1000,), 1e-3, dtype=mx.bfloat16)}
    clipped, norm = clip_by_global_norm(grads, 1e-3)
    assert clipped["a"].dtype == mx.bfloat16
    assert norm.item() == pytest.approx(math.sqrt(1000) * 1e-3, rel=4e-3)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    lr: float = 2.0
    lr_scheduler: Scheduler = "linear"
    warmup_steps: int = 0


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 0, [2, 2, 2, 2, 2, 2]),
        ("constant", 2, [0, 1, 2, 2, 2, 2]),
        ("linear", 0, [2, 1.5, 1, 0.5, 0, 0]),
        ("linear", 2, [0, 1, 2, 1, 0, 0]),
        ("cosine", 0, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0]),
        ("cosine", 2, [0, 1, 2, 1, 0, 0]),
    ],
)
def test_learning_rates_of_four_updates_and_beyond(scheduler: Scheduler, warmup: int, expected: list[float]) -> None:
    plan = Plan(lr_scheduler=scheduler, warmup_steps=warmup)
    rates = [learning_rate(step, 4, plan) for step in range(6)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_a_warm_up_that_fills_the_run() -> None:
    assert learning_rate(4, 4, Plan(warmup_steps=4)) == 2.0
    assert learning_rate(3, 4, Plan(warmup_steps=4)) == 1.5
