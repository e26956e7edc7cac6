"""The kernels of attention over whole rows and of its gradient, run on a processor, by the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from tests.support.devices import compute_on
from tests.support.emulated_cuda import EmulatedKernel
from troupe.policy.network import flash_attention as flash
from troupe.policy.network import packing as packing_module
from troupe.policy.network.flash_attention import RowsOfTokens, can_serve, flash_attention, flash_gradient
from troupe.policy.network.packing import Packing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
CASES = [
    # rows, heads, key heads, places, head size, type, window, spans
    (1, 2, 1, 40, 64, mx.bfloat16, None, None),
    (1, 1, 1, 130, 128, mx.float16, None, None),
    (2, 4, 2, 150, 64, mx.bfloat16, 50, [(0, 150), (70, 131)]),
    (2, 3, 1, 200, 128, mx.bfloat16, None, [(0, 100), (65, 200)]),
    (1, 4, 1, 77, 64, mx.float16, 10, None),
    (1, 2, 2, 129, 128, mx.bfloat16, 64, None),
    (2, 2, 1, 100, 256, mx.bfloat16, 33, [(0, 100), (40, 66)]),
    (3, 2, 1, 70, 64, mx.bfloat16, None, [(0, 1), (5, 5), (63, 70)]),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(name: str, shared_bytes: int) -> EmulatedKernel:
        return EmulatedKernel(name, *flash._SIGNATURES[name], flash._source(name), shared_memory=shared_bytes)

    monkeypatch.setattr(flash, "_kernel", kernel)


def packed(x: mx.array) -> mx.array:
    """(B, heads, S, d) → (B·S, heads, d)."""
    B, heads, S, d = x.shape
    return x.swapaxes(1, 2).reshape(B * S, heads, d)


def in_rows(x: mx.array, B: int) -> mx.array:
    """(B·S, heads, d) → (B, heads, S, d)."""
    return x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)


def numbers(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def by_definition(
    arrays: list[mx.array], scale: float, window: int, speaks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Results, log₂ Σ 2^score and the cotangents of queries, keys and values."""
    q, k, v, o_grad = map(numbers, arrays)
    B, H, S, d = q.shape
    K = k.shape[1]
    k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
    back = np.arange(S)[:, None] - np.arange(S)
    scores = np.where((back >= 0) & (back < window), scale * q @ k.swapaxes(-1, -2), -np.inf)
    peak = scores.max(-1, keepdims=True)
    powers = np.exp(scores - peak)
    total = powers.sum(-1, keepdims=True)
    powers /= total
    o, o_grad = powers @ v, np.where(speaks, o_grad, 0)
    grad = powers * (o_grad @ v.swapaxes(-1, -2) - (o_grad * o).sum(-1, keepdims=True))
    of_keys = scale * grad.swapaxes(-1, -2) @ q, powers.swapaxes(-1, -2) @ o_grad
    grads = [scale * grad @ k, *(x.reshape(B, K, H // K, S, d).sum(2) for x in of_keys)]
    return o, (peak + np.log(total))[..., 0] / np.log(2), grads


@pytest.mark.parametrize("warps", [4, 8])  # which multiply together, and each alone
@pytest.mark.parametrize(("B", "H", "K", "S", "d", "dtype", "window", "spans"), CASES)
def test_attention_and_its_gradient_by_definition(
    warps: int,
    monkeypatch: pytest.MonkeyPatch,
    B: int,
    H: int,
    K: int,
    S: int,
    d: int,
    dtype: mx.Dtype,
    window: int | None,
    spans: list[tuple[int, int]] | None,
) -> None:
    if d > 128 and warps == 8:
        pytest.skip("so large heads have blocks of four warps, each alone")
    for name in flash._WARPS:
        monkeypatch.setitem(flash._WARPS, name, warps)
    keys, scale = mx.random.split(mx.random.key(S), 4), 1.3 * d**-0.5
    arrays = [
        mx.random.normal((B, S, heads, d), key=key).astype(dtype).swapaxes(1, 2)
        for heads, key in zip((H, K, K, H), keys, strict=True)
    ]
    speaks = np.array([[a <= s < b for s in range(S)] for a, b in spans or [(0, S)] * B])[:, None, :, None]
    given = [[a, b, b, row * S, 0] for row, (a, b) in enumerate(spans or [(0, S)] * B)]
    rows = RowsOfTokens(mx.array(given, mx.int32), S)
    q, k, v, o_grad = map(packed, arrays)
    o, normalizers = flash_attention(q, k, v, rows, scale=scale, window=window)
    q_grad, *of_keys = flash_gradient(q, k, v, rows, o_grad, o, normalizers, scale=scale, window=window)
    found, o = [in_rows(q_grad, B), *(x.swapaxes(1, 2) for x in of_keys)], in_rows(o, B)
    expected, log_totals, grads = by_definition(arrays, scale, window or S, speaks)
    exactness = 1e-2 if dtype == mx.bfloat16 else 1.5e-3
    np.testing.assert_allclose(numbers(o), np.where(speaks, expected, 0), atol=exactness)
    of_queries = numbers(normalizers[:, :, :S])
    shown = np.broadcast_to(speaks[..., 0], of_queries.shape)
    np.testing.assert_allclose(of_queries[shown], log_totals[shown], atol=5e-6)
    assert np.isinf(of_queries[~shown]).all()
    for one, other in zip(found, grads, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(numbers(one), other, atol=exactness * np.abs(other).max())


def test_bits_do_not_depend_on_the_order_of_blocks_and_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = mx.random.split(mx.random.key(1), 4)
    q, k, v, o_grad = (
        mx.random.normal((300, heads, 64), key=key).astype(mx.bfloat16)
        for heads, key in zip((4, 2, 2, 4), keys, strict=True)
    )
    rows = RowsOfTokens(mx.array([[0, 150, 150, 0, 0], [0, 150, 150, 150, 0]], mx.int32), 150)
    found = []
    for seed in (None, "1", "2"):
        if seed is not None:
            monkeypatch.setenv("EMULATED_SEED", seed)
        o, normalizers = flash_attention(q, k, v, rows, scale=0.2)
        found.append([o, normalizers, *flash_gradient(q, k, v, rows, o_grad, o, normalizers, scale=0.2)])
    assert all(mx.array_equal(a, b).item() for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("window", [None, 30])
def test_packed_rows_attend_by_them_as_by_mlx(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on(monkeypatch, cpu=False)
    prompts, completions = [[1] * 70] * 3 + [[2] * 5] * 2, [[3] * 20, [], [4] * 60, [5] * 2, [6]]
    sizes = [(4, 64), (2, 64), (2, 64)]

    def attended() -> list[mx.array]:
        packing = Packing(prompts, completions)
        N = packing.ids.shape[0]
        q, k, v = (mx.random.normal((1, heads, N, d), key=mx.random.key(heads + d)) for heads, d in sizes)
        o_grad = mx.random.normal(q.shape, key=mx.random.key(0))
        q, k, v, o_grad = (x.astype(mx.float16) for x in (q, k, v, o_grad))
        o, grads = mx.vjp(lambda q, k, v: packing.attend(0, q, k, v, 0.1, window), [q, k, v], [o_grad])
        return [*o, *grads]

    by_mlx = attended()
    monkeypatch.setattr(packing_module, "can_serve", lambda head_dim, dtype: True)
    for one, other in zip(attended(), by_mlx, strict=True):
        np.testing.assert_allclose(numbers(one), numbers(other), atol=4e-3)


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for generation, expected, largest in (
        (7.5, False, False),
        (8.0, True, True),
        (8.6, True, False),
        (9.0, True, True),
    ):
        info = dict(
            zip(
                ("compute_capability_major", "compute_capability_minor"),
                map(int, f"{generation}".split(".")),
                strict=True,
            )
        )
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        assert can_serve(128, mx.bfloat16) == can_serve(64, mx.float16) == expected
        assert can_serve(256, mx.bfloat16) == largest
    assert not can_serve(80, mx.bfloat16)
    assert not can_serve(128, mx.float32)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert not can_serve(128, mx.bfloat16)


@pytest.mark.parametrize(("d", "most"), [(64, 99 << 10), (128, 99 << 10), (256, 163 << 10)])
def test_blocks_share_what_the_cards_that_are_served_have(d: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []

    def kernel(name: str, shared_bytes: int) -> Callable[..., list[mx.array]]:
        shared.append(shared_bytes)
        return lambda output_shapes, output_dtypes, **_: list(map(mx.zeros, output_shapes, output_dtypes))

    monkeypatch.setattr(flash, "_kernel", kernel)
    q, k = mx.zeros((9, 2, d), mx.bfloat16), mx.zeros((9, 1, d), mx.bfloat16)
    rows = RowsOfTokens(mx.array([[0, 9, 9, 0, 0]], mx.int32), 9)
    o, normalizers = flash_attention(q, k, k, rows, scale=1.0)
    flash_gradient(q, k, k, rows, o, o, normalizers, scale=1.0)
    assert len(shared) >= 3
    assert max(shared) <= most
