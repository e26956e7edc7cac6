"""The tensors of a network: their names as in Hugging Face folders, shapes, types, numbers, and first values."""

import math
from collections.abc import Mapping
from typing import TypeAlias

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.quantization import packed_shapes

Weights: TypeAlias = Mapping[str, mx.array]
"""Hugging Face tensor name → array, such as `model.layers.0.self_attn.q_proj.weight` (H·d, D)."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a folder; no `lm_head.weight` where the embedding serves as the head. ModelError
    where a matrix cannot be packed as it is said to be."""
    shapes = network_shapes(config)
    if config.quantization is None:
        return shapes
    packed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        packing = config.quantization.of(module) if len(shape) == 2 else None
        packed |= {name: shape} if packing is None else packed_shapes(module, (shape[0], shape[1]), packing)
    return packed


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
    matrices = _layer_matrices(config, index)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
    if config.layer(index).is_delta:
        sizes = config.delta
        shapes |= {f"linear_attn.{name}": (sizes.value_heads,) for name in ("A_log", "dt_bias")}
        shapes["linear_attn.conv1d.weight"] = (sizes.channels, 1, sizes.taps)
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
    return shapes | {f"{name}.weight": shape for name, shape in matrices.items() if name.startswith("mlp")}


def _layer_matrices(config: NetworkConfig, index: int) -> dict[str, tuple[int, int]]:
    """Module within a layer → (out, in)."""
    D, F = config.hidden_size, config.intermediate_size
    return (_delta_matrices if config.layer(index).is_delta else _attention_matrices)(config) | {
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }


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
    """Module → (out, in) of the matrices of all layers, in the network's order; without embedding and head."""
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in _layer_matrices(config, index).items()
    }


def largest_layer(config: NetworkConfig) -> int:
    """Numbers of the matrices of the layer that has most."""
    layers = {config.layer(index).is_delta: index for index in range(config.num_hidden_layers)}
    return max(sum(map(math.prod, _layer_matrices(config, index).values())) for index in layers.values())


def weights_dtype(weights: Weights) -> mx.Dtype:
    """The type of a network's float numbers: that of its last norm, since matrices may be packed."""
    return weights[FINAL_NORM].dtype


def norm_scale(config: NetworkConfig, weight: mx.array) -> mx.array:
    """What a norm of this weight multiplies by; where that is not the weight itself, in float32."""
    offset = config.family.norm_offset
    return weight.astype(mx.float32) + offset if offset else weight


def parameter_count(config: NetworkConfig) -> int:
    """Numbers of the network, however they are packed; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in network_shapes(config).values())


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
        else (mx.random.normal(shape, key=keys[index]) * _first_spread(config, shape)).astype(dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }


def _first_vector(config: NetworkConfig, name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(0.01, 16.0, shape, key=key))
    if name.endswith(("dt_bias", "linear_attn.norm.weight")):
        return mx.ones(shape)
    return mx.full(shape, 0.0 if name.endswith(".bias") else 1.0 - config.family.norm_offset)


def _first_spread(config: NetworkConfig, shape: tuple[int, ...]) -> float:
    """Of matrices, and of the taps of a convolution."""
    return config.initializer_range if len(shape) == 2 else math.sqrt(1.0 / (3 * shape[-1]))
