"""Attention within whole rows on a GPU: MLX's fused kernels, and where there are none, in portions.

Where MLX has no fused kernel it writes all scores out, its gradient several times: too much for whole batches. What
MLX 0.32 fuses, and where, is known here alone.

Shapes: R rows, H query heads, K key/value heads, S places, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

PORTION = 2**26
"""Scores that are written out at a time: a GPU is busy with fewer, and an array of them is 128 MB in 16-bit types."""
_LARGEST_CUDNN = 128
_METAL_HEADS = frozenset({64, 72, 80, 96, 128})
"""Head sizes that Metal has a kernel for, and one that is faster."""


def attention_is_fused(head_dim: int, dtype: mx.Dtype, *, gradient: bool, on_cpu: bool) -> bool:
    """Whether MLX computes attention of whole rows, or its `gradient`, without writing scores out.

    cuDNN has both for 16-bit types, Metal only the forward pass, a CPU (`on_cpu`) nothing.
    """
    if on_cpu:
        return False
    if mx.cuda.is_available():
        return dtype.size == 2 and head_dim % 8 == 0 and head_dim <= _LARGEST_CUDNN and _has_cudnn_attention()
    return not gradient and head_dim in _METAL_HEADS


@cache
def _has_cudnn_attention() -> bool:
    """Whether the card is of the generation that cuDNN's attention begins with, Ampere, or a later one."""
    return int(mx.device_info().get("compute_capability_major", 8)) >= 8


def portion(rows: int, heads: int, kv_heads: int, places: int) -> tuple[int, int]:
    """How many rows, and of these how many key/value heads with their queries, are taken together where scores are
    written out: of one row's heads, too, no more than have PORTION scores, but one at the least."""
    each = heads * places**2
    return _even(rows, PORTION // each), _even(kv_heads, PORTION * kv_heads // each)


def scores_at_a_time(rows: int, heads: int, kv_heads: int, places: int) -> int:
    """Scores of one portion."""
    some, kv = portion(rows, heads, kv_heads, places)
    return some * kv * (heads // kv_heads) * places**2


def _even(count: int, most: int) -> int:
    """The size of the largest portion when `count` things are cut into as few about equal ones as have `most`."""
    return -(-count // -(-count // min(count, max(1, most))))


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Queries (R, H, S, d), keys and values (R, K, S, d) → (R, H, S, d): a place sees itself and those before it."""

    def attend(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [_attend(q, k, v, scale)]

    if attention_is_fused(q.shape[-1], q.dtype, gradient=False, on_cpu=False):
        return _attend(q, k, v, scale)
    return _in_portions(attend, [q, k, v])[0]


def attention_gradient(q: mx.array, k: mx.array, v: mx.array, scale: float, o_grad: mx.array) -> list[mx.array]:
    """The cotangents of q, k and v from that of what `attention` gave."""

    def gradient(q: mx.array, k: mx.array, v: mx.array, o_grad: mx.array) -> list[mx.array]:
        return mx.vjp(lambda q, k, v: _attend(q, k, v, scale), [q, k, v], [o_grad])[1]

    if attention_is_fused(q.shape[-1], q.dtype, gradient=True, on_cpu=False):
        return gradient(q, k, v, o_grad)
    return _in_portions(gradient, [q, k, v, o_grad])


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def _in_portions(function: Callable[..., list[mx.array]], arrays: Sequence[mx.array]) -> list[mx.array]:
    """`function` of queries, keys and whatever else there is of rows and heads, portion by portion.

    Each is there before the next is begun, since a GPU holds the memory of all that it has been given to do.
    """
    (R, H, S, _), K = arrays[0].shape, arrays[1].shape[1]
    rows, heads = portion(R, H, K, S)
    by_rows: list[list[mx.array]] = []
    found: list[mx.array] = []
    for row in range(0, R, rows):
        by_heads = []
        for head in range(0, K, heads):
            mx.eval(found)
            found = function(*(_cut(x, K, slice(row, row + rows), head, head + heads) for x in arrays))
            by_heads.append(found)
        by_rows.append(_joined(by_heads, axis=1))
    return _joined(by_rows, axis=0)


def _cut(x: mx.array, K: int, rows: slice, start: int, stop: int) -> mx.array:
    """Of (R, heads, S, d) these rows, and the heads that belong to the key/value heads from `start` to `stop`."""
    each = x.shape[1] // K
    return x[rows, start * each : stop * each]


def _joined(parts: Sequence[list[mx.array]], axis: int) -> list[mx.array]:
    if len(parts) == 1:
        return parts[0]
    return [mx.concatenate(list(arrays), axis=axis) for arrays in zip(*parts, strict=True)]
