"""How much memory the gradient of a micro-batch takes: functions of lengths and settings alone.

Counts what `completion_gradients` keeps and makes:

kept      for each of N tokens in each of L layers its input, D numbers, and, unless computed again, the results of the
          matrix products, D + 2·H·d + 2·K·d + 2·F (2·D more where norms stand behind attention and MLP, H·d where
          attention is gated), on a CPU with H float32 that attention was divided by, and so of each place of a row
          where kernels of our own attend (`flash_attention.py`); in a gated delta net of C
          channels and H" heads of b values C + 2·H"·(b + 1) in the place of 2·H·d + 2·K·d; of a layer with experts
          2·k·F' in the place of 2·F, and E
head      beside what is kept, hidden states of M targets; of each logit of a block 25 bytes forwards, 20 backwards and
          16 more for entropies, on a GPU 8 bytes and three, four and three numbers of the weights' type; backwards
          twice the gradient of the head, V·D; and what the last layer made of its k·N places with experts, which is
          still there when it begins, 11·(D + F') numbers of each
layer     beside what is kept and the gradients of the layers above: what going back through one layer makes, which
          `_layer_bytes` has (of a gated delta net `backward_bytes`), and the layer's own gradients; on a GPU three
          times, for it prepares the next chunk early and lets go of nothing within a chunk; there, where attention's
          gradient has no kernel of our own and writes scores out, four arrays of the scores that are written at a
          time, or 18 bytes of each where that is done by ourselves (`exact_gradient.py`)
end       all gradients, nothing kept; what going back through the first layer makes, or for the embedding 3.1 tables
          of V·D, 4.2 where gradients are added up (on a GPU 7.3), and 6·N·D float32

Beside an adapter, of which only the numbers count as gradients: nothing for the tables, nothing kept below the lowest
layer that has one, and in a layer the matrices that it is added to.

Of these the largest. What is kept is exact, the factors of the others are upper ends, measured with MLX 0.32 on a CPU
and on an H100.
"""

import math
from collections import Counter
from functools import lru_cache

import mlx.core as mx
import msgspec

from troupe.policy.adapter.modules import Adapter, adapter_parameter_count, layer_of
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import block_size, exact_portion, gradient_is_exact, scores_at_a_time
from troupe.policy.network.delta_memory import backward_bytes
from troupe.policy.network.flash_attention import can_serve
from troupe.policy.network.head import block_rows
from troupe.policy.network.layouts import padded
from troupe.policy.network.tensors import linear_shapes, network_shapes, parameter_count

_EXACT_BYTES = 18
"""Of each score, in attention's exact gradient."""


class MicroBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of rows that are learned from together."""

    prompts: int
    """Distinct prompts."""
    prompt_length: int
    """Tokens of the longest."""
    rows: int
    """Completions; those of one prompt are neighbours."""
    completion_length: int
    """Tokens of the longest."""

    @property
    def tokens(self) -> int:
        """N, of prompts and completions; the last of a completion predicts nothing and is left out."""
        return self.prompts * self.prompt_length + self.rows * (self.completion_length - 1)

    @property
    def targets(self) -> int:
        """M, that are predicted."""
        return self.rows * self.completion_length


def gradient_memory_bytes(
    config: NetworkConfig,
    dtype: mx.Dtype,
    batch: MicroBatch,
    *,
    recompute: bool = False,
    entropy_gradient: bool = False,
    adds_up: bool = False,
    on_cpu: bool = True,
    writes_scores: bool = False,
    deterministic: bool = True,
    adapter: Adapter | None = None,
) -> int:
    """Bytes that the gradient of a micro-batch takes beside the weights, the gradients included.

    `recompute` and `entropy_gradient` as for `completion_gradients`; `dtype` is that of the weights. `adds_up`: the
    gradients are added to float32 sums, which are counted too. `on_cpu`: attention writes its scores out and blocks of
    logits are small; elsewhere attention is one kernel, but with `writes_scores` its gradient is not, nor where it is
    `deterministic` on an NVIDIA card, unless a kernel of our own is there (`can_serve`). With an
    `adapter` nothing else is trained. The formula: at the head of this file.
    """
    D, L, V, size = config.hidden_size, config.num_hidden_layers, config.vocab_size, dtype.size
    N, M = batch.tokens, batch.targets
    table, lowest = V * D, 0
    if adapter is None:
        numbers, each = parameter_count(config), size
        layer = (numbers - table * (1 if config.tie_word_embeddings else 2) - D) // L
    else:
        table, lowest = 0, min(map(layer_of, adapter.modules))
        numbers, each = adapter_parameter_count(config, adapter), 4
        layer = numbers // (L - lowest)
    if adapter is None and (config.sparse_layers or config.delta_layers):
        layer = _largest_layer(config)
    made = size + 4 if adds_up and size < 4 else each  # bytes of a new gradient, with its like in float32
    sums = 4 * numbers if adds_up else 0
    by_kernels = not on_cpu and can_serve(config.head_dim, dtype)
    normalizers = 4 * config.num_attention_heads if on_cpu else 0
    of_rows = 4 * config.num_attention_heads * batch.rows * _places(batch) if by_kernels else 0
    inside = [0 if recompute else _inside(config, index) * size + normalizers for index in range(lowest, L)]
    kept = (L - lowest) * (N * D * size + (0 if recompute else of_rows)) + N * sum(inside)
    block = min(V, block_rows(M, on_cpu=on_cpu)) * M
    forwards, backwards, of_entropies = (25, 20, 16) if on_cpu else (8 + 3 * size, 4 * size, 3 * size)
    leaving = 11 * N * config.num_experts_per_tok * (D + config.moe_intermediate_size) * size
    head = kept + leaving + (N * D + 3 * M * D) * size + 3 * M * D * 4
    head += max(forwards * block, (backwards + (of_entropies if entropy_gradient else 0)) * block + 2 * table * size)
    back = _layer_bytes(config, batch, dtype, recompute=recompute, on_cpu=on_cpu) + layer * made
    back += 0 if adapter is None else _beside_bytes(config, adapter, dtype, N)
    back *= 1 if on_cpu else 3
    if by_kernels:
        back += 5 * of_rows  # what goes back of each query, twice, and once more where layers are computed again
    elif not on_cpu:
        exact = deterministic and gradient_is_exact(dtype)
        back += _scores_bytes(config, batch, size, exact=exact) if exact or writes_scores else 0
    first = kept + table * size + back
    gradients = 0 if adds_up else numbers * each
    tables = (4.2 if on_cpu else 7.3) if adds_up else 3.1
    last = gradients + max(back, tables * table * size + 6 * N * D * 4)
    return math.ceil(sums + max(head, first, last))


def forward_memory_bytes(
    config: NetworkConfig, dtype: mx.Dtype, batch: MicroBatch, *, on_cpu: bool = True, adapter: Adapter | None = None
) -> int:
    """Bytes that `completion_statistics` takes beside the weights: of the hidden states, the larger of what a layer and
    what the head makes. What going back through a layer makes is an upper end of the former. An `adapter` is in the
    matrices that it stands beside, or next to them, all at once."""
    D, N, M, size = config.hidden_size, batch.tokens, batch.targets, dtype.size
    layer = _layer_bytes(config, batch, dtype, recompute=False, on_cpu=on_cpu) * (1 if on_cpu else 3)
    if adapter is not None:
        layer += config.num_hidden_layers * _beside_bytes(config, adapter, dtype, N)
    block = min(config.vocab_size, block_rows(M, on_cpu=on_cpu)) * M
    head = 3 * M * D * size + 12 * M + (25 if on_cpu else 8 + 3 * size) * block
    return math.ceil(2 * N * D * size + max(layer, head))


def _scores_bytes(config: NetworkConfig, batch: MicroBatch, size: int, *, exact: bool) -> int:
    """What attention's gradient makes where it writes scores out, some rows or heads at a time."""
    sizes = batch.rows, config.num_attention_heads, config.num_key_value_heads, _places(batch)
    if exact:
        return _EXACT_BYTES * scores_at_a_time(*sizes, exact_portion())
    return 4 * scores_at_a_time(*sizes) * size


def _places(batch: MicroBatch) -> int:
    """Of a row, where whole rows attend."""
    return padded(batch.prompt_length + batch.completion_length - 1)


def _beside_bytes(config: NetworkConfig, adapter: Adapter, dtype: mx.Dtype, tokens: int) -> int:
    """What an adapter takes in a layer: the matrices with it in them (`Linear.is_merged`), or the largest one written
    out, and what A gives of each token, with its gradient."""
    F, D = config.intermediate_size, config.hidden_size
    rank = max(adapted.rank for adapted in adapter.modules.values())
    merged = dtype == mx.float32 and config.quantization is None
    numbers, places = _largest_matrices(config)
    widest = max(F, config.num_experts * config.moe_intermediate_size)
    return ((numbers if merged else 2 * widest * D) + 2 * max(7, places) * rank * tokens) * dtype.size


@lru_cache
def _largest_matrices(config: NetworkConfig) -> tuple[int, int]:
    """Numbers of the matrices that can have adapters in the layer that has most, and how many there may be of them."""
    numbers, places = Counter[int](), Counter[int]()
    for module, shape in linear_shapes(config).items():
        numbers[layer_of(module)] += math.prod(shape)
        places[layer_of(module)] += 1
    return max(numbers.values()), max(places.values())


@lru_cache
def _largest_layer(config: NetworkConfig) -> int:
    """Numbers of the largest layer."""
    sizes = Counter[str]()
    for name, shape in network_shapes(config).items():
        sizes[".".join(name.split(".")[:3])] += math.prod(shape) if name.startswith("model.layers.") else 0
    return max(sizes.values())


def _inside(config: NetworkConfig, index: int) -> int:
    """Numbers that are kept of a token in a layer, besides its input."""
    heads, behind = config.num_attention_heads + config.num_key_value_heads, config.family.norms_behind
    mlp, experts = 2 * config.intermediate_size, config.layer(index).experts
    if experts is not None:
        mlp = 2 * experts.per_token * experts.size + experts.number + 2 * experts.per_token  # and ids of 4 bytes
    mixing = 2 * heads * config.head_dim + config.query_size - config.num_attention_heads * config.head_dim
    if config.layer(index).is_delta:
        mixing = config.delta.channels + 2 * config.delta.value_heads * (config.delta.value_dim + 1)
    return (3 if behind else 1) * config.hidden_size + mixing + mlp


def _layer_bytes(config: NetworkConfig, batch: MicroBatch, dtype: mx.Dtype, *, recompute: bool, on_cpu: bool) -> float:
    """What going back through one layer makes beside what is kept of it and its gradients.

    Nine hidden states a token, and the larger of what attention and the gates make; of experts both, and of each of a
    token's places five to six hidden states and six to seven times an expert's size.
    """
    d, F, size = config.head_dim, config.intermediate_size, dtype.size
    by_kernels = not on_cpu and can_serve(d, dtype)
    H, K = config.num_attention_heads, config.num_key_value_heads
    N, R, P, T = batch.tokens, batch.rows, batch.prompt_length, batch.completion_length - 1
    attention = N * (5.2 * H + 2.1 * K) * d
    if on_cpu:
        scores = max(R * H * block_size(T) * (P + T), batch.prompts * H * block_size(P) * P)
        attention += 4.9 * scores + 5 * R * (P + T) * K * d
    elif by_kernels:
        attention += R * _places(batch) * 3 * K * d
    else:
        attention += R * (P + T) * (6 * H + 4 * K) * d
    if config.sparse_layers:
        return (9 * N * config.hidden_size + attention + N * _expert_numbers(config, recompute=recompute)) * size
    mixing = max(attention, 4.2 * N * F) * size
    if config.delta_layers:
        mixing = max(mixing, backward_bytes(config.delta, (batch.prompts, P), (R, T)))
    again = N * (max(_inside(config, index) for index in range(config.num_hidden_layers)) + F) if recompute else 0
    return (9 * N * config.hidden_size + again) * size + mixing


def _expert_numbers(config: NetworkConfig, *, recompute: bool) -> float:
    """What is made of a token in the largest MLP of a network with experts, forwards again and backwards. They are so
    many that they are still there while what attention makes begins."""
    places, dense = config.num_experts_per_tok, len(config.sparse_layers) < config.num_hidden_layers
    made = places * (5.5 * config.hidden_size + 6.5 * config.moe_intermediate_size)
    made = max(made, 4.2 * config.intermediate_size if dense else 0.0)
    return 2 * made + max(_inside(config, index) for index in range(config.num_hidden_layers)) if recompute else made
