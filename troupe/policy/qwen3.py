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
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.elementwise import is_on_cpu, swiglu

Weights: TypeAlias = Mapping[str, mx.array]
"""Hugging Face tensor name → array, such as `model.layers.0.self_attn.q_proj.weight` (H·d, D)."""

ARCHITECTURE = "Qwen3ForCausalLM"
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
DEFAULT_ROPE_THETA = 10000.0


class Qwen3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes and constants of one Qwen3 network, under the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = DEFAULT_ROPE_THETA
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    """Ids that end a text, where the folder's generation_config.json names none."""

    def __post_init__(self) -> None:
        """Refuse sizes that no network can have. Raises ModelError."""
        for key in _SIZES:
            if (value := getattr(self, key)) < 1:
                raise ModelError(f"{key}: {value} is too small; it must be at least 1")
        for key in ("rope_theta", "rms_norm_eps"):
            if not (value := getattr(self, key)) > 0 or not math.isfinite(value):
                raise ModelError(f"{key}: {value} is refused; it must be a finite number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Qwen3Config:
        """Read a parsed `config.json`. Unknown keys are passed over; what would change the arithmetic is refused.

        Raises ModelError, its message starting with the key at fault.
        """
        _refuse_unsupported(settings)
        known = {field: settings[field] for field in cls.__struct_fields__ if settings.get(field) is not None}
        known["rope_theta"] = _rope_theta(settings)
        eos = settings.get("eos_token_id")
        known["eos_token_id"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        for key in _REQUIRED:
            if key not in known:
                raise ModelError(f"{key}: missing; a Qwen3 config.json must name it")
        for field in msgspec.structs.fields(cls):  # one at a time, so that the message can name the key
            if field.name in known:
                try:
                    msgspec.convert(known[field.name], field.type)
                except msgspec.ValidationError as error:
                    raise ModelError(f"{field.name}: {known[field.name]!r} is refused: {error}") from None
        return msgspec.convert(known, cls)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a `config.json` that transformers and mlx-lm read; `from_dict` gives the same config back."""
        settings: dict[str, Any] = msgspec.structs.asdict(self)
        settings["eos_token_id"] = list(self.eos_token_id) or None
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "sliding_window": None,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            **settings,
        }


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_REQUIRED = _SIZES[:6]


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Raise ModelError where a setting asks for arithmetic that is not here."""
    model_type, architectures = settings.get("model_type"), settings.get("architectures")
    if model_type != "qwen3":
        raise ModelError(f"model_type: {model_type!r} is not supported; Troupe trains 'qwen3' models")
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise ModelError(f"architectures: {architectures!r} is not supported; it must be ['{ARCHITECTURE}']")
    if settings.get("attention_bias"):
        raise ModelError("attention_bias: true is not supported; Qwen3's projections have no bias")
    if (activation := settings.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"hidden_act: {activation!r} is not supported; it must be 'silu'")
    for key in ("quantization", "quantization_config"):
        if settings.get(key):
            raise ModelError(f"{key}: quantized weights cannot be trained; use the unquantized folder of this model")
    layers = settings.get("layer_types")
    if layers is not None and any(kind != "full_attention" for kind in layers):
        raise ModelError(f"layer_types: {sorted(set(layers))} is not supported; every layer must be 'full_attention'")
    if layers is None and settings.get("use_sliding_window") and settings.get("sliding_window"):
        raise ModelError(f"use_sliding_window: true (window {settings['sliding_window']}) is not supported")


def _rope_theta(settings: Mapping[str, Any]) -> Any:
    """The rotary base, which newer folders keep inside `rope_parameters`. Refuses scaled rotary positions."""
    theta = settings.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        nested = settings.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise ModelError(f"{key}: {nested!r} is refused; it must be an object")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise ModelError(f"{key}.rope_type: {kind!r} is not supported; it must be 'default'")
        if nested.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{key}.partial_rotary_factor: {nested['partial_rotary_factor']} is not supported")
        if nested.get("rope_theta") is not None:
            theta = nested["rope_theta"]
    return DEFAULT_ROPE_THETA if theta is None else theta


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
    if not is_on_cpu():  # one fused kernel
        return lambda y: mx.fast.rope(y, d, traditional=False, base=base, scale=1.0, offset=offset)
    frequencies = base ** (mx.arange(0, d, 2).astype(mx.float32) / -d)
    positions = mx.arange(T) + (offset[:, None, None] if isinstance(offset, mx.array) else offset)
    angles = positions[..., None].astype(mx.float32) * frequencies  # here once, not in each layer: (T or B·1·T, d/2)
    cos, sin = mx.cos(angles), mx.sin(angles)

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
