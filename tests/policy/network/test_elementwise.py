"""The fast exponential and its family against numpy's float64."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests.support.devices import compute_on
from troupe.policy.network import elementwise


@pytest.fixture(params=["as here", "without a compiler"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without a compiler":
        monkeypatch.setattr(elementwise, "_has_compiler", lambda: False)


def slopes(function: Callable[[mx.array], mx.array], x: mx.array) -> np.ndarray:
    return np.array(mx.grad(lambda y: function(y).sum())(x))


@pytest.mark.usefixtures("either_path")
def test_exp_over_its_whole_range() -> None:
    x = mx.linspace(-87.0, 88.0, 20001)
    theirs = np.exp(np.array(x).astype(np.float64))
    assert np.abs(np.array(elementwise.exp(x)) / theirs - 1).max() < (
        4e-7 if elementwise.is_fast_here(x) else 5e-6
    )  # MLX's own is the coarser one
    np.testing.assert_allclose(slopes(elementwise.exp, x), theirs, rtol=5e-6)


@pytest.mark.usefixtures("either_path")
def test_exp_at_the_edges() -> None:
    y = np.array(elementwise.exp(mx.array([-mx.inf, -1e30, 0.0, 100.0, mx.inf, mx.nan])))
    np.testing.assert_array_equal(y, [0.0, 0.0, 1.0, np.inf, np.inf, np.nan])


@pytest.mark.usefixtures("either_path")
def test_swiglu_and_both_its_slopes() -> None:
    gate, up = mx.random.normal((7, 9), key=mx.random.key(0)) * 4, mx.random.normal((7, 9), key=mx.random.key(1))
    g, u = np.array(gate).astype(np.float64), np.array(up).astype(np.float64)
    s = 1 / (1 + np.exp(-g))
    np.testing.assert_allclose(np.array(elementwise.swiglu(gate, up)), g * s * u, atol=2e-6)
    by_gate, by_up = mx.grad(lambda a, b: elementwise.swiglu(a, b).sum(), argnums=(0, 1))(gate, up)
    np.testing.assert_allclose(np.array(by_gate), u * s * (1 + g * (1 - s)), atol=2e-6)
    np.testing.assert_allclose(np.array(by_up), g * s, atol=2e-6)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_of_swiglu_is_there_by_itself(dtype: mx.Dtype) -> None:
    gate, up, cotangent = (mx.random.normal((7, 9), key=mx.random.key(i)).astype(dtype) for i in range(3))
    g, u, c = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (gate, up, cotangent))
    s = 1 / (1 + np.exp(-g))
    by_gate, by_up = elementwise.swiglu_gradient(gate, up, cotangent)
    assert by_gate.dtype == by_up.dtype == dtype
    tolerance = 2e-6 if dtype == mx.float32 else 0.06
    np.testing.assert_allclose(np.array(by_gate.astype(mx.float32)), c * u * s * (1 + g * (1 - s)), atol=tolerance)
    np.testing.assert_allclose(np.array(by_up.astype(mx.float32)), c * g * s, atol=tolerance)


@pytest.mark.usefixtures("either_path")
def test_swiglu_of_large_gates_stays_finite() -> None:
    y = elementwise.swiglu(mx.array([-1e4, 1e4]), mx.array([1.0, 1.0]))
    assert y.tolist() == [0.0, 1e4]


def test_what_is_compiled_does_not_pile_up() -> None:
    for size in range(1, 300):
        elementwise.exp(mx.zeros((size,)))
    assert elementwise.compiled.cache_info().currsize <= 256


@pytest.mark.usefixtures("either_path")
def test_a_function_of_ones_own_is_compiled_once_for_its_shapes() -> None:
    traced = 0

    def scaled_power(x: mx.array, scale: float) -> mx.array:
        nonlocal traced
        traced += 1
        return elementwise.exponential(x * scale)

    x = mx.array([[-3.0, 0.0], [1.0, 2.5]])
    for _ in range(2):
        y = elementwise.compiled(scaled_power, x.shape)(x, 0.5)
        np.testing.assert_allclose(np.array(y), np.exp(np.array(x) * 0.5), rtol=1e-6)
    assert traced == 1
    assert elementwise.compiled(scaled_power, x.shape) is elementwise.compiled(scaled_power, x.shape)
    assert elementwise.compiled(scaled_power, (3,)) is not elementwise.compiled(scaled_power, x.shape)


def test_the_exponential_of_other_types_is_that_of_mlx() -> None:
    x = mx.array([0.5, -1.0], mx.bfloat16)
    assert mx.array_equal(elementwise.exponential(x), mx.exp(x)).item()


def test_on_a_gpu_mlx_computes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mx.array([0.5, -1.0])
    assert elementwise.is_on_cpu()
    compute_on(monkeypatch, cpu=False)
    assert not elementwise.is_on_cpu()
    assert not elementwise.is_fast_here(x)


def test_other_types_use_what_mlx_has() -> None:
    x = mx.array([0.5, -1.0], mx.bfloat16)
    assert not elementwise.is_fast_here(x)
    assert mx.array_equal(elementwise.exp(x), mx.exp(x)).item()
