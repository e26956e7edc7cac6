"""Kernels of our own for one new token a row, on NVIDIA cards: a layer in ten launches instead of thirty.

A decoding step of a small model costs what its launches cost, not what it computes. MLX compiles the sources, in the
folder `cuda`, when they are first used, once for each type and kind of head: numbers of rows and tokens are told when
they run. Each kernel has its plain twin in MLX's own operations (`forward.py`, `cache.py`, `loop.py`), which serves
every other device and is what the tests compare with.

Attention has two: by the matrix units, for the 16-bit types of cards that have them, and by sums for all else. Whoever
reads them may begin with the one by sums.

Shapes: B rows, S prompts, w = B/S rows a prompt, H query heads, K key/value heads, R = H/K, d head size, P longest
prompt, N places for own tokens. T is the type of the weights; sums are float32.

Sources: online softmax (arXiv:1805.02867), split over the context as in Flash-Decoding (arXiv:2311.01282); the weights
of a sum stay where the matrix units left them, as in FlashAttention-2 (arXiv:2307.08691).
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

_SOURCES = Path(__file__).with_name("cuda")
_THREADS = 256
_HEAD_SIZES = frozenset({64, 128, 256})
"""Of each, sixteen lanes take parts that the card loads at once."""

_BLOCKS_WANTED = 528
"""Of the kernel by sums, four for each multiprocessor of an H100: with fewer, the context is split among several."""
_LEAST_SPLIT = 128
"""Tokens of context that are worth a split."""
_LARGEST_GROUP = 1280
"""R·d: of each such number a block shares nine float32, beside 2.4 KB of its own."""

_WARPS_WANTED = 1024
"""Of the kernel by the matrix units, eight for each multiprocessor of an H100: with fewer, several share the context of
a row's heads, as a team."""
_WARPS_AT_ONCE = 4
"""Of a block, but where a team is larger."""
_LARGEST_TEAM = 8
_WORTH_JOINING = 2048
"""Tokens of context from which a second kernel, which joins what several blocks found, costs less than it saves."""
_LEAST_OF_BLOCK = 512
"""Tokens of context that a block is then left with, at the least."""
_LARGEST_GROUP_OF_UNITS = 1024
"""R·d: of each such number a block shares eight float32, beside up to 9 KB of its own."""

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
def kernel(name: str) -> Any:
    """That of the source `name`.cu, as MLX calls it."""
    inputs, outputs = SIGNATURES[name]
    return mx.fast.cuda_kernel(name=f"troupe_{name}", input_names=inputs, output_names=outputs, source=source_of(name))


def source_of(name: str) -> str:
    """The body of a kernel: its file, with the one before it that it goes on from."""
    files = ("adjust", name) if name == "draw_filtered" else (name,)
    return "".join((_SOURCES / f"{file}.cu").read_text(encoding="utf-8") for file in files)


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


def can_serve(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `attend` knows heads of this kind, here: a warp each for a group's queries, key and value, and what all
    warps share of the queries in 48 KiB."""
    group = heads // kv_heads
    return are_available() and head_dim in _HEAD_SIZES and group <= 6 and group * head_dim <= _LARGEST_GROUP


def plan_launch(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: mx.Dtype, context: int) -> Launch:
    """How to divide the work of so many rows, of which the longest sees `context` tokens."""
    pairs = rows * kv_heads
    group = heads // kv_heads
    if dtype.size > 2 or group * head_dim > _LARGEST_GROUP_OF_UNITS or not _have_matrix_units():
        splits = max(1, min(_BLOCKS_WANTED // pairs, context // _LEAST_SPLIT))
        return Launch(False, (pairs * splits * _THREADS, 1, 1), (_THREADS, 1, 1), splits)
    team = 1
    while team < _LARGEST_TEAM and pairs * team < _WARPS_WANTED:
        team *= 2
    together, splits = max(1, _WARPS_AT_ONCE // team), 1
    if context >= _WORTH_JOINING:
        splits = max(1, min(_WARPS_WANTED // (pairs * team), context // _LEAST_OF_BLOCK))
    return Launch(True, (32 * -(-pairs // together), team * splits, together), (32, team, together), splits)


@cache
def _have_matrix_units() -> bool:
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
    (norms' ε, scale of the scores); `window`: how many tokens the new one sees at most, itself among them.
    """
    (B, wide), (_, K, _, d) = qkv.shape, prompts[0].shape
    R, splits = wide // d // K - 2, plan.splits
    kind = qkv.dtype if splits == 1 else mx.float32
    template = [("T", qkv.dtype), ("O", kind), ("HEADS", R * K), ("KV", K), ("R", R), ("SIZE", d)]
    template += [("BRAIN", qkv.dtype == mx.bfloat16), ("WHOLE", splits == 1)]
    template += [("NORM", scales is not None), ("WINDOW", window or 0)]
    out, parts = kernel("attend_by_units" if plan.by_units else "attend_by_sums")(
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
