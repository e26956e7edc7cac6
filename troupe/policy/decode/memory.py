"""How much memory a decode takes: functions of lengths and settings alone.

How much memory is free at the moment does not count: the same run makes the same batches.

Held: keys and values, 2·K·d·L numbers for each of S·P prompt places (P the longest prompt) and of S·G·N places for
own tokens (N the most that a row may have), L being the layers with attention; and of each gated delta net the state of
every row, H'·a·b + (k − 1)·C float32 (`DeltaSizes`). Besides, the larger of
  prefilling, with as many prompts s in a portion as PREFILL_TOKENS allows: s·P·(8·F + 8·D) numbers, and where a
  device writes scores out, 2·s·H·P² float32; there prompts beyond WHOLE_PROMPT places go in pieces of T tokens, on a
  CPU each in blocks of b: s·T·(8·F + 8·D) numbers and 7·s·H·b·P float32, elsewhere 2·s·H·T·P; or in a gated delta net
  `forward_bytes`;
  decoding, with B = S·G rows: 9·B·V float32 for logits and the draw (28 with filters or penalties), two steps being
  under way, 10·B·H·(P + N) float32 for scores, 8·B·(F + D) numbers, and twice one layer's own keys and values, for
  the room that grows; where updates copy, all own keys and values once more; four times one layer's states.
A turn of a session counts each of its rows as a prompt of its own, B of them; and three times one layer's keys and
values, for what is laid anew. What rows read behind what they hold, s of them T tokens each, takes
s·T·(8·F + 8·D) numbers and, at most P tokens being seen, 7·s·H·b·P float32 on a CPU, elsewhere 2·s·H·T·P, no more than
PORTION of them at a time.
Where layers are mixtures of experts, with k of size F' for each token, F is k·(F' + D) if that is more.
D hidden size, F intermediate size, L layers, H query heads, K key/value heads, d head size, V vocabulary. The part
that is held is exact; the factors of the others are measured on a CPU with MLX 0.32, as upper ends.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from troupe.policy.adapter.modules import Adapter, layer_of
from troupe.policy.decode.cache import piece_length, prefill_chunks
from troupe.policy.decode.cuda_cache import serves
from troupe.policy.decode.histories import reading_portions
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import PORTION, attention_is_fused, block_size
from troupe.policy.network.delta_memory import forward_bytes
from troupe.policy.network.linear import groups
from troupe.policy.network.tensors import linear_shapes


def cache_bytes(
    config: NetworkConfig, prompt_lengths: Sequence[int], num_generations: int, max_new_tokens: int, dtype: mx.Dtype
) -> int:
    """Keys and values, and states of gated delta nets, that a decode holds at its end."""
    places = len(prompt_lengths) * (max(prompt_lengths) + num_generations * max_new_tokens)
    held = places * 2 * config.num_key_value_heads * config.head_dim * config.attention_layers * dtype.size
    return held + config.delta_layers * _state_bytes(config, len(prompt_lengths) * max(1, num_generations))


def _state_bytes(config: NetworkConfig, rows: int) -> int:
    """What rows carry on in one gated delta net; 0 where there are none."""
    return 4 * rows * config.delta.state if config.delta_layers else 0


def fused_copy_bytes(config: NetworkConfig, dtype: mx.Dtype) -> int:
    """What `fuse_projections` copies."""
    D, d, family = config.hidden_size, config.head_dim, config.family
    H, K = config.num_attention_heads, config.num_key_value_heads
    rows = config.query_size + 2 * K * d
    layer = rows * D * dtype.size
    if "q" in config.biased:
        layer += rows * dtype.size
    if family.qk_norm and not family.gates_attention:
        layer += (H + K) * d * (4 if family.norm_offset else dtype.size)
    dense = config.num_hidden_layers - len(config.sparse_layers)
    return config.attention_layers * layer + dense * 2 * config.intermediate_size * D * dtype.size


@lru_cache
def decoding_adapter_bytes(config: NetworkConfig, adapter: Adapter, dtype: mx.Dtype) -> int:
    """What `Base.for_decoding` makes of a version: the matrices with the adapter in them, where they are added up; else
    A, and B in blocks, of the matrices that are joined."""
    shapes, total = linear_shapes(config), 0
    merged = dtype == mx.float32 and config.quantization is None
    for layer in {layer_of(module) for module in adapter.modules}:
        prefix = f"model.layers.{layer}."
        for names in groups([name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]).values():
            modules = [prefix + name for name in names]
            ranks = [adapter.modules[module].rank for module in modules if module in adapter.modules]
            if not ranks:
                continue
            rows, columns = sum(shapes[module][0] for module in modules), shapes[modules[0]][1]
            total += rows * columns if merged else sum(ranks) * (rows + columns)
    return total * dtype.size


def decode_memory_bytes(
    config: NetworkConfig,
    prompt_lengths: Sequence[int],
    num_generations: int,
    max_new_tokens: int,
    dtype: mx.Dtype,
    *,
    is_filtering: bool = False,
    writes_scores: bool = True,
    in_blocks: bool = True,
    copies_updates: bool = False,
) -> int:
    """Bytes that decoding these prompts (at least one), `num_generations` times each, takes beside the weights.

    `writes_scores`: prefilling holds the scores of whole prompts, as on a CPU; fused attention kernels do not.
    `in_blocks`: of long prompts it holds those of a block of queries at a time, as on a CPU.
    `copies_updates`: a new token's keys and values go into a copy of what its row has, as on a GPU without kernels of
    our own, where the step before still holds it. `dtype` is that of the weights. The formula stands at the head of
    this file.
    """
    L, size = config.attention_layers, dtype.size
    held = cache_bytes(config, prompt_lengths, num_generations, max_new_tokens, dtype)
    prompts_held = cache_bytes(config, prompt_lengths, 0, 0, dtype)
    prefilling = _prefilling(config, prompt_lengths, size, writes_scores=writes_scores, in_blocks=in_blocks)
    P, B = max(prompt_lengths), len(prompt_lengths) * num_generations
    decoding = _decoding(config, B, P + max_new_tokens, size, is_filtering=is_filtering)
    states, of_prompts = (_state_bytes(config, rows) for rows in (B, len(prompt_lengths)))
    grown = held - prompts_held - config.delta_layers * (states - of_prompts)
    decoding += grown * max(2 / L, 1.0 if copies_updates else 0.0)
    return math.ceil(max(prompts_held * (1 + 1 / L) + prefilling, held + decoding))


def turn_memory_bytes(
    config: NetworkConfig,
    kept: Sequence[int],
    new: Sequence[int],
    max_new_tokens: int,
    dtype: mx.Dtype,
    *,
    is_filtering: bool = False,
    writes_scores: bool = True,
    in_blocks: bool = True,
    copies_updates: bool = False,
) -> int:
    """Bytes that a turn of rows (at least one) of a session takes beside the weights, what they hold counted in: rows
    that hold `kept` tokens, read `new` ones and sample at most `max_new_tokens`.

    As if each row lay by itself, with all its tokens in a prompt of its own; so this, too, is what all of them hold
    when their turns have ended. Other arguments are those of `decode_memory_bytes`.
    """
    L, size, H = config.attention_layers, dtype.size, config.num_attention_heads
    lengths = [a + b for a, b in zip(kept, new, strict=True)]
    held = cache_bytes(config, lengths, 1, max_new_tokens, dtype)
    read_held = cache_bytes(config, lengths, 0, 0, dtype)
    states = config.delta_layers * _state_bytes(config, len(lengths))
    reading = 0.0
    if whole := [length for length, before in zip(lengths, kept, strict=True) if not before]:
        reading = _prefilling(config, whole, size, writes_scores=writes_scores, in_blocks=in_blocks)
    going_on = [(before, more) for before, more in zip(kept, new, strict=True) if before]
    for portion in reading_portions([before for before, _ in going_on], [more for _, more in going_on], H):
        s, T = len(portion), max(going_on[row][1] for row in portion)
        seen = max(going_on[row][0] for row in portion) + T
        scores = (
            7 * block_size(T) * s * H * seen if in_blocks else 2 * max(H * s * seen, min(PORTION, H * s * T * seen))
        )
        reading = max(reading, 4 * scores + _through(config, s, T, size))
    decoding = _decoding(config, len(lengths), max(lengths) + max_new_tokens, size, is_filtering=is_filtering)
    decoding += (held - states - read_held) * (1.0 if copies_updates else 0.0)
    return math.ceil(max(read_held * (1 + 3 / L) + 2 * states + reading, held + 3 * (held - states) / L + decoding))


def _prefilling(
    config: NetworkConfig, prompt_lengths: Sequence[int], size: int, *, writes_scores: bool, in_blocks: bool
) -> float:
    most = 0.0
    for portion in prefill_chunks(prompt_lengths):
        longest = max(prompt_lengths[i] for i in portion)
        piece = piece_length(len(portion), longest, writes_scores=writes_scores)
        written = 7 * block_size(piece) if in_blocks and piece < longest else 2 * piece
        scores = len(portion) * config.num_attention_heads * longest * written * 4 if writes_scores else 0
        most = max(most, scores + _mlp(config, len(portion) * piece, size), _through(config, len(portion), piece, size))
    return most


def _mlp(config: NetworkConfig, tokens: int, size: int) -> int:
    return tokens * 8 * (mlp_width(config) + config.hidden_size) * size


def _through(config: NetworkConfig, rows: int, T: int, size: int) -> float:
    """The largest inside of a layer, scores apart."""
    most: float = _mlp(config, rows * T, size)
    if config.delta_layers:
        most = max(most, forward_bytes(config.delta, rows, T) + rows * T * 4 * config.hidden_size * size)
    return most


def _decoding(config: NetworkConfig, rows: int, seen: int, size: int, *, is_filtering: bool) -> float:
    H, V = config.num_attention_heads, config.vocab_size
    found = (28.0 if is_filtering else 9.0) * rows * V * 4 + 10 * rows * H * seen * 4
    return found + 8 * rows * (mlp_width(config) + config.hidden_size) * size + 4 * _state_bytes(config, rows)


def mlp_width(config: NetworkConfig) -> int:
    """F, the largest of any layer."""
    if not config.sparse_layers:
        return config.intermediate_size
    of_experts = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    dense = len(config.sparse_layers) < config.num_hidden_layers
    return max(of_experts, config.intermediate_size if dense else 0)


def device_ways(config: NetworkConfig, dtype: mx.Dtype, *, on_cpu: bool) -> dict[str, bool]:
    """The last three arguments of `decode_memory_bytes` for a device: a CPU (`on_cpu`), or whatever else is here."""
    return {
        "writes_scores": not attention_is_fused(
            config.head_dim, dtype, gradient=False, on_cpu=on_cpu, windowed=config.has_windows
        ),
        "in_blocks": on_cpu,
        "copies_updates": not on_cpu and not serves(config),
    }
