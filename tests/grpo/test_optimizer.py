"""AdamW against numpy in float64, what it holds and takes; clipping, learning rates against hand-worked points."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.fakes import same_bits
from troupe.grpo import optimizer
from troupe.grpo.config import LearnerConfig, Scheduler
from troupe.grpo.optimizer import (
    OptimizerState,
    adamw_init,
    adamw_update,
    adamw_update_in_place,
    clip_by_global_norm,
    clip_scale,
    global_norm,
    join_halves,
    learning_rate,
    optimizer_state_bytes,
    split_halves,
    update_bytes,
)


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
    assert {name: value.dtype for name, value in state.items()} == {
        "step": mx.float32,
        "m.w": mx.float32,
        "v.w": mx.float32,
        "low.w": mx.uint16,
    }
    for _ in range(100):
        grads = {"w": mx.ones((2, 2), dtype=mx.bfloat16)}
        weights, state = adamw_update(weights, grads, state, lr=1e-4)
    assert weights["w"].dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(join_halves(weights["w"], state["low.w"])), 0.99, atol=1e-5)
    np.testing.assert_allclose(np.array(weights["w"].astype(mx.float32)), 0.99, atol=4e-3)


def test_float16_weights_keep_a_float32_master() -> None:
    weights = {"w": mx.full((2, 2), 1.0, dtype=mx.float16)}
    state = adamw_init(weights)
    for _ in range(100):
        weights, state = adamw_update(weights, {"w": mx.ones((2, 2), dtype=mx.float16)}, state, lr=1e-5)
    assert (weights["w"].dtype, state["master.w"].dtype) == (mx.float16, mx.float32)
    np.testing.assert_allclose(np.array(state["master.w"]), 0.999, atol=2e-6)
    assert mx.array_equal(weights["w"], state["master.w"].astype(mx.float16)).item()


FLOATS = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F80_0000 != 0x7F80_0000)
"""The bits of every float32 that is a finite number."""


def numbers(bits: np.ndarray) -> np.ndarray:
    """float32 of these bits as float64, with 2^128 for what lies next beyond the largest."""
    with np.errstate(over="ignore"):
        values = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.isinf(values), np.copysign(2.0**128, values), values)


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(FLOATS, min_size=1, max_size=40))
@example(bits=[0, 0x8000_0000, 1, 0x8000_0001, 0x7F7F_FFFF, 0x7F7F_8000, 0xFF7F_FFFF, 0x3F80_8000, 0x3F81_8000])
def test_halves_are_joined_without_loss_and_the_higher_is_the_nearest_bfloat16(bits: list[int]) -> None:
    there = np.array(bits, np.uint32)
    weight, low = split_halves(mx.array(there.view(np.float32)))
    assert (weight.dtype, low.dtype) == (mx.bfloat16, mx.uint16)
    assert np.array(mx.view(join_halves(weight, low), mx.uint32)).tolist() == bits
    below = there.astype(np.uint64) & 0xFFFF_0000
    rounded = numbers(np.array(mx.view(weight, mx.uint16)).astype(np.uint64) << 16)
    distances = [abs(numbers(near) - numbers(there)) for near in (below, below + 0x1_0000)]
    np.testing.assert_array_equal(abs(rounded - numbers(there)), np.minimum(*distances))


def test_a_bfloat16_weight_is_trained_as_the_float32_weight_would_be() -> None:
    rng = np.random.default_rng(4)
    start = mx.array(rng.normal(size=(7, 5)).astype(np.float32)).astype(mx.bfloat16)
    half, full = {"w": start}, {"w": start.astype(mx.float32)}
    half_state, full_state = adamw_init(half), adamw_init(full)
    rates: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.1}
    for _ in range(200):
        grad = mx.array(rng.normal(size=(7, 5)).astype(np.float32)).astype(mx.bfloat16)
        half, half_state = adamw_update(half, {"w": grad}, half_state, **rates)
        full, full_state = adamw_update(full, {"w": grad.astype(mx.float32)}, full_state, **rates)
    assert same_bits({"w": join_halves(half["w"], half_state["low.w"])}, full)
    assert same_bits({name: half_state[name] for name in full_state}, full_state)
    moved = mx.abs(full["w"] - start.astype(mx.float32))
    assert 0 < float(mx.max(moved)) < 3e-4, "far less than bfloat16 could tell near 1"


def test_the_arguments_stay_as_they_are() -> None:
    weights = {"w": mx.array([[1.0]])}
    state, grads = adamw_init(weights), {"w": mx.array([[1.0]])}
    adamw_update(weights, grads, state, lr=0.1)
    assert weights["w"].item() == grads["w"].item() == 1.0
    assert (state["step"].item(), state["m.w"].item()) == (0.0, 0.0)


def mixed_weights() -> dict[str, mx.array]:
    """Large and small, of all types and ranks."""
    rng = np.random.default_rng(9)
    shapes = {"norm": (7,), "table": (40, 6), "wide": (3, 50), "long": (300,), "tall": (90, 2)}
    types = [mx.float32, mx.bfloat16, mx.float16, mx.bfloat16, mx.float32]
    return {
        name: mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
        for (name, shape), dtype in zip(shapes.items(), types, strict=True)
    }


def three_updates(weights: dict[str, mx.array], state: OptimizerState) -> None:
    rng = np.random.default_rng(10)
    for _ in range(3):
        grads = {
            name: mx.array(rng.normal(size=w.shape).astype(np.float32)).astype(w.dtype) for name, w in weights.items()
        }
        adamw_update_in_place(weights, grads, state, lr=1e-2, weight_decay=0.1, grad_scale=0.5)
        assert grads == {}


@pytest.mark.parametrize("at_once", [1, 64, 250])
def test_in_slices_the_update_has_the_same_bits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, slices = mixed_weights(), mixed_weights()
    state, slices_state = adamw_init(weights), adamw_init(slices)
    three_updates(weights, state)
    monkeypatch.setattr(optimizer, "UPDATED_AT_ONCE", at_once)
    three_updates(slices, slices_state)
    assert weights.keys() == slices.keys() == mixed_weights().keys()
    assert state["step"].item() == 3.0
    assert same_bits(slices, weights)
    assert same_bits(slices_state, state)
    assert all(w.dtype == mixed_weights()[name].dtype for name, w in slices.items())


@pytest.mark.parametrize("at_once", [1, 64, 2**24])
def test_whoever_holds_old_arrays_keeps_them_as_they_were(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "UPDATED_AT_ONCE", at_once)
    weights = mixed_weights()
    state = adamw_init(weights)
    three_updates(weights, state)
    held, held_state = dict(weights), dict(state)
    before = {name: np.array(array.astype(mx.float32)) for name, array in (held | held_state).items()}
    three_updates(weights, state)
    for name, array in (held | held_state).items():
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), before[name], err_msg=name)
        assert not mx.array_equal(array, (weights | state)[name]).item(), name


def test_scaled_gradients_are_those_that_clipping_makes() -> None:
    weights = {"a": mx.array([1.0, 2.0]), "b": mx.array([[3.0]])}
    grads = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    expected, expected_state = adamw_update(weights, clipped, adamw_init(weights), lr=0.1)
    state = adamw_init(weights)
    adamw_update_in_place(weights, grads, state, lr=0.1, grad_scale=clip_scale(norm, 1.0))
    assert same_bits(weights, expected)
    assert same_bits(state, expected_state)


def test_the_update_in_place_takes_little_more_memory_than_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = 2**20
    weights = {f"w{i}": mx.full((2**10, numbers // 2**10), 0.5) for i in range(4)}
    state = adamw_init(weights)
    grads = {name: mx.ones(weight.shape) for name, weight in weights.items()}
    mx.eval(weights, state, grads)
    monkeypatch.setattr(optimizer, "UPDATED_AT_ONCE", numbers // 8)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    adamw_update_in_place(weights, grads, state, lr=1e-3)
    assert mx.get_peak_memory() - before < numbers * 4  # at once it would be three times four of these
    assert mx.get_active_memory() - before <= -4 * numbers * 4 + 2**16, "the gradients are given up"


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


def test_the_norm_of_many_arrays_does_not_depend_on_their_order_nor_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    grads = {f"w{i}": mx.array(rng.normal(size=(i + 1, 3)).astype(np.float32)) for i in range(50)}
    norm = global_norm(grads)
    expected = math.sqrt(sum(float((np.array(grad).astype(np.float64) ** 2).sum()) for grad in grads.values()))
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    names = list(grads)
    for _ in range(5):
        rng.shuffle(names)
        assert global_norm({name: grads[name] for name in names}).item() == norm.item()
    monkeypatch.setattr(optimizer, "UPDATED_AT_ONCE", 16)
    assert global_norm(grads).item() == pytest.approx(expected, rel=1e-6)


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
    plan = LearnerConfig(lr=2.0, lr_scheduler=scheduler, warmup_steps=warmup)
    rates = [learning_rate(step, 4, plan) for step in range(6)]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_a_warm_up_that_fills_the_run() -> None:
    plan = LearnerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, 4, plan) for step in (3, 4)] == [1.5, 2.0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_state_of_adamw(dtype: mx.Dtype) -> None:
    state = adamw_init({"w": mx.zeros((30, 7), dtype), "b": mx.zeros(11, dtype)})
    held = sum(array.nbytes for name, array in state.items() if name != "step")
    assert optimizer_state_bytes(30 * 7 + 11, dtype) == held


def test_an_update_by_hand() -> None:
    assert update_bytes(1000, 100, mx.float32) == 8000
    assert update_bytes(1000, 900, mx.float32) == 18 * 900
    assert (
        update_bytes(10 * optimizer.UPDATED_AT_ONCE, 5 * optimizer.UPDATED_AT_ONCE, mx.bfloat16)
        == (18 + 5 * 2) * optimizer.UPDATED_AT_ONCE
    )


@pytest.mark.usefixtures("mlx_waits")
@pytest.mark.parametrize("shapes", [[(400, 500)] * 20, [(4000, 500), (30, 40), (40,)]])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_an_update_peaks_below_the_formula(shapes: list[tuple[int, ...]], dtype: mx.Dtype) -> None:
    published = {str(i): mx.ones(shape, dtype) for i, shape in enumerate(shapes)}
    weights, grads = dict(published), {name: mx.ones(x.shape, dtype) for name, x in published.items()}
    state = adamw_init(published)
    mx.eval(published, grads, state)
    held = mx.get_active_memory()  # the gradients among it, whose place the new weights take
    mx.reset_peak_memory()
    adamw_update_in_place(weights, grads, state, lr=1e-3)
    sizes = [x.size for x in published.values()]
    assert mx.get_peak_memory() - held <= update_bytes(sum(sizes), max(sizes), dtype)
