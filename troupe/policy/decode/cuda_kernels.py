"""Kernels of our own for one new token a row, on NVIDIA cards: a layer in ten launches instead of thirty.

A decoding step of a small model costs what its launches cost, not what it computes. MLX compiles the sources, in the
folder `cuda`, when they are first used, once for each type and kind of head: numbers of rows and tokens are told when
they run. Each kernel has its plain twin in MLX's own operations (`forward.py`, `cache.py`, `loop.py`), which serves
every other device and is what the tests compare with.

Attention has two: by the matrix units, for the 16-bit types of cards that have them, and by sums for all else. Whoever
reads them may begin with the one by sums. By the matrix units, all rows of a prompt meet its keys at once, so that
these are read once a prompt.

Shapes: B rows, S prompts, w = B/S rows a prompt, H query heads, K key/value heads, R = H/K, d head size, P longest
prompt, N places for own tokens. T is the type of the weights; sums are float32.

Sources: online softmax (arXiv:1805.02867), split over the context as in Flash-Decoding (arXiv:2311.01282); the weights
of a sum stay where the matrix units left them, as in FlashAttention-2 (arXiv:2307.08691).
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from troupe.policy.cuda import cuda_header
from troupe.policy.cuda_memory import shared_memory_limit

SOURCES = Path(__file__).with_name("cuda")
_THREADS = 256
_HEAD_SIZES = frozenset({64, 128, 256})
"""Of each, sixteen lanes take parts that the card loads at once."""

_BLOCKS_WANTED = 528
"""Of the kernel by sums, four for each multiprocessor of an H100: with fewer, the context is split among several."""
_LEAST_SPLIT = 128
"""Tokens of context that are worth a split."""
_LARGEST_GROUP = 1280
"""R·d: of each such number a block shares nine float32, beside 2.4 KB of its own."""

WARPS = 8
"""Of a block of the kernel by the matrix units."""
_QUERIES = 16
"""That meet the prompt's keys at once: of so many rows times heads of a group."""
_ITEMS_WANTED = 132
"""Blocks of that kernel, one for each multiprocessor of an H100: with fewer, a block takes fewer rows of a prompt, and
a long context is split among several."""
_HALF_SHARED = 113 * 1024
"""Bytes that a block may share where two are at work on a multiprocessor of Hopper."""
_TWO_BLOCKS = f"""
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({32 * WARPS}, 2)
"""
"""MLX writes the head of the function, so it is told here that two blocks are to fit: 128 registers a thread."""
_WORTH_JOINING = 2048
"""Tokens of context from which a second kernel, which joins what several blocks found, costs less than it saves."""
_LEAST_OF_BLOCK = 512
"""Tokens of context that a block is then left with, at the least."""

_ATTEND = (
    *("qkv", "scales", "cosines", "sines", "prompt_keys", "prompt_values"),
    *("own", "lengths", "step", "constants"),
)
_FILTERED = (
    *("logits", "uniforms", "filter_uniforms", "recent"),
    *("numbers", "counts", "bias_ids", "bias", "spared"),
)
SIGNATURES = {
    "attend_by_sums": (_ATTEND, ("out", "parts")),
    "attend_by_units": (_ATTEND, ("out", "parts")),
    "join": (("mixed", "parts"), ("out",)),
    "gate": (("both",), ("out",)),
    "draw": (("logits", "uniforms", "constants"), ("ids", "log_probs")),
    "draw_filtered": (_FILTERED, ("ids", "log_probs", "sampled", "scaled")),
}
"""What each kernel takes and gives, by the names that its source uses."""


@cache
def kernel(name: str, shared_memory: int = 0) -> Any:
    """That of the source `name`.cu, as MLX calls it. `shared_memory`: bytes of a block; kernels that differ in them
    have other template values, too."""
    inputs, outputs = SIGNATURES[name]
    headers = (SOURCES / "attend.cuh",) if name == "attend_by_units" else ()
    bound = _TWO_BLOCKS if 0 < shared_memory <= _HALF_SHARED else ""
    return mx.fast.cuda_kernel(
        name=f"troupe_{name}",
        input_names=inputs,
        output_names=outputs,
        source=source_of(name),
        header=cuda_header(*headers) + bound,
        shared_memory=shared_memory,
    )


def source_of(name: str) -> str:
    """The body of a kernel: its file, with the one before it that it goes on from."""
    files = ("adjust", name) if name == "draw_filtered" else (name,)
    return "".join((SOURCES / f"{file}.cu").read_text(encoding="utf-8") for file in files)


def are_available() -> bool:
    """Whether these kernels can be used: MLX computes on an NVIDIA card."""
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


class Launch(NamedTuple):
    """How the work of `attend` is divided."""

    by_units: bool
    """Whether by the matrix units."""
    grid: tuple[int, int, int]
    """Threads in all."""
    block: tuple[int, int, int]
    """Threads of a block."""
    splits: int
    """Blocks that share the context of a row's heads."""
    together: int = 1
    """Rows of a prompt that a block of the matrix units takes at most."""


def can_serve(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` knows heads of this kind, here: a warp each for a group's queries, key and value, and what all
    warps share of the queries in 48 KiB."""
    group = heads // kv_heads
    return are_available() and head_dim in _HEAD_SIZES and group <= 6 and group * head_dim <= _LARGEST_GROUP


def plan_launch(
    rows: int, width: int, heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype, context: int
) -> Launch:
    """How to divide the work of so many rows, `width` a prompt, of which the longest sees `context` tokens."""
    pairs = rows * kv_heads
    group = heads // kv_heads
    fits = attend_shared_bytes(group, head_dim) <= shared_memory_limit()
    if dtype.size > 2 or not fits or not have_matrix_units():
        splits = max(1, min(_BLOCKS_WANTED // pairs, context // _LEAST_SPLIT))
        return Launch(False, (pairs * splits * _THREADS, 1, 1), (_THREADS, 1, 1), splits)
    together, splits = min(width, _QUERIES // group), 1
    while together > 1 and 2 * _items(rows, width, kv_heads, together) <= _ITEMS_WANTED:
        together = -(-together // 2)
    items = _items(rows, width, kv_heads, together)
    if context >= _WORTH_JOINING:
        splits = max(1, min(_ITEMS_WANTED // items, context // _LEAST_OF_BLOCK))
    return Launch(True, (32 * WARPS * items, splits, 1), (32 * WARPS, 1, 1), splits, together)


def _items(rows: int, width: int, kv_heads: int, together: int) -> int:
    """Blocks that take up to `together` of a prompt's rows, and a key/value head."""
    return rows // width * kv_heads * -(-width // together)


def attend_shared_bytes(group: int, head_dim: int) -> int:
    """What a block of the kernel by the matrix units shares (`AttendShared`)."""
    own = max(_QUERIES, WARPS * group)
    of_queries = _QUERIES * (head_dim + 8) * 2 + _QUERIES // group * 2 * head_dim * 2
    return of_queries + (WARPS * _QUERIES * (head_dim + 6) + own * (head_dim + 2)) * 4


@cache
def have_matrix_units() -> bool:
    """Whether the card multiplies 16-bit matrices as the kernel asks: Ampere, or a later generation."""
    return int(mx.device_info().get("compute_capability_major", 8)) >= 8


def attend(
    qkv: mx.array,
    scales: mx.array | None,
    turn: tuple[mx.array, mx.array],
    prompts: tuple[mx.array, mx.array],
    own: mx.array,
    lengths: mx.array,
    step: mx.array,
    constants: mx.array,
    *,
    plan: Launch,
    window: int | None = None,
) -> mx.array:
    """The new token of every row: projections (B, (H + 2·K)·d) → attention (B, H·d).

    Writes the token's key and value into place `step` of `own`, which is against MLX's custom: an update of its own
    would copy all of `own` whenever an earlier step is still being computed. So `own` must be evaluated, contiguous and
    known to nobody else; and the next token's call sees what this one wrote because it depends on its result.

    `scales` (H + K, d) of the norms of queries and keys, None where there are none; `turn`: cosines and sines (S, d/2)
    of its position in float32; `prompts`: keys and values (S, K, P, d); `own` (B, 2·K, N, d): keys before values, of
    which the first `step` (1,) int32 places are taken; `lengths` (S,) int32 of the prompts; `constants` float32:
    (norms' ε, scale of the scores, the plan's `together`); `window`: how many tokens the new one sees at most, itself
    among them.
    """
    (B, wide), (_, K, _, d) = qkv.shape, prompts[0].shape
    R, splits = wide // d // K - 2, plan.splits
    kind = qkv.dtype if splits == 1 else mx.float32
    template = [("T", qkv.dtype), ("O", kind), ("HEADS", R * K), ("KV", K), ("R", R), ("SIZE", d)]
    template += [("WHOLE", splits == 1), ("SCALES", mx.float32 if scales is None else scales.dtype)]
    template += [("NORM", scales is not None), ("WINDOW", window or 0)]
    chosen = kernel("attend_by_sums")
    if plan.by_units:
        chosen = kernel("attend_by_units", attend_shared_bytes(R, d))
        template += [("WARPS", WARPS)]
    out, parts = chosen(
        inputs=[qkv, constants if scales is None else scales, *turn, *prompts, own, lengths, step, constants],
        template=template,
        grid=plan.grid,
        threadgroup=plan.block,
        output_shapes=[(B * R * K, splits, d), (B * R * K, splits, 2)],
        output_dtypes=[kind, mx.float32],
    )
    if splits > 1:
        (out,) = kernel("join")(
            inputs=[out, parts],
            template=[("T", qkv.dtype), ("SIZE", d)],
            grid=(-(-B * R * K * 32 // _THREADS) * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(B * R * K, d)],
            output_dtypes=[qkv.dtype],
        )
    attended: mx.array = out.reshape(B, R * K * d)
    return attended


def draw(logits: mx.array, uniforms: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Logits (B, V), uniforms (B,) in [0, 1) → ids (B,) of softmax(logits / temperature) by its inverse distribution
    function, and their log-probs in nats."""
    B = logits.shape[0]
    ids, log_probs = kernel("draw")(
        inputs=[logits, uniforms, mx.array([1.0 / temperature])],
        template=[("T", logits.dtype)],
        grid=(B * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(B,), (B,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return ids, log_probs


def gate(both: mx.array) -> mx.array:
    """Gate beside up (B, 2·F) → gate · σ(gate) · up (B, F)."""
    B, F = both.shape[0], both.shape[1] // 2
    gated: mx.array
    (gated,) = kernel("gate")(
        inputs=[both],
        template=[("T", both.dtype)],
        grid=(-(-B * F // _THREADS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, F)],
        output_dtypes=[both.dtype],
    )
    return gated
