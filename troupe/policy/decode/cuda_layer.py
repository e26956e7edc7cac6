"""A layer of a decoding step in one launch, on NVIDIA cards, for few rows.

A launch costs the host 10 to 15 µs, so a step of some three hundred takes 4 ms, whatever they compute. Here all blocks
of a grid, one for each multiprocessor, go through a layer together and wait for each other where one needs what others
made (`cuda/layer.cu`). The weights that come next are fetched meanwhile.

All blocks must be on the card at once, or those that wait would wait for ever. There are no more than multiprocessors,
so kernels of other streams, which wait for nobody, at most delay them. Of two such grids, of engines that decode in two
threads at once, each could hold what the other needs, were it not that cards begin all blocks of one launch before
those of the next. That is how they are known to work; NVIDIA promises it for cooperative launches alone, which MLX does
not make. A run decodes in one thread a process.
"""

from functools import cache
from typing import Any

import mlx.core as mx

from troupe.policy.cuda import cuda_header
from troupe.policy.cuda_memory import multiprocessors, shared_memory_limit
from troupe.policy.decode.cuda_kernels import SOURCES, WARPS, attend_shared_bytes, have_matrix_units
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.forward import GATE_UP, QKV, Layer

MOST_ROWS = 128
"""With more, products by cuBLAS, whose tiles are larger, are worth their launches."""
_AT_ONCE = 32
"""Rows that a block multiplies at once."""
_UNITS = 4
_INPUTS = (
    *("x", "input_scale", "qkv_weight", "scales", "cosines", "sines", "prompt_keys", "prompt_values", "own"),
    *("lengths", "step", "constants", "o_weight", "mlp_scale", "gate_up", "down", "counter"),
)


def serves(layer: Layer, x: mx.array) -> bool:
    """Whether layers like this one are computed so for embedded tokens x (B, D): few rows of a 16-bit type, matrices
    that are not packed and have nothing beside them, sizes that the kernel's pieces divide."""
    config, family = layer.config, layer.family
    wide = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    if len(x) > MOST_ROWS or x.dtype.size > 2 or not have_matrix_units() or family.activation != "silu":
        return False
    if family.norms_behind or family.norm_offset or any(size % 32 for size in wide):
        return False
    if _shared_bytes(config, _rows_at_once(len(x))) > shared_memory_limit():
        return False
    scales = [layer.norm(name) for name in ("input_layernorm", str(family.norm_before_mlp))]
    if any(scale.dtype != x.dtype for scale in scales):
        return False
    names = QKV, "self_attn.o_proj", GATE_UP, "mlp.down_proj"
    if any(len(layer.parts(name)) > 1 for name in (QKV, GATE_UP)):
        return False
    matrices = [layer.linear(name) for name in names]
    return not layer.has_adapters and all(
        matrix.scales is None and matrix.bias is None and matrix.weight.dtype == x.dtype for matrix in matrices
    )


def new_counter() -> mx.array:
    """What `through_layer` counts in, zeros (256,) uint32: MLX keeps arrays of a few bytes in the host's memory, where
    a meeting of the grid takes a hundred times as long."""
    counter = mx.zeros((256,), mx.uint32)
    mx.eval(counter)
    return counter


def through_layer(
    layer: Layer,
    x: mx.array,
    turn: tuple[mx.array, mx.array],
    prompts: tuple[mx.array, mx.array],
    own: mx.array,
    lengths: mx.array,
    step: mx.array,
    constants: mx.array,
    counter: mx.array,
) -> mx.array:
    """The new token of every row (B, D) → (B, D) behind the layer.

    What is written in place, and what the other arguments are: as for `cuda_kernels.attend`. `counter`: of
    `new_counter`, known to these calls alone. The grid counts in its first place how often it met, which may be 2³²
    over the number of blocks times.
    """
    config = layer.config
    H, K, d, F = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size
    (B, D), dtype, scales = x.shape, x.dtype, layer.fused_qk_scales
    rows = _rows_at_once(B)
    template: list[tuple[str, Any]] = [("T", dtype), ("HEADS", H), ("KV", K), ("SIZE", d), ("ROWS", rows)]
    template += [("SCALES", mx.float32 if scales is None else scales.dtype)]
    template += [("NORM", scales is not None), ("WINDOW", layer.spec.window or 0), ("WARPS", WARPS)]
    blocks = multiprocessors()
    out: mx.array
    *_, out = _kernel(_shared_bytes(config, rows))(
        inputs=[
            *(x, layer.norm("input_layernorm"), layer.linear(QKV).weight, constants if scales is None else scales),
            *(*turn, *prompts, own, lengths, step, constants, layer.linear("self_attn.o_proj").weight),
            *(layer.norm(str(layer.family.norm_before_mlp)), layer.linear(GATE_UP).weight),
            *(layer.linear("mlp.down_proj").weight, counter),
        ],
        template=template,
        grid=(32 * WARPS * blocks, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(B, (H + 2 * K) * d), (B, H * d), (B, D), (B, F), (B, D)],
        output_dtypes=[dtype] * 5,
    )
    return out


def _rows_at_once(rows: int) -> int:
    """8, 16 or 32: each is another kernel."""
    return min(_AT_ONCE, max(8, 1 << (rows - 1).bit_length()))


def _shared_bytes(config: NetworkConfig, rows: int) -> int:
    """What a block shares, by turns: while it attends, and while it multiplies so many rows (`ProductShared`)."""
    numbers = 2048 if rows > 16 else 4096
    products = rows * (numbers + 32) * 2 + WARPS * _UNITS * rows * 8 * 4 + rows * 4
    group = config.num_attention_heads // config.num_key_value_heads
    return max(attend_shared_bytes(group, config.head_dim), products)


@cache
def _kernel(shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name="troupe_layer",
        input_names=_INPUTS,
        output_names=("qkv", "mixed", "middle", "inside", "out"),
        source=(SOURCES / "layer.cu").read_text(encoding="utf-8"),
        header=cuda_header(SOURCES / "attend.cuh", SOURCES / "layer.cuh"),
        shared_memory=shared_memory,
    )
