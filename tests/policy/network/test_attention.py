"""Attention of whole rows against numpy; portions against the whole, in numbers and in memory; what is fused where.

Runs on a CPU, too, where MLX writes scores out as it does on a GPU without a fused kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from troupe.policy.network import gpu_attention
from troupe.policy.network.gpu_attention import (
    attention,
    attention_gradient,
    attention_is_fused,
    portion,
    scores_at_a_time,
)

R, H, K, S, D = 5, 6, 3, 16, 8
SCALE = 0.4
ROW = H * S * S


def rectangles(R: int, H: int, K: int, S: int) -> list[mx.array]:
    """Queries, keys, values, and a cotangent of what comes out."""
    keys = mx.random.split(mx.random.key(S), 4)
    found = [mx.random.normal((R, heads, S, D), key=key) for heads, key in zip((H, K, K, H), keys, strict=True)]
    mx.eval(found)
    return found


@pytest.fixture
def rows_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have so many scores written out at a time."""
    monkeypatch.setattr(gpu_attention, "attention_is_fused", lambda *of, **kind: False)
    return lambda scores: monkeypatch.setattr(gpu_attention, "PORTION", scores)


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
    monkeypatch.setattr(gpu_attention, "_has_cudnn_attention", lambda: True)
    for head_dim, dtype, forwards, backwards in kinds:
        assert attention_is_fused(head_dim, dtype, gradient=False, on_cpu=False) == forwards
        assert attention_is_fused(head_dim, dtype, gradient=True, on_cpu=False) == backwards
        assert not attention_is_fused(head_dim, dtype, gradient=False, on_cpu=True)


@pytest.mark.parametrize(("generation", "is_fused"), [(7, False), (8, True), (12, True), (None, True)])
def test_older_cards_have_nothing_fused(
    generation: int | None, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {} if generation is None else {"compute_capability_major": generation}
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    gpu_attention._has_cudnn_attention.cache_clear()
    try:
        assert attention_is_fused(128, mx.bfloat16, gradient=True, on_cpu=False) == is_fused
    finally:
        gpu_attention._has_cudnn_attention.cache_clear()


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
    assert portion(*sizes) == expected
    _, heads, kv_heads, places = sizes
    scores = scores_at_a_time(*sizes)
    assert scores == expected[0] * expected[1] * heads // kv_heads * places**2
    assert scores <= 2**26 or expected == (1, 1)


def test_attention_and_its_gradient_by_definition() -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    o = np.zeros((R, H, S, D))
    for head in range(H):
        keys, values = (np.array(x, np.float64)[:, head // (H // K)] for x in (k, v))
        scores = SCALE * np.array(q, np.float64)[:, head] @ keys.swapaxes(-1, -2)
        powers = np.where(np.tri(S) == 1, np.exp(scores), 0)
        o[:, head] = powers / powers.sum(axis=-1, keepdims=True) @ values
    np.testing.assert_allclose(np.array(attention(q, k, v, SCALE)), o, atol=2e-6)
    by_mlx = mx.grad(lambda q, k, v: (attention(q, k, v, SCALE) * o_grad).sum(), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(attention_gradient(q, k, v, SCALE, o_grad), by_mlx, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-6)


@pytest.mark.parametrize("scores", [5 * ROW, 4 * ROW, 2 * ROW, ROW, ROW // 2, ROW // 3, 1])
def test_portions_are_the_whole(scores: int, rows_cut: Callable[[int], None]) -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    rows_cut(R * ROW)
    whole = [attention(q, k, v, SCALE), *attention_gradient(q, k, v, SCALE, o_grad)]
    rows_cut(scores)
    cut = [attention(q, k, v, SCALE), *attention_gradient(q, k, v, SCALE, o_grad)]
    for one, other in zip(cut, whole, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-6, atol=1e-6)


def test_what_is_fused_is_one_whole_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, o_grad = rectangles(R, H, K, S)
    monkeypatch.setattr(gpu_attention, "attention_is_fused", lambda *of, **kind: True)
    monkeypatch.setattr(gpu_attention, "PORTION", 1)
    with monkeypatch.context() as patched:
        patched.setattr(mx, "eval", None)
        patched.setattr(mx, "concatenate", None)
        found = [attention(q, k, v, SCALE), *attention_gradient(q, k, v, SCALE, o_grad)]

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")

    expected = [plain(q, k, v), *mx.vjp(plain, [q, k, v], [o_grad])[1]]
    assert all(mx.array_equal(one, other).item() for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU lets go later")
@pytest.mark.parametrize(("rows", "share"), [(1, 1), (2, 1), (1, 2)])
def test_the_peak_is_that_of_a_portion(rows: int, share: int, rows_cut: Callable[[int], None]) -> None:
    """Of `rows` rows, or of a `share`-th of one row's heads."""
    q, k, v, o_grad = rectangles(8, 4, 2, 256)
    each = 4 * 256**2
    rows_cut(rows * each // share)
    gc.collect()
    limit = mx.set_memory_limit(1)  # nothing is begun ahead
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention_gradient(q, k, v, SCALE, o_grad))
        peak = mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)
    kept = 3 * (q.nbytes + k.nbytes + v.nbytes)  # portions, and what they are joined to
    assert 3 * 4 * rows * each // share < peak < 4 * 4 * rows * each // share + kept
    assert scores_at_a_time(8, 4, 2, 256) == rows * each // share
