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
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config).items()}
    shapes[FINAL_NORM] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    return shapes


def _layer_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a layer, by the names within it."""
    D, d, family = config.hidden_size, config.head_dim, config.family
    matrices = _layer_matrices(config)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
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


def _layer_matrices(config: NetworkConfig) -> dict[str, tuple[int, int]]:
    """Module within a layer → (out, in)."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    Hd, Kd = config.num_attention_heads * d, config.num_key_value_heads * d
    return {
        "self_attn.q_proj": (Hd, D),
        "self_attn.k_proj": (Kd, D),
        "self_attn.v_proj": (Kd, D),
        "self_attn.o_proj": (D, Hd),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }


def linear_shapes(config: NetworkConfig) -> dict[str, tuple[int, int]]:
    """Module → (out, in) of the matrices of all layers, in the network's order; without embedding and head."""
    layers, layer = range(config.num_hidden_layers), _layer_matrices(config)
    return {f"model.layers.{index}.{name}": shape for index in layers for name, shape in layer.items()}


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
    if packing is None or kind in ("biases", "bias"):
        return dtype
    if kind == "weight":
        return mx.uint32
    return dtype if packing.mode == "affine" else mx.uint8


def init_weights(config: NetworkConfig, key: mx.array, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random weights: matrices N(0, initializer_range²), biases 0, norms multiply by 1. `key` is an `mx.random.key`."""
    shapes = network_shapes(config)
    keys = mx.random.split(key, len(shapes))
    return {
        name: mx.full(shape, 0.0 if name.endswith(".bias") else 1.0 - config.family.norm_offset, dtype)
        if len(shape) == 1
        else (mx.random.normal(shape, key=keys[index]) * config.initializer_range).astype(dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }
