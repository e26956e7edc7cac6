"""Attention in blocks against attention by definition in float64, and its gradient against that of MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from troupe.policy.network.attention import attention, attention_gradient, block_size, query_blocks

B, H, K, D = 3, 4, 2, 8
SCALE = 0.4


def arrays(T: int, S: int, size: float = 1.0, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    q, k, v = (
        mx.random.normal((B, heads, n, D), key=mx.random.key(i))
        for i, (heads, n) in enumerate([(H, T), (K, S), (K, S)])
    )
    return (q * size).astype(dtype), k.astype(dtype), v.astype(dtype)


def visible(T: int, S: int, real: mx.array | None) -> np.ndarray:
    """Bools (B, T, S), place by place."""
    keys = np.ones((B, S), bool) if real is None else np.array(real)
    return np.array([[[keys[b, s] and s <= S - T + t for s in range(S)] for t in range(T)] for b in range(B)])


def by_definition(q: mx.array, k: mx.array, v: mx.array, sees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Results and log Σ e^score in float64."""
    queries, keys, values = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    scores = SCALE * queries @ np.repeat(keys, H // K, axis=1).swapaxes(-1, -2)
    scores = np.where(sees[:, None], scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    powers = np.exp(scores - peak)
    total = powers.sum(-1, keepdims=True)
    return powers / total @ np.repeat(values, H // K, axis=1), (peak + np.log(total))[..., 0]


def ragged(S: int, T: int) -> mx.array:
    """Of three rows one has all keys, the others lack some before the queries."""
    return mx.logical_or(mx.arange(S) >= S - T, mx.arange(S) < mx.array([S, 1, 2])[:, None])


SIZES = [(1, 1), (5, 5), (3, 9), (130, 130), (150, 170)]


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize(("T", "S"), SIZES)
@pytest.mark.parametrize("size", [1.0, 200.0], ids=["small scores", "large scores"])
def test_attention_is_that_of_the_definition(T: int, S: int, is_ragged: bool, size: float) -> None:
    real = ragged(S, T) if is_ragged else None
    q, k, v = arrays(T, S, size)
    o, normalizer = attention(q, k, v, SCALE, query_blocks(T, S, H // K, real))
    expected, log_total = by_definition(q, k, v, visible(T, S, real))
    np.testing.assert_allclose(np.array(o), expected, atol=2e-6 * size, rtol=1e-5)
    np.testing.assert_allclose(np.array(normalizer), log_total, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_gradients_are_those_of_mlx(T: int, S: int, is_ragged: bool) -> None:
    real = ragged(S, T) if is_ragged else None
    inputs, sees = arrays(T, S), mx.array(visible(T, S, real))[:, None]
    cotangent = mx.random.normal((B, H, T, D), key=mx.random.key(7))

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        k, v = (mx.repeat(x, H // K, axis=1) for x in (k, v))
        return mx.softmax(mx.where(sees, SCALE * (q @ k.swapaxes(-1, -2)), -mx.inf), axis=-1) @ v

    among = query_blocks(T, S, H // K, real)
    o, normalizer = attention(*inputs, SCALE, among)
    found = attention_gradient(*inputs, SCALE, among, normalizer, cotangent, (o * cotangent).sum(-1))
    for ours, theirs in zip(found, mx.vjp(plain, list(inputs), [cotangent])[1], strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=3e-5)


def test_low_precision_goes_through_float32() -> None:
    q, k, v = arrays(70, 80, dtype=mx.bfloat16)
    among = query_blocks(70, 80, H // K)
    o, normalizer = attention(q, k, v, SCALE, among)
    expected, log_total = by_definition(q, k, v, visible(70, 80, None))
    assert (o.dtype, normalizer.dtype) == (mx.bfloat16, mx.float32)
    np.testing.assert_allclose(np.array(o.astype(mx.float32)), expected, atol=0.03)
    np.testing.assert_allclose(np.array(normalizer), log_total, atol=0.03)
    grads = attention_gradient(q, k, v, SCALE, among, normalizer, o, (o * o).astype(mx.float32).sum(-1))
    assert all(grad.dtype == mx.bfloat16 for grad in grads)


@pytest.mark.parametrize(("T", "size"), [(1, 1), (64, 64), (95, 95), (97, 49), (127, 64), (800, 67)])
def test_blocks_are_of_about_one_size(T: int, size: int) -> None:
    assert block_size(T) == size


def test_blocks_by_hand() -> None:
    (only,) = query_blocks(2, 3, 2)
    assert (only.start, only.stop, only.keys, only.padding) == (0, 2, 3, None)
    assert only.causal.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [-mx.inf, 0, -mx.inf, 0]]
    first, second = query_blocks(100, 110, 1, mx.ones((2, 110), mx.bool_))
    assert [(block.start, block.stop, block.keys) for block in (first, second)] == [(0, 50, 60), (50, 100, 110)]
    assert first.padding is not None
    assert first.padding.shape == (2, 1, 60, 1)
