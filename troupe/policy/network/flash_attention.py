"""Attention of whole rows and its gradient on NVIDIA cards, by kernels of our own: the same bits each time.

cuDNN's gradient adds parts of a query's gradient as they come. Here each sum belongs to one block, which adds in one
order: a kernel goes through the keys of some queries, another through the queries of some keys, which costs seven
products instead of five, and no pass through memory. Scores stay on the chip. Formulas: FlashAttention-2
(arXiv:2307.08691). Products are of 16-bit numbers with sums in float32.

Tokens are read and written where they are packed: no rows are laid out, and a prompt that several rows share stands
once.

Shapes: N packed tokens in R rows of at most S places, H query heads, K key/value heads, d head size.
"""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from troupe.policy.cuda import cuda_header

_SOURCES = Path(__file__).with_name("cuda")
_HEAD_SIZES = frozenset({64, 128, 256})
_LARGEST_OF_BOTH = 128
"""Numbers of a head up to which a block has room for the cotangents of keys and of values."""
_PAD = 64
"""What is known of a row's queries, a float32 or two each, lies in multiples of so many."""
_COMMON = ("spans", "limits", "scale")
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
        header=cuda_header(),
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


class RowsOfTokens(NamedTuple):
    """Which packed tokens make which rows."""

    spans: mx.array
    """Of each row, int32 (R, 5): from which place on it is asked about, all tokens asked about once; its length; that
    of its prompt; how far behind its place a token of the prompt is packed, and one of the rest."""
    places: int
    """S."""


def flash_attention(
    q: mx.array, k: mx.array, v: mx.array, rows: RowsOfTokens, *, scale: float, window: int | None = None
) -> tuple[mx.array, mx.array]:
    """Queries (N, H, d), keys and values (N, K, d) → (N, H, d), and log₂ Σ 2^score of each query, float32 (R, H, S
    rounded up to 64), inf where none is asked about, for `flash_gradient`; neither is differentiable by MLX. A place
    sees itself and those before it in its row, with a `window` so many in all."""
    _, H, d = q.shape
    keys = _tile(_KEYS, d)
    out, normalizers = _launch(
        "attend_rows",
        [q, k, v],
        rows,
        (scale, window),
        tiles=16 * _WARPS["attend_rows"] + 3 * keys,
        numbers=[("KEYS", keys)],
        heads=H,
        outputs=[(q.shape, q.dtype), ((rows.spans.shape[0], H, _padded(rows.places)), mx.float32)],
    )
    return out, normalizers


def flash_gradient(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    rows: RowsOfTokens,
    o_grad: mx.array,
    o: mx.array,
    normalizers: mx.array,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """The cotangents of queries (N, H, d) and, of each row apart, of keys and values (R, S, K, d), of which what is
    behind a row's end is not written; from `o_grad`, that of the result `o`, both (N, H, d), and `normalizers` as
    `flash_attention` gives them."""
    (_, H, d), K = q.shape, k.shape[1]
    R, of_scores = rows.spans.shape[0], (scale, window)
    keys, queries = _tile(_KEYS, d), _tile(_QUERIES, d)
    q_grad, pairs = _launch(
        "query_gradient",
        [q, k, v, o, o_grad, normalizers],
        rows,
        of_scores,
        tiles=2 * 16 * _WARPS["query_gradient"] + 4 * keys,
        numbers=[("KEYS", keys)],
        heads=H,
        outputs=[(q.shape, q.dtype), ((R, H, _padded(rows.places), 2), mx.float32)],
    )
    tile = [("QUERIES", queries), ("PART", min(_PART, queries))]
    found: list[mx.array] = []
    for of_keys, of_values in [(True, True)] if d <= _LARGEST_OF_BOTH else [(True, False), (False, True)]:
        shape = R, rows.places, K, d
        both = _launch(
            "key_gradient",
            [q, k, v, o_grad, pairs],
            rows,
            of_scores,
            tiles=2 * 16 * _WARPS["key_gradient"] + 4 * queries,
            numbers=[*tile, ("OF_KEYS", of_keys), ("OF_VALUES", of_values)],
            heads=K,
            outputs=[(shape if of_keys else (1,), k.dtype), (shape if of_values else (1,), v.dtype)],
            beside=16 * queries,
        )
        found += [x for x, is_there in zip(both, (of_keys, of_values), strict=True) if is_there]
    return q_grad, found[0], found[1]


def _tile(rows: int, head_dim: int) -> int:
    return rows if head_dim <= _LARGEST_OF_BOTH else rows // 2


def _padded(S: int) -> int:
    return -(-S // _PAD) * _PAD


@lru_cache(64)
def _limits(places: int, window: int | None) -> mx.array:
    return mx.array([places if window is None else min(window, places), places], mx.int32)


@lru_cache(64)
def _scale(scale: float) -> mx.array:
    return mx.array([scale])


def _launch(
    name: str,
    inputs: list[mx.array],
    rows: RowsOfTokens,
    of_scores: tuple[float, int | None],
    *,
    tiles: int,
    numbers: list[tuple[str, Any]],
    heads: int,
    outputs: list[tuple[tuple[int, ...], mx.Dtype]],
    beside: int = 0,
) -> list[mx.array]:
    """A block for some places of each head and row, with so many rows of `tiles` and bytes `beside` to share;
    `of_scores`: their scale, and the window."""
    d, dtype = inputs[0].shape[-1], inputs[0].dtype
    (scale, window), warps = of_scores, _WARPS[name]
    found: list[mx.array] = _kernel(name, tiles * d * dtype.size + beside)(
        inputs=[*inputs, rows.spans, _limits(rows.places, window), _scale(scale)],
        template=[("T", dtype), ("SIZE", d), ("WARPS", warps), *numbers],
        grid=(-(-rows.places // (16 * warps)) * 32 * warps, heads, rows.spans.shape[0]),
        threadgroup=(32 * warps, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
    return found
