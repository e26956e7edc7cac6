"""Attention in blocks and of whole rows by its definition in float64; portions against the whole; what is fused where.

Runs on a CPU, too, where MLX writes scores out as it does on a GPU without a fused kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from troupe.policy.network import attention
from troupe.policy.network.attention import (
    attention_in_blocks,
    attention_is_fused,
    attention_of_rows,
    block_size,
    gradient_in_blocks,
    gradient_of_rows,
    portion,
    query_blocks,
    scores_at_a_time,
)
from troupe.policy.network.exact_gradient import exact_gradient

B, R, H, K, S, D = 3, 5, 6, 3, 16, 8
SCALE = 0.4
ROW = H * S * S


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
def test_attention_in_blocks_is_that_of_the_definition(T: int, S: int, is_ragged: bool, size: float) -> None:
    real = ragged(S, T) if is_ragged else None
    q, k, v = arrays(T, S, size)
    o, normalizer = attention_in_blocks(q, k, v, SCALE, query_blocks(T, S, H // K, real))
    expected, log_total = by_definition(q, k, v, visible(T, S, real))
    np.testing.assert_allclose(np.array(o), expected, atol=2e-6 * size, rtol=1e-5)
    np.testing.assert_allclose(np.array(normalizer), log_total, atol=max(1e-5, 5e-7 * size), rtol=2e-6)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_gradients_in_blocks_are_those_of_mlx(T: int, S: int, is_ragged: bool) -> None:
    real = ragged(S, T) if is_ragged else None
    inputs, sees = arrays(T, S), mx.array(visible(T, S, real))[:, None]
    cotangent = mx.random.normal((B, H, T, D), key=mx.random.key(7))

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        k, v = (mx.repeat(x, H // K, axis=1) for x in (k, v))
        return mx.softmax(mx.where(sees, SCALE * (q @ k.swapaxes(-1, -2)), -mx.inf), axis=-1) @ v

    among = query_blocks(T, S, H // K, real)
    o, normalizer = attention_in_blocks(*inputs, SCALE, among)
    found = gradient_in_blocks(*inputs, SCALE, among, normalizer, cotangent, (o * cotangent).sum(-1))
    for ours, theirs in zip(found, mx.vjp(plain, list(inputs), [cotangent])[1], strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=3e-5)


def test_low_precision_goes_through_float32() -> None:
    q, k, v = arrays(70, 80, dtype=mx.bfloat16)
    among = query_blocks(70, 80, H // K)
    o, normalizer = attention_in_blocks(q, k, v, SCALE, among)
    expected, log_total = by_definition(q, k, v, visible(70, 80, None))
    assert (o.dtype, normalizer.dtype) == (mx.bfloat16, mx.float32)
    np.testing.assert_allclose(np.array(o.astype(mx.float32)), expected, atol=0.03)
    np.testing.assert_allclose(np.array(normalizer), log_total, atol=0.03)
    grads = gradient_in_blocks(q, k, v, SCALE, among, normalizer, o, (o * o).astype(mx.float32).sum(-1))
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


def test_masks_of_all_blocks_take_memory_by_the_keys_not_by_their_square() -> None:
    real = mx.ones((3, 2000), mx.bool_)
    mx.eval(real)
    before = mx.get_active_memory()
    among = query_blocks(1990, 2000, 2, real)
    mx.eval([(block.causal, block.padding) for block in among])
    assert [block.causal.shape[0] for block in among] == [block.keys for block in among]
    size = block_size(1990)
    assert len(among) == 31
    assert among[-1].stop - among[-1].start < size, "the last block is another size, and has a mask of its own"
    assert mx.get_active_memory() - before < 1.1 * (2 * 2000 * 2 * size + 3 * 2000) * 4


def rectangles(R: int, H: int, K: int, S: int) -> list[mx.array]:
    """Queries, keys, values, and a cotangent of what comes out."""
    keys = mx.random.split(mx.random.key(S), 4)
    found = [mx.random.normal((R, heads, S, D), key=key) for heads, key in zip((H, K, K, H), keys, strict=True)]
    mx.eval(found)
    return found


@pytest.fixture
def rows_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have so many scores written out at a time."""
    monkeypatch.setattr(attention, "attention_is_fused", lambda *of, **kind: False)
    return lambda scores: monkeypatch.setattr(attention, "PORTION", scores)


ON_CUDA = [
    (128, mx.bfloat16, True, True),
    (64, mx.float16, True, True),
    (16, mx.bfloat16, True, True),
    (128, mx.float32, False, False),
    (256, mx.bfloat16, False, False),
    (12, mx.bfloat16, False, False),
]
ON_METAL = [
    *[(d, dtype, True, False) for d in (64, 72, 80, 96, 128) for dtype in (mx.float32, mx.bfloat16)],
    *[(d, dtype, False, False) for d in (16, 112, 192, 256) for dtype in (mx.float32, mx.bfloat16)],
]


@pytest.mark.parametrize(
    ("has_cuda", "kinds"), [(True, ON_CUDA), (False, ON_METAL)], ids=["an NVIDIA card", "an Apple chip"]
)
def test_what_is_fused_where(
    has_cuda: bool, kinds: list[tuple[int, mx.Dtype, bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(attention, "_has_cudnn_attention", lambda: True)
    for head_dim, dtype, forwards, backwards in kinds:
        assert attention_is_fused(head_dim, dtype, gradient=False, on_cpu=False) == forwards
        assert attention_is_fused(head_dim, dtype, gradient=True, on_cpu=False) == backwards
        assert not attention_is_fused(head_dim, dtype, gradient=False, on_cpu=True)


@pytest.mark.parametrize(
    ("generation", "told", "is_fused"),
    [(7, "1", False), (8, "1", True), (8, "0", False), (12, "1", True), (None, "1", True)],
)
def test_older_cards_have_nothing_fused_nor_where_mlx_is_told_so(
    generation: int | None, told: str, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_CUDA_USE_CUDNN_SDPA", told)
    info = {} if generation is None else {"compute_capability_major": generation}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    attention._has_cudnn_attention.cache_clear()
    try:
        assert attention_is_fused(128, mx.bfloat16, gradient=True, on_cpu=False) == is_fused
    finally:
        attention._has_cudnn_attention.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((32, 16, 8, 640), (8, 8)),  # 10 rows would do, and 4 portions of 8 are as few
        ((4, 16, 8, 128), (4, 8)),
        ((3, 16, 8, 2048), (1, 8)),  # a row is a portion to the number
        ((3, 16, 8, 4096), (1, 2)),
        ((3, 32, 8, 4096), (1, 1)),
        ((3, 16, 8, 32768), (1, 1)),  # more than a portion: heads of one key are not parted
        ((1, 15, 5, 3072), (1, 2)),  # 2, 2, 1
    ],
)
def test_portions_are_as_few_as_will_do(sizes: tuple[int, int, int, int], expected: tuple[int, int]) -> None:
    assert portion(*sizes, 2**26) == expected
    _, heads, kv_heads, places = sizes
    scores = scores_at_a_time(*sizes)
    assert scores == expected[0] * expected[1] * heads // kv_heads * places**2
    assert scores <= 2**26 or expected == (1, 1)


def test_attention_and_its_gradient_by_definition() -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    expected, _ = by_definition(q, k, v, np.tri(S, dtype=bool)[None])
    np.testing.assert_allclose(np.array(attention_of_rows(q, k, v, SCALE)), expected, atol=2e-6)
    by_mlx = mx.grad(lambda q, k, v: (attention_of_rows(q, k, v, SCALE) * o_grad).sum(), argnums=(0, 1, 2))(q, k, v)
    o = attention_of_rows(q, k, v, SCALE)
    for one, other in zip(gradient_of_rows(q, k, v, SCALE, o_grad, o), by_mlx, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-6)


@pytest.mark.parametrize("window", [None, 5, 400])
@pytest.mark.parametrize("S", [33, 700, 1001])  # one block, two, and three of which the last is shorter
def test_the_exact_gradient_is_the_gradient(S: int, window: int | None) -> None:
    q, k, v, o_grad = rectangles(2, 4, 2, S)
    o = attention_of_rows(q, k, v, SCALE, window)
    expected = mx.vjp(lambda q, k, v: attention_of_rows(q, k, v, SCALE, window), [q, k, v], [o_grad])[1]
    found = exact_gradient(q, k, v, o_grad, o, scale=SCALE, window=window)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="the kernels of an NVIDIA card")
def test_the_gradient_on_a_card_is_the_same_each_time() -> None:
    """cuDNN's is not, from about three blocks of keys on."""
    keys = mx.random.split(mx.random.key(0), 4)
    q, k, v, o_grad = (
        mx.random.normal((8, heads, 900, 64), key=key).astype(mx.bfloat16)
        for heads, key in zip((4, 2, 2, 4), keys, strict=True)
    )
    o = attention_of_rows(q, k, v, 0.2)
    first, *others = (gradient_of_rows(q, k, v, 0.2, o_grad, o) for _ in range(6))
    assert all(mx.array_equal(a, b).item() for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("scores", [5 * ROW, 4 * ROW, 2 * ROW, ROW, ROW // 2, ROW // 3, 1])
def test_portions_are_the_whole(scores: int, rows_cut: Callable[[int], None]) -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    rows_cut(R * ROW)
    o = attention_of_rows(q, k, v, SCALE)
    whole = [attention_of_rows(q, k, v, SCALE), *gradient_of_rows(q, k, v, SCALE, o_grad, o)]
    rows_cut(scores)
    cut = [attention_of_rows(q, k, v, SCALE), *gradient_of_rows(q, k, v, SCALE, o_grad, o)]
    for one, other in zip(cut, whole, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-6, atol=1e-6)


def test_what_is_fused_is_one_whole_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    monkeypatch.setattr(attention, "attention_is_fused", lambda *of, **kind: True)
    monkeypatch.setattr(attention, "PORTION", 1)
    o = attention_of_rows(q, k, v, SCALE)
    with monkeypatch.context() as patched:
        patched.setattr(mx, "eval", None)
        patched.setattr(mx, "concatenate", None)
        found = [attention_of_rows(q, k, v, SCALE), *gradient_of_rows(q, k, v, SCALE, o_grad, o)]

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")

    expected = [plain(q, k, v), *mx.vjp(plain, [q, k, v], [o_grad])[1]]
    assert all(mx.array_equal(one, other).item() for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU lets go later")
@pytest.mark.parametrize(("rows", "share"), [(1, 1), (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_peak_is_that_of_a_portion(rows: int, share: int, rows_cut: Callable[[int], None]) -> None:
    """Of `rows` rows, or of a `share`-th of one row's heads."""
    q, k, v, o_grad = rectangles(8, 4, 2, 256)
    each = 4 * 256**2
    rows_cut(rows * each // share)
    o = attention_of_rows(q, k, v, SCALE)
    mx.eval(o)
    gc.collect()
    limit = mx.set_memory_limit(1)  # nothing is begun ahead
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient_of_rows(q, k, v, SCALE, o_grad, o))
        peak = mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)
    kept = 3 * (q.nbytes + k.nbytes + v.nbytes)  # portions, and what they are joined to
    assert 3 * 4 * rows * each // share < peak < 4 * 4 * rows * each // share + kept
    assert scores_at_a_time(8, 4, 2, 256) == rows * each // share
