"""Attention of whole rows and its gradient on NVIDIA cards, by kernels of our own: the same bits each time.

cuDNN's gradient adds parts of a query's gradient as they come. Here each sum belongs to one block, which adds in one
order: a kernel goes through the keys of some queries, another through the queries of some keys, which costs seven
products instead of five, and no pass through memory. Scores stay on the chip. Formulas: FlashAttention-2
(arXiv:2307.08691). Products are of 16-bit numbers with sums in float32.

Shapes: B rows, H query heads, K key/value heads, S places, d head size; all arrays (B, heads, S, d), and best as they
come from projections, (B, S, heads, d) with two axes swapped: then nothing is copied. `spans`, int32 (B, 2): of each
row, queries from the first number to before the second count, and as many keys as the second are there; of all others
the result is zero, and so is what goes back. None: all count.
"""

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

_SOURCES = Path(__file__).with_name("cuda")
_UNITS = Path(__file__).parents[1] / "cuda" / "units.cuh"
_HEAD_SIZES = frozenset({64, 128, 256})
_LARGEST_OF_BOTH = 128
"""Numbers of a head up to which a block has room for the cotangents of keys and of values."""
_PAD = 64
"""Numbers of queries, a float32 or two each, lie in multiples of so many."""
_COMMON = ("spans", "windows", "scale")
_SIGNATURES = {
    "attend_rows": (("q", "k", "v", *_COMMON), ("out", "normalizers")),
    "query_gradient": (("q", "k", "v", "o", "o_grad", "normalizers", *_COMMON), ("q_grad", "pairs")),
    "key_gradient": (("q", "k", "v", "o_grad", "pairs", *_COMMON), ("k_grad", "v_grad")),
}
_WARPS = {"attend_rows": 4, "query_gradient": 4, "key_gradient": 4}
_KEYS = _QUERIES = 64
"""Of a tile, but for the largest heads half as many."""
_PART = 64
"""Queries of a tile that are multiplied with keys at a time."""


@cache
def _kernel(name: str, shared_bytes: int) -> Any:
    inputs, outputs = _SIGNATURES[name]
    return mx.fast.cuda_kernel(
        name=f"troupe_{name}_{shared_bytes}",
        input_names=inputs,
        output_names=outputs,
        source=_source(name),
        header=_UNITS.read_text(encoding="utf-8"),
        shared_memory=shared_bytes,
    )


def _source(name: str) -> str:
    return "".join((_SOURCES / f"{file}.cu").read_text(encoding="utf-8") for file in ("tiles", name))


def can_serve(head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether these kernels know heads of this kind, here: 16-bit types on an NVIDIA card, Ampere or later; the largest
    heads on those whose blocks may share 132 KB."""
    if head_dim not in _HEAD_SIZES or dtype not in (mx.bfloat16, mx.float16) or not mx.cuda.is_available():
        return False
    major, minor = (int(mx.device_info().get(f"compute_capability_{part}", 8)) for part in ("major", "minor"))
    return major >= 8 and (head_dim <= _LARGEST_OF_BOTH or (major, minor) == (8, 0) or major in (9, 10))


def flash_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    window: int | None = None,
    spans: mx.array | None = None,
    result: bool = True,
) -> tuple[mx.array, mx.array]:
    """Queries (B, H, S, d), keys and values (B, K, S, d) → (B, H, S, d), and log₂ Σ 2^score of each query, float32
    (B, H, S rounded up to 64), for `flash_gradient`; neither is differentiable by MLX. A place
    sees itself and those before it, with a `window` so many in all. Without `result` only the latter; the former is
    then nothing."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    B, S, H, d = q.shape
    keys = _tile(_KEYS, d)
    rows = 16 * _WARPS["attend_rows"]
    out, normalizers = _launch(
        "attend_rows",
        [q, k, v, *_numbers(B, S, scale, window, spans)],
        tiles=rows + 4 * keys,
        numbers=[("KEYS", keys), ("RESULT", result)],
        heads=H,
        outputs=[(q.shape if result else (1,), q.dtype), ((B, H, _padded(S)), mx.float32)],
    )
    return (out.swapaxes(1, 2) if result else out), normalizers


def flash_gradient(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    o_grad: mx.array,
    o: mx.array,
    normalizers: mx.array,
    *,
    scale: float,
    window: int | None = None,
    spans: mx.array | None = None,
) -> list[mx.array]:
    """The cotangents of queries, keys and values from `o_grad`, that of the result `o`, both (B, H, S, d);
    `normalizers` as `flash_attention` gives them."""
    q, k, v, o_grad, o = (x.swapaxes(1, 2) for x in (q, k, v, o_grad, o))
    (B, S, H, d), K = q.shape, k.shape[2]
    keys, queries = _tile(_KEYS, d), _tile(_QUERIES, d)
    numbers = _numbers(B, S, scale, window, spans)
    q_grad, pairs = _launch(
        "query_gradient",
        [q, k, v, o, o_grad, normalizers, *numbers],
        tiles=2 * 16 * _WARPS["query_gradient"] + 4 * keys,
        numbers=[("KEYS", keys)],
        heads=H,
        outputs=[(q.shape, q.dtype), ((B, H, _padded(S), 2), mx.float32)],
    )
    together = d <= _LARGEST_OF_BOTH
    tile = [("QUERIES", queries), ("PART", min(_PART, queries))]
    found = [q_grad]
    for of_keys, of_values in [(True, True)] if together else [(True, False), (False, True)]:
        shapes = [(k.shape if of_keys else (1,), k.dtype), (v.shape if of_values else (1,), v.dtype)]
        both = _launch(
            "key_gradient",
            [q, k, v, o_grad, pairs, *numbers],
            tiles=2 * 16 * _WARPS["key_gradient"] + 4 * queries,
            numbers=[*tile, ("OF_KEYS", of_keys), ("OF_VALUES", of_values)],
            heads=K,
            outputs=shapes,
            beside=16 * queries,
        )
        found += [x for x, is_there in zip(both, (of_keys, of_values), strict=True) if is_there]
    return [x.swapaxes(1, 2) for x in found]


def _tile(rows: int, head_dim: int) -> int:
    return rows if head_dim <= _LARGEST_OF_BOTH else rows // 2


def _numbers(B: int, S: int, scale: float, window: int | None, spans: mx.array | None) -> list[mx.array]:
    if spans is None:
        spans = mx.broadcast_to(mx.array([0, S], mx.int32), (B, 2))
    return [spans, mx.array([S if window is None else min(window, S)], mx.int32), mx.array([scale])]


def _padded(S: int) -> int:
    return -(-S // _PAD) * _PAD


def _launch(
    name: str,
    inputs: list[mx.array],
    *,
    tiles: int,
    numbers: list[tuple[str, Any]],
    heads: int,
    outputs: list[tuple[tuple[int, ...], mx.Dtype]],
    beside: int = 0,
) -> list[mx.array]:
    """A block for some places of each head and row, with so many rows of `tiles` and bytes `beside` to share."""
    B, S, _, d = inputs[0].shape
    warps = _WARPS[name]
    found: list[mx.array] = _kernel(name, tiles * d * inputs[0].dtype.size + beside)(
        inputs=inputs,
        template=[("T", inputs[0].dtype), ("SIZE", d), ("WARPS", warps), *numbers],
        grid=(-(-S // (16 * warps)) * 32 * warps, heads, B),
        threadgroup=(32 * warps, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return found
