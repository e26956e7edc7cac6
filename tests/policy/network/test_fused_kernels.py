"""The learner's CUDA kernels, their sources run on a processor, against MLX's own operations in float32."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from tests.support.emulated_cuda import EmulatedKernel
from troupe.policy.network import fused_kernels
from troupe.policy.network.fused_kernels import row_sums, swiglu_gradients, turned_heads, turned_heads_gradient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the kernels are compiled by g++"),
]


@pytest.fixture(autouse=True)
def _on_a_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mx.fast, "cuda_kernel", EmulatedKernel)
    fused_kernels._kernel.cache_clear()
    yield
    fused_kernels._kernel.cache_clear()


def _random(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _same(found: mx.array, expected: mx.array, bound: float = 8e-3) -> None:
    error = mx.linalg.norm(found.astype(mx.float32) - expected, stream=mx.cpu) / mx.linalg.norm(expected, stream=mx.cpu)
    assert bool(mx.all(mx.abs(error) < bound))


def _turned(cosines: mx.array, sines: mx.array, *, normalized: bool) -> Callable[..., Any]:
    def function(x: mx.array, scale: mx.array) -> mx.array:
        y = mx.fast.rms_norm(x, scale, 1e-6) if normalized else x
        a, b = mx.split(y, 2, axis=-1)
        c, s = cosines[:, None], sines[:, None]
        return mx.concatenate([a * c - b * s, a * s + b * c], axis=-1)

    return function


@pytest.mark.parametrize(("d", "normalized"), [(64, True), (128, True), (128, False), (256, True)])
def test_heads_are_normalized_and_turned_and_back(d: int, normalized: bool) -> None:
    x, y_grad = _random(1, 21, 3, d), _random(1, 21, 3, d, seed=1)
    scale = _random(d, seed=2) if normalized else None
    angles = mx.arange(21)[:, None] * mx.exp(-mx.arange(d // 2) / 9.0)
    tables = mx.cos(angles), mx.sin(angles)
    exact = [x.astype(mx.float32), mx.ones(d) if scale is None else scale.astype(mx.float32)]
    expected, grads = mx.vjp(_turned(*tables, normalized=normalized), exact, [y_grad.astype(mx.float32)])
    _same(turned_heads(x, scale, 1e-6, *tables), expected[0])
    of_x, of_scale = turned_heads_gradient(x, scale, 1e-6, *tables, y_grad)
    _same(of_x, grads[0])
    assert (of_scale is None) is not normalized
    if of_scale is not None:
        _same(of_scale, grads[1])


@pytest.mark.parametrize("columns", [1, 200, 1000])
def test_sums_of_rows_of_logits(columns: int) -> None:
    logits = 5 * _random(7, columns)
    peak, total, weighted = row_sums(logits, 0.5)
    exact = logits.astype(mx.float32) * 0.5
    z = exact - mx.max(exact, axis=-1, keepdims=True)
    assert mx.array_equal(peak, mx.max(exact, axis=-1))
    assert mx.allclose(total, mx.sum(mx.exp(z), axis=-1), rtol=1e-5)
    assert mx.allclose(weighted, mx.sum(mx.exp(z) * z, axis=-1), rtol=1e-4)


def test_gradient_of_swiglu() -> None:
    gate, up, z_grad = (_random(1, 37, 48, seed=seed) for seed in range(3))
    exact = [x.astype(mx.float32) for x in (gate, up, z_grad)]
    _, grads = mx.vjp(lambda g, u: g * mx.sigmoid(g) * u, exact[:2], exact[2:])
    _same(swiglu_gradients(gate, up, z_grad), mx.concatenate(grads, axis=-1))
