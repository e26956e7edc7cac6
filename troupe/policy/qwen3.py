"""The Qwen3 network as pure functions over a flat dict of arrays named as in Hugging Face folders.

Knows the arithmetic and the shapes of every tensor. Knows nothing of files, tokenizers, sampling or training; nor of
how earlier keys and values are kept: whoever decodes step by step passes an `Attention` of its own.

Shapes: B rows, T tokens, D hidden size, V vocabulary, H query heads, K key/value heads, d head size.

Sources: Qwen3 Technical Report (arXiv:2505.09388); RMSNorm (arXiv:1910.07467); rotary positions (arXiv:2104.09864);
SwiGLU (arXiv:2002.05202); grouped-query attention (arXiv:2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import mlx.core as mx

from troupe.policy.architecture import Qwen3Config as Qwen3Config  # where callers look for it
from troupe.policy.elementwise import is_on_cpu, swiglu
from troupe.policy.rotary import attention_factor, inverse_frequencies

Weights: TypeAlias = Mapping[str, mx.array]
"""Hugging Face tensor name → array, such as `model.layers.0.self_attn.q_proj.weight` (H·d, D)."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def expected_shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every trainable tensor; no `lm_head.weight` where the embedding serves as the head."""
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    Hd, Kd = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (Hd, D),
        "self_attn.k_proj.weight": (Kd, D),
        "self_attn.v_proj.weight": (Kd, D),
        "self_attn.o_proj.weight": (D, Hd),
        "self_attn.q_norm.weight": (d,),
        "self_attn.k_norm.weight": (d,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (D,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, D)
    return shapes


def parameter_count(config: Qwen3Config) -> int:
    """Number of trainable numbers; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def init_weights(config: Qwen3Config, key: mx.array, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random weights: matrices N(0, initializer_range²), norm scales 1. `key` is an `mx.random.key`."""
    shapes = expected_shapes(config)
    keys = mx.random.split(key, len(shapes))
    return {
        name: mx.ones(shape, dtype)
        if len(shape) == 1
        else (mx.random.normal(shape, key=keys[index]) * config.initializer_range).astype(dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }


class Attention(Protocol):
    """How the queries of new tokens meet keys and values, their own and earlier ones."""

    @property
    def offset(self) -> int | mx.array:
        """Rotary position of the first new token: one for all rows, or int32 (B,)."""

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Queries (B, H, T, d), new keys and values (B, K, T, d), all rotated → (B, H, T, d)."""


class WholeRows:
    """Attention within whole rows at once, as the learner wants it: causal, blind to padding on the left."""

    def __init__(self, T: int, left_padding: mx.array | None) -> None:
        """`left_padding`: (B,) integers, how many of a row's T places come before its first token."""
        self.offset: int | mx.array = 0
        self._mask: str | mx.array = "causal"
        if left_padding is not None:
            self.offset = -left_padding.astype(mx.int32)
            query, key = mx.arange(T)[:, None], mx.arange(T)[None, :]
            real = key >= left_padding[:, None, None]
            # a padding place sees itself, for a softmax over nothing would be NaN and spread by 0 · NaN
            self._mask = mx.logical_and(key <= query, mx.logical_or(real, key == query))[:, None]

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `Attention.attend`."""
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=self._mask)


def hidden_states(
    config: Qwen3Config,
    weights: Weights,
    ids: mx.array,
    *,
    lengths_of_left_padding: mx.array | None = None,
    cache: Attention | None = None,
) -> mx.array:
    """Integer ids (B, T) → hidden states (B, T, D) after the final norm, in the weights' dtype.

    Without `cache` every row attends within itself; `lengths_of_left_padding` (B,) says how many places before its
    first token each row has (their results mean nothing). With `cache`, the tokens follow those that it holds.
    Pure, so it can be differentiated by its weights; with those of `fuse_projections` it is faster.
    """
    x = weights[EMBEDDING][ids]
    attention = WholeRows(ids.shape[1], lengths_of_left_padding) if cache is None else cache
    rotate = _rotation(config, ids.shape[1], attention.offset)
    for index in range(config.num_hidden_layers):
        x = _layer(config, weights, index, x, attention, rotate)
    return mx.fast.rms_norm(x, weights[FINAL_NORM], config.rms_norm_eps)


def project(config: Qwen3Config, weights: Weights, hidden: mx.array) -> mx.array:
    """Hidden states (…, D) → logits (…, V) in the weights' dtype."""
    return hidden @ weights[EMBEDDING if config.tie_word_embeddings else HEAD].T


def fuse_projections(config: Qwen3Config, weights: Weights) -> Weights:
    """The same network for decoding: q, k, v as one matrix and gate, up as one, which takes fewer and larger products.

    Copies those matrices (evaluated); shares the others. `hidden_states` and `project` take the result.
    """
    fused = dict(weights)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        for whole, parts in _FUSED.items():
            fused[layer + whole] = mx.concatenate([fused.pop(layer + part) for part in parts])
        norms = [(config.num_attention_heads, "q_norm"), (config.num_key_value_heads, "k_norm")]
        scales = [mx.tile(fused.pop(f"{layer}self_attn.{name}.weight"), (heads, 1)) for heads, name in norms]
        fused[f"{layer}self_attn.qk_norm.weight"] = mx.concatenate(scales)
    mx.eval(fused)
    return fused


_FUSED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
    "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def _rotation(config: Qwen3Config, T: int, offset: int | mx.array) -> Callable[[mx.array], mx.array]:
    """A function that turns (B, heads, T, d) by rotary positions offset … offset + T − 1."""
    d, base = config.head_dim, config.rope_theta
    factor = attention_factor(config.rope_scaling)
    if not is_on_cpu():  # one fused kernel
        if config.rope_scaling is None:
            return lambda y: mx.fast.rope(y, d, traditional=False, base=base, scale=1.0, offset=offset)
        periods = 1.0 / mx.array(inverse_frequencies(d, base, config.rope_scaling))
        return lambda y: mx.fast.rope(
            y * factor, d, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
        )
    frequencies = mx.array(inverse_frequencies(d, base, config.rope_scaling))
    positions = mx.arange(T) + (offset[:, None, None] if isinstance(offset, mx.array) else offset)
    angles = positions[..., None].astype(mx.float32) * frequencies  # here once, not in each layer: (T or B·1·T, d/2)
    cos, sin = mx.cos(angles) * factor, mx.sin(angles) * factor

    def rotate(y: mx.array) -> mx.array:
        a, b = y[..., : d // 2], y[..., d // 2 :]
        return mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(y.dtype)

    return rotate


def _layer(
    config: Qwen3Config,
    weights: Weights,
    index: int,
    x: mx.array,
    attention: Attention,
    rotate: Callable[[mx.array], mx.array],
) -> mx.array:
    """One decoder layer, (B, T, D) → (B, T, D)."""
    B, T, _ = x.shape
    H, K, d, eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps

    def w(name: str) -> mx.array:
        return weights[f"model.layers.{index}.{name}.weight"]

    def heads(y: mx.array, name: str) -> mx.array:
        return (y @ w(name).T).reshape(B, T, -1, d)

    is_fused = f"model.layers.{index}.mlp.gate_up_proj.weight" in weights
    y = mx.fast.rms_norm(x, w("input_layernorm"), eps)
    if is_fused:
        qkv = heads(y, "self_attn.qkv_proj")
        qk = mx.fast.rms_norm(qkv[:, :, : H + K], None, eps) * w("self_attn.qk_norm")
        qk = rotate(qk.transpose(0, 2, 1, 3))
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, :, H + K :]
    else:
        q = rotate(mx.fast.rms_norm(heads(y, "self_attn.q_proj"), w("self_attn.q_norm"), eps).transpose(0, 2, 1, 3))
        k = rotate(mx.fast.rms_norm(heads(y, "self_attn.k_proj"), w("self_attn.k_norm"), eps).transpose(0, 2, 1, 3))
        v = heads(y, "self_attn.v_proj")
    o = attention.attend(index, q, k, v.transpose(0, 2, 1, 3), d**-0.5)
    x = x + o.transpose(0, 2, 1, 3).reshape(B, T, -1) @ w("self_attn.o_proj").T
    y = mx.fast.rms_norm(x, w("post_attention_layernorm"), eps)
    if is_fused:
        gate, up = mx.split(y @ w("mlp.gate_up_proj").T, 2, axis=-1)
    else:
        gate, up = y @ w("mlp.gate_proj").T, y @ w("mlp.up_proj").T
    return x + swiglu(gate, up) @ w("mlp.down_proj").T
