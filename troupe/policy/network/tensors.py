"""The tensors of a network: their names as in Hugging Face folders, shapes, types, numbers, and first values.

Experts are held stacked, each matrix of all of them as one tensor (E, out, in), and stored one by one, as transformers
has them; or stacked, as mlx-lm does where they are packed. What leads from one to the other is here.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

import mlx.core as mx
import msgspec

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.quantization import EXPERTS, STACKED_BY_MLX_LM, packed_shapes

Weights: TypeAlias = Mapping[str, mx.array]
"""Hugging Face tensor name → array, such as `model.layers.0.self_attn.q_proj.weight` (H·d, D); of experts
`model.layers.0.mlp.experts.up_proj.weight` (E, F, D)."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
CONVOLUTION = "linear_attn.conv1d.weight"
ROUTER = "mlp.gate"
"""The matrix, within a layer, that says how likely experts are."""
STACKS: Mapping[str, str] = {name: f"{EXPERTS}{name}_proj" for name in ("gate", "up", "down")}
"""Those of all experts of a layer."""


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor; no `lm_head.weight` where the embedding serves as the head. ModelError where a
    matrix cannot be packed as it is said to be."""
    shapes = network_shapes(config)
    if config.quantization is None:
        return shapes
    packed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        packing = config.quantization.of(module) if is_packable(name, shape) else None
        packed |= {name: shape} if packing is None else packed_shapes(module, shape, packing)
    return packed


def is_packable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, or a stack of them: no vector, and no convolution."""
    return len(shape) > 1 and not name.endswith(CONVOLUTION)


def network_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """The same, nothing being packed."""
    D = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config, index).items()}
    shapes[FINAL_NORM] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    return shapes


def _layer_shapes(config: NetworkConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a layer, by the names within it."""
    D, d, family = config.hidden_size, config.head_dim, config.family
    matrices, experts = _layer_matrices(config, index), config.layer(index).experts
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
    if config.layer(index).is_delta:
        sizes = config.delta
        shapes |= {f"linear_attn.{name}": (sizes.value_heads,) for name in ("A_log", "dt_bias")}
        shapes[CONVOLUTION] = (sizes.channels, 1, sizes.taps)
        shapes["linear_attn.norm.weight"] = (sizes.value_dim,)
        shapes |= {f"{name}.weight": shape for name, shape in matrices.items() if name.startswith("linear_attn")}
    else:
        for name in "qkvo":
            module = f"self_attn.{name}_proj"
            shapes[f"{module}.weight"] = matrices[module]
            if name in config.biased:
                shapes[f"{module}.bias"] = matrices[module][:1]
        if family.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    shapes["post_attention_layernorm.weight"] = (D,)
    if family.norms_behind:
        shapes |= {f"{name}.weight": (D,) for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")}
    if experts is not None:
        E, F = experts.number, experts.size
        shapes[f"{ROUTER}.weight"] = (E, D)
        shapes |= {f"{STACKS[name]}.weight": (E, F, D) for name in ("gate", "up")}
        shapes[f"{STACKS['down']}.weight"] = (E, D, F)
    return shapes | {f"{name}.weight": shape for name, shape in matrices.items() if name.startswith("mlp")}


def _layer_matrices(config: NetworkConfig, index: int) -> dict[str, tuple[int, int]]:
    """Module within a layer → (out, in), of those through which every token goes; without a router."""
    D, F = config.hidden_size, config.intermediate_size
    mixing = (_delta_matrices if config.layer(index).is_delta else _attention_matrices)(config)
    if config.layer(index).experts is not None:
        return mixing
    return {**mixing, "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}


def _attention_matrices(config: NetworkConfig) -> dict[str, tuple[int, int]]:
    D, d = config.hidden_size, config.head_dim
    Hd, Kd = config.num_attention_heads * d, config.num_key_value_heads * d
    return {
        "self_attn.q_proj": (config.query_size, D),
        "self_attn.k_proj": (Kd, D),
        "self_attn.v_proj": (Kd, D),
        "self_attn.o_proj": (D, Hd),
    }


def _delta_matrices(config: NetworkConfig) -> dict[str, tuple[int, int]]:
    D, sizes = config.hidden_size, config.delta
    return {
        "linear_attn.in_proj_qkv": (sizes.channels, D),
        "linear_attn.in_proj_z": (sizes.value_heads * sizes.value_dim, D),
        "linear_attn.in_proj_b": (sizes.value_heads, D),
        "linear_attn.in_proj_a": (sizes.value_heads, D),
        "linear_attn.out_proj": (D, sizes.value_heads * sizes.value_dim),
    }


def linear_shapes(config: NetworkConfig) -> dict[str, tuple[int, int]]:
    """Module → (out, in) of the matrices of all layers that can have an adapter, in the network's order; without
    embedding, head, routers and experts."""
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in _layer_matrices(config, index).items()
    }


def stored_names(config: NetworkConfig) -> dict[str, Sequence[str]]:
    """Name → what a folder calls it: the same, or the tensors of the experts one by one, as transformers has them;
    stacked under mlx-lm's name where the network is packed, which transformers does not read anyway."""
    E, found = config.num_experts, dict[str, Sequence[str]]()
    for name in expected_shapes(config):
        if not is_stack(name):
            found[name] = (name,)
        elif config.quantization is not None:
            found[name] = (name.replace(EXPERTS, STACKED_BY_MLX_LM),)
        else:
            before, _, behind = name.partition(EXPERTS)
            found[name] = tuple(f"{before}{EXPERTS}{expert}.{behind}" for expert in range(E))
    return found


def stored_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor as a folder has it."""
    shapes, one_by_one = expected_shapes(config), config.quantization is None
    return {
        part: shapes[name][1:] if one_by_one and is_stack(name) else shapes[name]
        for name, parts in stored_names(config).items()
        for part in parts
    }


def is_stack(name: str) -> bool:
    """Whether a tensor is of all experts of a layer."""
    return EXPERTS in name


def is_one_of_a_stack(stored: str) -> bool:
    """Whether a folder's tensor is of one expert alone."""
    return stored.partition(EXPERTS)[2][:1].isdigit()


def as_stored(config: NetworkConfig, weights: Weights) -> dict[str, mx.array]:
    """All tensors of a network as a folder has them, in its order; lazily."""
    stored: dict[str, mx.array] = {}
    for name, names in stored_names(config).items():
        if not is_stack(name) or config.quantization is not None:
            stored[names[0]] = weights[name]
        else:
            stored |= {part: weights[name][expert] for expert, part in enumerate(names)}
    return stored


def stacked(config: NetworkConfig, stored: dict[str, mx.array]) -> dict[str, mx.array]:
    """The way back, which uses up `stored`: tensors under a folder's names, or ours, or those of experts one by one."""
    found: dict[str, mx.array] = {}
    names = stored_names(config)
    unpacked = stored_names(msgspec.structs.replace(config, quantization=None)) if config.num_experts else names
    for name, ways in names.items():
        if not is_stack(name) or name in stored or (config.quantization is not None and ways[0] in stored):
            found[name] = stored.pop(name if name in stored else ways[0])
        else:
            found[name] = mx.stack([stored.pop(part) for part in unpacked[name]])
            mx.eval(found[name])  # one after the other: what it is made of is held meanwhile
    return found


def weights_dtype(weights: Weights) -> mx.Dtype:
    """The type of a network's float numbers: that of its last norm, since matrices may be packed."""
    return weights[FINAL_NORM].dtype


def norm_scale(config: NetworkConfig, weight: mx.array) -> mx.array:
    """What a norm of this weight multiplies by; where that is not the weight itself, in float32."""
    offset = config.family.norm_offset
    return weight.astype(mx.float32) + offset if offset else weight


@lru_cache
def parameter_count(config: NetworkConfig) -> int:
    """Numbers of the network, however they are packed; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in network_shapes(config).values())


@lru_cache
def network_bytes(config: NetworkConfig, dtype: mx.Dtype) -> int:
    """What all tensors of a network take, its float numbers being of this type."""
    shapes = expected_shapes(config)
    return sum(math.prod(shape) * dtype_in(config, name, dtype).size for name, shape in shapes.items())


def dtype_in(config: NetworkConfig, name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The type of one tensor of a network whose float numbers are of `dtype`."""
    module, _, kind = name.rpartition(".")
    packing = None if config.quantization is None or "norm" in module else config.quantization.of(module)
    if packing is None or kind in ("biases", "bias", "A_log", "dt_bias") or module.endswith("conv1d"):
        return dtype
    if kind == "weight":
        return mx.uint32
    return dtype if packing.mode == "affine" else mx.uint8


def init_weights(config: NetworkConfig, key: mx.array, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random weights: matrices N(0, initializer_range²), biases 0, norms multiply by 1. `key` is an `mx.random.key`."""
    shapes = network_shapes(config)
    keys = mx.random.split(key, len(shapes))
    return {
        name: _first_vector(config, name, shape, keys[index]).astype(dtype)
        if len(shape) == 1
        else (mx.random.normal(shape, key=keys[index]) * _first_spread(config, name, shape)).astype(dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }


def _first_vector(config: NetworkConfig, name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(0.01, 16.0, shape, key=key))
    if name.endswith(("dt_bias", "linear_attn.norm.weight")):
        return mx.ones(shape)
    return mx.full(shape, 0.0 if name.endswith(".bias") else 1.0 - config.family.norm_offset)


def _first_spread(config: NetworkConfig, name: str, shape: tuple[int, ...]) -> float:
    """Of matrices, and of the taps of a convolution."""
    return math.sqrt(1.0 / (3 * shape[-1])) if name.endswith(CONVOLUTION) else config.initializer_range
