"""The families of networks that are known: what `model_type` says of one, as far as config.json does not say it by key.

A family is one entry of `FAMILIES`. All that computes asks the entry, and nothing asks for a family by name.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from troupe.errors import ModelError

Activation = Literal["silu", "gelu_tanh"]
"""Of the gate: g · σ(g) (arXiv:1702.03118), or GELU by its tanh formula (arXiv:1606.08415)."""
ACTIVATION_NAMES: Mapping[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
}
"""What transformers calls them, the usual name first."""
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Kinds of layers, as `layer_types` has them: one sees all that came before, another a window of it, and the last
carries a memory of it on: a gated delta net."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What all networks of a family have in common."""

    architecture: str
    """The class that transformers has for it, with a head over the vocabulary."""
    bare: str
    """The same without a head, as some base models are published."""
    biases: Literal["none", "qkv", "as_said"] = "none"
    """Which of attention's matrices add a vector: none; those of queries, keys and values; or all four where
    `attention_bias` is true."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalized before they are rotated."""
    norm_offset: float = 0.0
    """A norm multiplies by this plus its weight. Where it is not 0, in float32."""
    norms_behind: bool = False
    """Whether there are norms behind attention and MLP, too."""
    activation: Activation = "silu"
    activation_key: str = "hidden_act"
    """What config.json calls it."""
    scales_embedding: bool = False
    """Whether embedded tokens are multiplied by √D, rounded to the type of the weights."""
    windows: Literal["none", "all", "by_layer"] = "none"
    """Which layers see only the last `sliding_window` tokens, their own among them: none, all where there is a window,
    or those that `layer_types` or `sliding_window_pattern` say."""
    has_delta: bool = False
    """Whether there are gated delta nets in the layers that `layer_types` or `full_attention_interval` say."""
    gates_attention: bool = False
    """Whether what attention gives is multiplied by σ of a gate, which the queries' matrix gives beside each head."""
    rope_keys: frozenset[str] = frozenset()
    """Further keys of its rotary positions: which part of a head they turn, and what means nothing for text alone."""
    other_parts: frozenset[str] = frozenset()
    """What the parts of its folders are called that are passed over: what sees images, and foretells several tokens."""
    experts: bool = False
    """Whether layers are mixtures of experts: those that `decoder_sparse_step` and `mlp_only_layers` say."""
    ropes: frozenset[str] = frozenset({"default", "yarn"})
    """The variants of rotary positions that there are."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """What transformers takes where config.json lacks a key; None: as many key/value heads as there are heads."""

    @property
    def norm_before_mlp(self) -> str:
        """The name of that norm within a layer."""
        return "pre_feedforward_layernorm" if self.norms_behind else "post_attention_layernorm"

    @property
    def norm_behind_attention(self) -> str | None:
        """Its name; None where there is none."""
        return "post_attention_layernorm" if self.norms_behind else None

    @property
    def norm_behind_mlp(self) -> str | None:
        """Its name; None where there is none."""
        return "post_feedforward_layernorm" if self.norms_behind else None


_LLAMA_ROPES = frozenset({"default", "linear", "llama3", "yarn"})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            bare="Qwen3Model",
            qk_norm=True,
            defaults={"head_dim": 128, "max_position_embeddings": 32768},
        ),
        "qwen3_moe": Family(
            architecture="Qwen3MoeForCausalLM",
            bare="Qwen3MoeModel",
            qk_norm=True,
            experts=True,
            defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            bare="Qwen2Model",
            biases="qkv",
            defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        ),
        "llama": Family(
            architecture="LlamaForCausalLM",
            bare="LlamaModel",
            biases="as_said",
            ropes=_LLAMA_ROPES,
            defaults={"num_key_value_heads": None, "max_position_embeddings": 2048},
        ),
        "mistral": Family(
            architecture="MistralForCausalLM",
            bare="MistralModel",
            windows="all",
            ropes=_LLAMA_ROPES,
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        ),
        "gemma3_text": Family(
            architecture="Gemma3ForCausalLM",
            bare="Gemma3TextModel",
            qk_norm=True,
            norm_offset=1.0,
            norms_behind=True,
            activation="gelu_tanh",
            activation_key="hidden_activation",
            scales_embedding=True,
            windows="by_layer",
            ropes=frozenset({"default", "linear"}),
            defaults={
                "head_dim": 256,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": True,
                "rope_theta": 1e6,
                "local_rope_theta": 1e4,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
            },
        ),
        "qwen3_5_text": Family(
            architecture="Qwen3_5ForCausalLM",
            bare="Qwen3_5TextModel",
            biases="as_said",
            qk_norm=True,
            norm_offset=1.0,
            has_delta=True,
            gates_attention=True,
            rope_keys=frozenset({"partial_rotary_factor", "mrope_section", "mrope_interleaved"}),
            other_parts=frozenset({"visual", "vision_tower", "mtp"}),
            defaults={
                "head_dim": 256,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "partial_rotary_factor": 0.25,
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
            },
        ),
    }
)
"""`model_type` → what it says. Sources, as transformers computes them: Qwen3 (arXiv:2505.09388), Qwen2.5
(arXiv:2412.15115), Llama 3 (arXiv:2407.21783), Mistral 7B (arXiv:2310.06825), Gemma 3 (arXiv:2503.19786); Qwen3.5
by its code there, its layers without attention being Gated DeltaNet's (arXiv:2412.06464)."""

WRAPPED: Mapping[str, str] = MappingProxyType({"qwen3_5": "qwen3_5_text"})
"""`model_type` of networks for images and text → that of their part for text, which stands in `text_config`, and which
is all that is read of them."""

_REFUSED = {
    "gemma3": "this is a network for images and text; save the part for text alone, with transformers: "
    "Gemma3ForCausalLM.from_pretrained(FOLDER).save_pretrained(TEXT_FOLDER), or take a Gemma 3 that has no other, "
    "such as gemma-3-1b-it",
}
"""`model_type` → why it is not understood, and what to do, of those that many have."""


def family_of(model_type: object) -> Family:
    """The entry of a family. ModelError where none has this name, which tells those known and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in _REFUSED:
        raise ModelError(f"model_type: {model_type!r} is not supported: {_REFUSED[model_type]}")
    known = ", ".join(map(repr, sorted(FAMILIES)))
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)
    nearest = f"; the nearest is {close[0]!r}" if isinstance(model_type, str) and close else ""
    raise ModelError(f"model_type: {model_type!r} is not supported; Troupe trains {known}{nearest}")


def layers_by_pattern(every: int, count: int, others: str = SLIDING) -> list[str]:
    """Kinds of layers, of which each so many-th sees all and the others are of another kind."""
    return [others if (index + 1) % every else FULL for index in range(count)]
