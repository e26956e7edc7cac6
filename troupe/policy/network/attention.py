"""Attention, written out for processors; on a GPU by MLX's fused kernels, and where there are none, in portions.

On a processor queries go in blocks, each of which meets only the keys that it may see. Scores stand with keys as rows
and queries as columns, because MLX reduces columns several times as fast as rows on a CPU. Only the exponential is
compiled: what is fused with a broadcast array and computed in place, g++ does not vectorize. The gradient needs but one
number a query besides its result, the log of what its powers were divided by (Dao et al. 2022, arXiv:2205.14135).

Where a layer has a window, a token sees itself and some tokens before it. Then no kernel is fused on NVIDIA cards.

On a GPU whole rows attend. Where MLX has no fused kernel it writes all scores out, its gradient several times: too much
for whole batches. What MLX 0.32 fuses, and where, is known here alone.

Shapes: B rows, H query heads, K key/value heads, d head size; T queries, which are the last T of S tokens; in a block
b queries, which may see s keys.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.network.elementwise import compiled, exponential
from troupe.policy.network.exact_gradient import exact_gradient

BLOCK = 64
"""About so many queries are taken together: fewer waste less on keys out of sight, more suit matrix products."""
PORTION = 2**26
"""Scores that are written out at a time: a GPU is busy with fewer, and an array of them is 128 MB in 16-bit types."""
_LARGEST_CUDNN = 128
_WITHOUT_CUDNN = "MLX_CUDA_USE_CUDNN_SDPA"
_METAL_HEADS = frozenset({64, 72, 80, 96, 128})
"""Head sizes that Metal has a kernel for, and one that is faster."""


def block_size(T: int) -> int:
    """b: of T queries so many are taken together."""
    return -(-T // max(1, round(T / BLOCK)))


class Places(NamedTuple):
    """Positions of tokens, and how far back each sees."""

    queries: mx.array
    """(B or 1, T), int32."""
    keys: mx.array
    """(B or 1, S), int32."""
    window: int

    def part(self, start: int, stop: int, keys: int, heads_per_key: int, first: int = 0) -> mx.array:
        """Which keys of a block, from `first` on, are too far back, bools (B or 1, 1, s, H/K·b)."""
        queries = mx.tile(self.queries[:, start:stop], (1, heads_per_key))
        return self.keys[:, None, first:keys, None] <= queries[:, None, None, :] - self.window


class QueryBlock(NamedTuple):
    """Queries [start, stop) and the first `keys` keys."""

    start: int
    stop: int
    keys: int
    causal: mx.array
    """Added to the scores, float32 (s, H/K·b): 0, or −∞ where a key comes after the query."""
    padding: mx.array | None
    """The same where a key stands for nothing, (B, 1, s, 1); None where there is no such key."""
    far: Callable[..., mx.array] | None = None
    """Makes what tells which keys (from `first` on) are too far back, bools (B or 1, 1, s, H/K·b); None: none is."""

    def alone(self, first: int) -> "QueryBlock":
        """The same where there are only these queries, and the keys from `first` on."""
        padding = None if self.padding is None else self.padding[:, :, first:]
        far = None if self.far is None else partial(self.far, first=first)
        return QueryBlock(0, self.stop - self.start, self.keys - first, self.causal[first:], padding, far)


def query_blocks(
    T: int, S: int, heads_per_key: int, real: mx.array | None = None, places: Places | None = None
) -> list[QueryBlock]:
    """For T queries, the last of S tokens. `real`, bools (B, S): which keys count; each query must see one at least.
    `places`: where tokens see back only so far."""
    size = block_size(T)
    whole_blocks = T // size * size
    causal = _causal(S - T + whole_blocks, size, heads_per_key)
    padding = None if real is None else _bias(real[:, None, :, None])
    found = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        keys = S - T + stop
        sees = causal[whole_blocks - stop :] if stop <= whole_blocks else _causal(keys, stop - start, heads_per_key)
        counts = None if padding is None else padding[:, :, :keys]
        far = None if places is None else partial(places.part, start, stop, keys, heads_per_key)
        found.append(QueryBlock(start, stop, keys, sees, counts, far))
    return found


def _causal(keys: int, queries: int, heads_per_key: int) -> mx.array:
    """`QueryBlock.causal` of the last `queries` of so many keys. Its last rows serve as many queries of fewer keys: all
    blocks of a size share one array, which grows with the keys and not with their square."""
    return mx.tile(_bias(mx.arange(keys)[:, None] <= mx.arange(keys - queries, keys)), (1, heads_per_key))


def attention_mask(T: int, S: int, window: int | None) -> mx.array | str:
    """For T queries, the last of S tokens that follow each other: MLX's "causal", or bools (T, S) where a token sees
    less than all before it."""
    if window is None or window >= S:
        return "causal"
    queries, keys = mx.arange(S - T, S)[:, None], mx.arange(S)
    return mx.logical_and(keys <= queries, keys > queries - window)


def attention_in_blocks(
    q: mx.array, k: mx.array, v: mx.array, scale: float, among: Sequence[QueryBlock]
) -> tuple[mx.array, mx.array]:
    """Queries (B, H, T, d), keys and values (B, K, S, d) → (B, H, T, d), and log Σ e^score of each, float32 (B, H, T).

    Not differentiable.
    """
    B, H, T, d = q.shape
    q = q * scale
    outputs, normalizers = [], []
    for block in among:
        keys, values = k[:, :, : block.keys], v[:, :, : block.keys]
        scores = _scores(keys, _part(q, block, k), block)
        peak = mx.max(scores, axis=-2, keepdims=True)
        powers = compiled(exponential, scores.shape)(scores - peak)
        total = mx.sum(powers, axis=-2, keepdims=True)
        o = powers.astype(v.dtype).swapaxes(-1, -2) @ values
        outputs.append(_whole(o / total.swapaxes(-1, -2).astype(v.dtype), block, H))
        normalizers.append(_whole((peak + mx.log(total)).swapaxes(-1, -2), block, H))
        k, v = mx.depends([k, v], [outputs[-1]])  # one block after the other, or all scores would be held at once
    return _joined(outputs, 3).reshape(B, H, T, d), _joined(normalizers, 3).reshape(B, H, T)


def attention_block_by_block(
    q: mx.array, k: mx.array, v: mx.array, scale: float, among: Sequence[QueryBlock], window: int | None = None
) -> mx.array:
    """What `attention_in_blocks` gives first, each block computed before the next is begun: MLX runs ahead, and would
    hold the scores of several. `window`: where all rows have the same places, keys that no query of a block sees are
    left out."""
    found = []
    for block in among:
        first = 0 if window is None else max(0, block.keys - (block.stop - block.start) + 1 - window)
        seen = slice(first, block.keys)
        part = q[:, :, block.start : block.stop], k[:, :, seen], v[:, :, seen]
        found.append(attention_in_blocks(*part, scale, [block.alone(first)])[0])
        mx.eval(found[-1])
    return _joined(found, 2)


def gradient_in_blocks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    among: Sequence[QueryBlock],
    normalizer: mx.array,
    o_grad: mx.array,
    mean: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """The cotangents of q, k and v, from that of the result. `mean`: Σ over d of o_grad times result, (B, H, T)."""
    scaled, normalizer, mean = q * scale, normalizer[..., None], mean[..., None]
    q_grads: list[mx.array] = []
    k_grad: mx.array | None = None
    v_grad: mx.array | None = None
    for block in reversed(among):
        keys, values = k[:, :, : block.keys], v[:, :, : block.keys]
        queries, of_outputs = _part(scaled, block, k), _part(o_grad, block, k)
        log_total, means = (_part(x, block, k).swapaxes(-1, -2) for x in (normalizer, mean))
        scores = _scores(keys, queries, block)
        shares = compiled(exponential, scores.shape)(scores - log_total)
        v_grad = _added(v_grad, shares.astype(q.dtype) @ of_outputs)
        shares_grad = (values @ of_outputs.swapaxes(-1, -2)).astype(mx.float32)
        grad = (shares * (shares_grad - means)).astype(q.dtype)
        k_grad = _added(k_grad, grad @ queries)
        q_grads.append(_whole(grad.swapaxes(-1, -2) @ keys, block, q.shape[1]))
        k, v = mx.depends([k, v], [k_grad, v_grad, q_grads[-1]])
    assert k_grad is not None
    assert v_grad is not None
    return _joined(q_grads[::-1], 3).reshape(q.shape) * scale, k_grad, v_grad


def _scores(keys: mx.array, queries: mx.array, block: QueryBlock) -> mx.array:
    """Keys (B, K, s, d), scaled queries (B, K, n, d) → float32 (B, K, s, n)."""
    scores = (keys @ queries.swapaxes(-1, -2)).astype(mx.float32) + block.causal
    scores = scores if block.padding is None else scores + block.padding
    return scores if block.far is None else mx.where(block.far(), -mx.inf, scores)


def _part(x: mx.array, block: QueryBlock, k: mx.array) -> mx.array:
    """The queries of a block: (B, H, T, n) → (B, K, H/K·b, n), heads that share keys one after the other."""
    B, H, T, n = x.shape
    K = k.shape[1]
    return x.reshape(B, K, H // K, T, n)[:, :, :, block.start : block.stop].reshape(B, K, -1, n)


def _whole(x: mx.array, block: QueryBlock, H: int) -> mx.array:
    """(B, K, H/K·b, n) → (B, K, H/K, b, n)."""
    B, K, _, n = x.shape
    return x.reshape(B, K, H // K, block.stop - block.start, n)


def _joined(parts: list[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _added(total: mx.array | None, x: mx.array) -> mx.array:
    """Sums over blocks, (B, K, s, d): those that come later have fewer keys."""
    if total is None:
        return x
    keys = x.shape[2]
    return mx.concatenate([total[:, :, :keys] + x, total[:, :, keys:]], axis=2)


def _bias(sees: mx.array) -> mx.array:
    return mx.where(sees, 0.0, -mx.inf)


def attention_is_fused(head_dim: int, dtype: mx.Dtype, *, gradient: bool, on_cpu: bool, windowed: bool = False) -> bool:
    """Whether MLX computes attention of whole rows, or its `gradient`, without writing scores out.

    cuDNN has both for 16-bit types, unless tokens see back only so far (`windowed`), but a gradient that is not the
    same each time (see `gradient_is_exact`); Metal only the forward pass, a CPU (`on_cpu`) nothing.
    """
    if on_cpu:
        return False
    if mx.cuda.is_available():
        return (
            not windowed
            and dtype.size == 2
            and head_dim % 8 == 0
            and head_dim <= _LARGEST_CUDNN
            and _has_cudnn_attention()
        )
    return not gradient and head_dim in _METAL_HEADS


@cache
def _has_cudnn_attention() -> bool:
    """Whether the card is of the generation that cuDNN's attention begins with, Ampere, or a later one, and MLX is not
    told to do without it."""
    return os.environ.get(_WITHOUT_CUDNN) != "0" and int(mx.device_info().get("compute_capability_major", 8)) >= 8


def gradient_is_exact(dtype: mx.Dtype) -> bool:
    """Whether the gradient for whole rows is written out by ourselves where it is to be the same each time."""
    return mx.cuda.is_available() and dtype.size == 2


@cache
def exact_portion() -> int:
    """Scores at a time of such a gradient: the more, the fewer pauses, where a card has room for them."""
    memory = int(mx.device_info().get("memory_size", 0)) if mx.cuda.is_available() else 0
    return PORTION * (8 if memory >= 100e9 else 4 if memory >= 64e9 else 1)


def portion(rows: int, heads: int, kv_heads: int, places: int, most: int) -> tuple[int, int]:
    """How many rows, and of these how many key/value heads with their queries, are taken together where scores are
    written out: of one row's heads, too, no more than have `most` scores, but one at the least."""
    each = heads * places**2
    return _even(rows, most // each), _even(kv_heads, most * kv_heads // each)


def scores_at_a_time(rows: int, heads: int, kv_heads: int, places: int, most: int | None = None) -> int:
    """Scores of one portion, of PORTION or `most` of them."""
    some, kv = portion(rows, heads, kv_heads, places, PORTION if most is None else most)
    return some * kv * (heads // kv_heads) * places**2


def _even(count: int, most: int) -> int:
    """The size of the largest portion when `count` things are cut into as few about equal ones as have `most`."""
    return -(-count // -(-count // min(count, max(1, most))))


def attention_of_rows(q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None) -> mx.array:
    """Queries (B, H, S, d), keys and values (B, K, S, d) → (B, H, S, d): a place sees itself and those before it, with
    a `window` so many in all."""
    attend = _attending(q.shape[2], scale, window)
    if _is_fused(q, window, gradient=False):
        return attend(q, k, v)
    return _in_portions(lambda q, k, v: [attend(q, k, v)], [q, k, v])[0]


def gradient_of_rows(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    o_grad: mx.array,
    o: mx.array | None = None,
    window: int | None = None,
) -> list[mx.array]:
    """The cotangents of q, k and v from that of `o`, which `attention_of_rows` gave; the same bits each time, but
    without `o` not on an NVIDIA card."""
    if o is not None and gradient_is_exact(q.dtype):
        exact = partial(exact_gradient, scale=scale, window=window)
        return _in_portions(exact, [q, k, v, o_grad, o], exact_portion())
    attend = _attending(q.shape[2], scale, window)

    def gradient(q: mx.array, k: mx.array, v: mx.array, o_grad: mx.array) -> list[mx.array]:
        return mx.vjp(attend, [q, k, v], [o_grad])[1]

    if _is_fused(q, window, gradient=True):
        return gradient(q, k, v, o_grad)
    return _in_portions(gradient, [q, k, v, o_grad])


def _is_fused(q: mx.array, window: int | None, *, gradient: bool) -> bool:
    windowed = window is not None and window < q.shape[2]
    return attention_is_fused(q.shape[-1], q.dtype, gradient=gradient, on_cpu=False, windowed=windowed)


def _attending(S: int, scale: float, window: int | None) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    mask = attention_mask(S, S, window)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    return attend


def _in_portions(
    function: Callable[..., list[mx.array]], arrays: Sequence[mx.array], most: int | None = None
) -> list[mx.array]:
    """`function` of queries, keys and whatever else there is of rows and heads, portion by portion.

    Each is there before the next is begun, since a GPU holds the memory of all that it has been given to do.
    """
    (B, H, S, _), K = arrays[0].shape, arrays[1].shape[1]
    rows, heads = portion(B, H, K, S, PORTION if most is None else most)
    by_rows: list[list[mx.array]] = []
    found: list[mx.array] = []
    for row in range(0, B, rows):
        by_heads = []
        for head in range(0, K, heads):
            mx.eval(found)
            found = function(*(_cut(x, K, slice(row, row + rows), head, head + heads) for x in arrays))
            by_heads.append(found)
        by_rows.append(_joined_each(by_heads, axis=1))
    return _joined_each(by_rows, axis=0)


def _cut(x: mx.array, K: int, rows: slice, start: int, stop: int) -> mx.array:
    """Of (B, heads, S, d) these rows, and the heads that belong to the key/value heads from `start` to `stop`."""
    each = x.shape[1] // K
    return x[rows, start * each : stop * each]


def _joined_each(parts: Sequence[list[mx.array]], axis: int) -> list[mx.array]:
    return [_joined(list(arrays), axis) for arrays in zip(*parts, strict=True)]
