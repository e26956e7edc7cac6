"""The learner's CUDA kernels, their sources run on a processor, against MLX's own operations in float32."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from tests.support.devices import compute_on
from tests.support.emulated_cuda import EmulatedKernel
from tests.support.tiny import small_network
from troupe.policy.gradient.backward import completion_gradients, completion_statistics, side_by_side
from troupe.policy.network import fused_kernels, head, rotation
from troupe.policy.network.fused_kernels import row_sums, swiglu_gradients, turned_heads, turned_heads_gradient
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.tensors import init_weights

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


def test_the_cotangent_of_heads_may_be_one_number_for_all() -> None:
    x, tables = _random(1, 5, 2, 64), (mx.ones((5, 32)), mx.full((5, 32), 0.5))
    exact = mx.grad(lambda x: mx.sum(_turned(*tables, normalized=False)(x, mx.ones(64))))(x.astype(mx.float32))
    _same(mx.grad(lambda x: mx.sum(turned_heads(x, None, 1e-6, *tables)))(x), exact)


def test_what_kernels_do_not_know_goes_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fused_kernels, head):
        monkeypatch.setattr(module, "has_kernels", lambda: True)
    monkeypatch.setattr(head, "row_sums", lambda logits, scale: pytest.fail("a launch without blocks"))
    assert [x.shape for x in head._sums(mx.zeros((0, 8)), 1.0)] == [(0,)] * 3
    gate = mx.zeros((1, 2, 16), mx.bfloat16)
    assert fused_kernels.gates_back(gate, gate, gate)
    assert not fused_kernels.gates_back(gate, gate, gate.astype(mx.float32))
    assert not fused_kernels.gates_back(gate[..., :12])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_joined_networks_foretell_in_the_bits_of_their_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on(monkeypatch, cpu=False)
    for module in (fused_kernels, head, rotation):
        monkeypatch.setattr(module, "has_kernels", lambda: True)
    config = small_network(model_type=family, head_dim=64, initializer_range=0.3)
    weights = fuse_projections(config, init_weights(config, mx.random.key(3), dtype=mx.bfloat16))
    rows = [[5, 6, 7], [5, 6, 7]], [[1, 2, 3], [4]]
    found = completion_statistics(config, weights, *rows).log_probs

    def loss(statistics: TokenStatistics) -> tuple[mx.array, mx.array]:
        return statistics.log_probs.sum(), statistics.log_probs

    values: list[Any] = []
    for _ in side_by_side([completion_gradients(config, weights, *rows, loss)], (), values):
        pass
    assert mx.array_equal(values[0][1], found)
