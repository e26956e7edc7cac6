"""Networks as they are published, by name: the fields of their `NetworkConfig`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from troupe.policy.network.families import LINEAR, layers_by_pattern
from troupe.policy.network.rotary import Llama3Scaling

Settings = Mapping[str, Any]


def _published(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: tuple[int, int], head_dim: int, **rest: Any
) -> Settings:
    return dict(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        **rest,
    )


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, *, tied: bool) -> Settings:
    return _published(
        *("qwen3", layers, hidden, intermediate, (heads, 8), 128),
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        eos_token_id=(151645, 151643),
    )


def _qwen3_moe(
    layers: int, hidden: int, intermediate: tuple[int, int], heads: int, experts: tuple[int, int]
) -> Settings:
    return _published(
        *("qwen3_moe", layers, hidden, intermediate[0], (heads, 4), 128),
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        num_experts=experts[0],
        num_experts_per_tok=experts[1],
        moe_intermediate_size=intermediate[1],
        norm_topk_prob=True,
        eos_token_id=(151645, 151643),
    )


def _qwen2(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], *, vocab: int = 151936, tied: bool = True
) -> Settings:
    return _published(
        *("qwen2", layers, hidden, intermediate, heads, hidden // heads[0]),
        vocab_size=vocab,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        eos_token_id=(151645, 151643),
    )


def _smol(layers: int, hidden: int, intermediate: int, heads: tuple[int, int], theta: float) -> Settings:
    return _published(
        *("llama", layers, hidden, intermediate, heads, 64),
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=(2,),
    )


def _llama3(
    layers: int, hidden: int, intermediate: int, heads: int, head_dim: int, factor: float, *, tied: bool
) -> Settings:
    return _published(
        *("llama", layers, hidden, intermediate, (heads, 8), head_dim),
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=5e5,
        rope_scaling=Llama3Scaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        eos_token_id=(128001, 128008, 128009),
    )


def _gemma3(layers: int, hidden: int, intermediate: int) -> Settings:
    return _published(
        *("gemma3_text", layers, hidden, intermediate, (4, 1), 256),
        vocab_size=262144,
        rope_theta=1e6,
        local_rope_theta=1e4,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=tuple(layers_by_pattern(6, layers)),
        tie_word_embeddings=True,
        eos_token_id=(1, 106),
    )


PUBLISHED: Mapping[str, Settings] = MappingProxyType(
    {
        "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
        "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, tied=True),
        "Qwen3-4B": _qwen3(36, 2560, 9728, 32, tied=True),
        "Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
        "Qwen3-14B": _qwen3(40, 5120, 17408, 40, tied=False),
        "Qwen3-32B": _qwen3(64, 5120, 25600, 64, tied=False),
        "Qwen3.5-9B": _published(
            *("qwen3_5_text", 32, 4096, 12288, (16, 4), 256),
            vocab_size=248320,
            partial_rotary_factor=0.25,
            layer_types=tuple(layers_by_pattern(4, 32, LINEAR)),
            linear_conv_kernel_dim=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
        ),
        "Qwen3-30B-A3B": _qwen3_moe(48, 2048, (6144, 768), 32, experts=(128, 8)),
        "Qwen3-235B-A22B": _qwen3_moe(94, 4096, (12288, 1536), 64, experts=(128, 8)),
        "Qwen2.5-0.5B": _qwen2(24, 896, 4864, (14, 2)),
        "Qwen2.5-1.5B": _qwen2(28, 1536, 8960, (12, 2)),
        "Qwen2.5-3B": _qwen2(36, 2048, 11008, (16, 2)),
        "Qwen2.5-7B": _qwen2(28, 3584, 18944, (28, 4), vocab=152064, tied=False),
        "SmolLM2-135M": _smol(30, 576, 1536, (9, 3), 1e5),
        "SmolLM2-360M": _smol(32, 960, 2560, (15, 5), 1e5),
        "SmolLM2-1.7B": _smol(24, 2048, 8192, (32, 32), 1.3e5),
        "Llama-3.2-1B": _llama3(16, 2048, 8192, 32, 64, 32.0, tied=True),
        "Llama-3.2-3B": _llama3(28, 3072, 8192, 24, 128, 32.0, tied=True),
        "Llama-3.1-8B": _llama3(32, 4096, 14336, 32, 128, 8.0, tied=False),
        "Mistral-7B-v0.3": _published(
            *("mistral", 32, 4096, 14336, (32, 8), 128),
            vocab_size=32768,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
            eos_token_id=(2,),
        ),
        "gemma-3-270m": _gemma3(18, 640, 2048),
        "gemma-3-1b": _gemma3(26, 1152, 6912),
    }
)
"""Networks as they are published, by name; sizes as in their folders and reports (`FAMILIES` names these);
Qwen3.5-9B as transformers has it by default."""
