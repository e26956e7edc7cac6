"""A tiny network of each family, with all that the family can have."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from troupe.policy.model import Policy, random_policy
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.families import FAMILIES, FULL, LINEAR, SLIDING
from troupe.policy.network.rotary import LinearScaling, Llama3Scaling

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def family_configs(**sizes: Any) -> dict[str, NetworkConfig]:
    """By a name for each; `sizes` are those of all."""
    standard: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
    }
    layers = (standard | sizes)["num_hidden_layers"]
    each: dict[str, dict[str, Any]] = {
        "qwen3": {"model_type": "qwen3"},
        "qwen3-moe": {
            "model_type": "qwen3_moe",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        "qwen3-moe-mixed": {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
        "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
        "llama": {"model_type": "llama", "rope_theta": 5e2, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5},
        "llama-biased": {"model_type": "llama", "attention_bias": True, "rope_scaling": LinearScaling(factor=4.0)},
        "mistral": {"model_type": "mistral"},
        "mistral-window": {"model_type": "mistral", "sliding_window": 5, "layer_types": (SLIDING,) * layers},
        "gemma3": {
            "model_type": "gemma3_text",
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "query_pre_attn_scalar": 12,
            "sliding_window": 6,
            "layer_types": tuple(SLIDING if index % 2 == 0 else FULL for index in range(layers)),
        },
    }
    each["qwen3_5"] = {
        "model_type": "qwen3_5_text",
        "partial_rotary_factor": 0.5,
        "layer_types": tuple(FULL if index == layers - 1 else LINEAR for index in range(layers)),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    each["gemma3-untied"] = each["gemma3"] | {"tie_word_embeddings": False}  # tied, it mostly repeats a random token
    assert {settings["model_type"] for settings in each.values()} == FAMILIES.keys()
    return {name: NetworkConfig(**standard | settings | sizes) for name, settings in each.items()}


def shaken_policy(config: NetworkConfig, seed: int = 0, dtype: str = "float32") -> Policy:
    """A policy at random whose vectors, scales of norms and biases, are so, too."""
    policy = random_policy(config, seed, dtype)
    weights = {
        name: array + 0.2 * mx.random.normal(array.shape, array.dtype, key=mx.random.key(seed + place))
        if array.ndim == 1
        else array
        for place, (name, array) in enumerate(policy.weights.items())
    }
    mx.eval(weights)
    return policy.having(weights)
