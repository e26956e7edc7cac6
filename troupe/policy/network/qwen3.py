"""The Qwen3 network as pure functions over a flat dict of arrays named as in Hugging Face folders.

Which tokens see each other is not said here: whoever decodes step by step, or packs many rows into one, passes its own
`Attention`.

Shapes: B rows, T tokens, D hidden size, V vocabulary, H query heads, K key/value heads, d head size.

Sources: Qwen3 Technical Report (arXiv:2505.09388); RMSNorm (arXiv:1910.07467); rotary positions (arXiv:2104.09864);
SwiGLU (arXiv:2002.05202); grouped-query attention (arXiv:2305.13245).
"""

import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import mlx.core as mx

from troupe.policy.network.architecture import Qwen3Config
from troupe.policy.network.elementwise import WORTHWHILE, compiled, is_on_cpu, swiglu
from troupe.policy.network.head import embed
from troupe.policy.network.rotary import attention_factor, inverse_frequencies

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
        """Rotary position of the first new token: one for all rows, or int32 (B,); or of every token, int32 (B, T)."""

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """Queries (B, H, T, d), new keys and values (B, K, T, d), all rotated → (B, H, T, d)."""


class WholeRows:
    """Attention within whole rows: a token sees itself and what comes before it."""

    offset: int | mx.array = 0

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def hidden_states(
    config: Qwen3Config,
    weights: Weights,
    ids: mx.array,
    *,
    attention: Attention | None = None,
) -> mx.array:
    """Integer ids (B, T) → hidden states (B, T, D) after the final norm, in the weights' dtype.

    Without `attention` every row attends within itself, and padding on its right changes nothing. Pure, so it can be
    differentiated by its weights (`policy/gradient/backward.py` does that with less memory and faster); with those of
    `fuse_projections` it is faster.
    """
    attention = attention or WholeRows()
    rotate = Rotation(config, ids.shape[1], attention.offset)
    x = embed(weights[EMBEDDING], ids)
    for index in range(config.num_hidden_layers):
        x = _layer(config, weights, index, x, attention, rotate)
    return mx.fast.rms_norm(x, weights[FINAL_NORM], config.rms_norm_eps)


def project(config: Qwen3Config, weights: Weights, hidden: mx.array) -> mx.array:
    """Hidden states (…, D) → logits (…, V) in the weights' dtype."""
    return hidden @ weights[EMBEDDING if config.tie_word_embeddings else HEAD].T


def fuse_projections(config: Qwen3Config, weights: Weights) -> Weights:
    """The same network for decoding: q, k, v as one matrix and gate, up as one, which takes fewer and larger products.

    On a CPU gate and up stay apart, since halves of a product's rows are not contiguous, and these matrices lie column
    by column: BLAS copies a matrix at every product, and transposing it on the way takes as long as multiplying 32 rows
    by it. Copies those matrices (evaluated); shares the others. `hidden_states` and `project` take the result.
    """
    fused = dict(weights)
    by_columns = is_on_cpu()
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        for whole, parts in _FUSED.items():
            if by_columns and whole == _GATE_UP:
                fused |= {layer + part: _by_columns(fused[layer + part]) for part in parts}
            else:
                joined = mx.concatenate([fused.pop(layer + part) for part in parts])
                fused[layer + whole] = _by_columns(joined) if by_columns else joined
        norms = [(config.num_attention_heads, "q_norm"), (config.num_key_value_heads, "k_norm")]
        scales = [mx.tile(fused.pop(f"{layer}self_attn.{name}.weight"), (heads, 1)) for heads, name in norms]
        fused[f"{layer}self_attn.qk_norm.weight"] = mx.concatenate(scales)
    mx.eval(fused)
    return fused


_GATE_UP = "mlp.gate_up_proj.weight"
_FUSED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
    _GATE_UP: ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def _by_columns(x: mx.array) -> mx.array:
    """The same matrix, whose transpose is contiguous."""
    return mx.contiguous(x.T).T


class Rotation:
    """Turns queries and keys by rotary positions."""

    def __init__(self, config: Qwen3Config, T: int, offset: int | mx.array) -> None:
        """`offset` as in `Attention.offset`."""
        self._d, self._base = config.head_dim, config.rope_theta
        self._factor = attention_factor(config.rope_scaling)
        self._offset = offset
        self._periods: mx.array | None = None
        frequencies = mx.array(inverse_frequencies(self._d, self._base, config.rope_scaling))
        self._has_tables = is_on_cpu()  # elsewhere one fused kernel is faster
        if config.rope_scaling is not None:
            self._periods = 1.0 / frequencies
        if self._has_tables:
            if isinstance(offset, mx.array):
                positions = offset[:, None] if offset.ndim == 2 else offset[:, None, None] + mx.arange(T)
            else:
                positions = offset + mx.arange(T)
            angles = positions[..., None].astype(mx.float32) * frequencies  # (T or B·1·T, d/2)
            self._cos, self._sin = mx.cos(angles) * self._factor, mx.sin(angles) * self._factor

    def __call__(self, y: mx.array) -> mx.array:
        """(B, heads, T, d) turned."""
        if self._has_tables:
            return _turned(y, self._cos, self._sin)
        if isinstance(self._offset, int) or self._offset.ndim == 1:
            return self._turn(y, self._offset)
        B, heads, T, d = y.shape  # a position for every token: each is a row of its own
        tokens = y.swapaxes(1, 2).reshape(B * T, heads, 1, d)
        return self._turn(tokens, self._offset.reshape(-1)).reshape(B, T, heads, d).swapaxes(1, 2)

    def gradient(self, cotangent: mx.array) -> mx.array:
        """The cotangent of what was turned, from that of the result: turned back."""
        if self._has_tables:
            return _turned(cotangent, self._cos, -self._sin)
        return mx.vjp(self, [cotangent], [cotangent])[1][0]  # linear: where it is taken does not matter

    def _turn(self, y: mx.array, offset: int | mx.array) -> mx.array:
        if self._periods is None:
            return mx.fast.rope(y, self._d, traditional=False, base=self._base, scale=1.0, offset=offset)
        stretched = y.astype(mx.float32) * self._factor  # which 16 bits would round
        turned = mx.fast.rope(
            stretched, self._d, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )
        return turned.astype(y.dtype)


def _turned(y: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(y, 2, axis=-1)
    turn = compiled(_turn_halves, a.shape) if a.size > WORTHWHILE else _turn_halves
    return mx.concatenate(list(turn(a, b, cos, sin)), axis=-1).astype(y.dtype)


def _turn_halves(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    return a * cos - b * sin, a * sin + b * cos


def _layer(
    config: Qwen3Config, weights: Weights, index: int, x: mx.array, attention: Attention, rotate: Rotation
) -> mx.array:
    """One decoder layer, (B, T, D) → (B, T, D)."""
    H, K, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps

    w = layer_weights(weights, index)
    if f"model.layers.{index}.self_attn.qkv_proj.weight" not in weights:
        *qk, v = attention_inputs(config, w, x)
        q, k = (
            rotate(mx.fast.rms_norm(y, w(f"self_attn.{name}_norm"), eps).swapaxes(1, 2))
            for y, name in zip(qk, "qk", strict=True)
        )
    else:
        y = mx.fast.rms_norm(x, w("input_layernorm"), eps)
        qkv = _heads(config, y, w("self_attn.qkv_proj"))
        both = mx.fast.rms_norm(qkv[:, :, : H + K], None, eps) * w("self_attn.qk_norm")
        both = rotate(both.swapaxes(1, 2))
        q, k, v = both[:, :H], both[:, H:], qkv[:, :, H + K :]
    o = attention.attend(index, q, k, v.swapaxes(1, 2), config.head_dim**-0.5)
    x = x + o.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ w("self_attn.o_proj").T
    if f"model.layers.{index}.{_GATE_UP}" not in weights:
        return x + swiglu(*mlp_inputs(config, w, x)) @ w("mlp.down_proj").T
    y = mx.fast.rms_norm(x, w("post_attention_layernorm"), eps)
    return x + swiglu(*mx.split(y @ w("mlp.gate_up_proj").T, 2, axis=-1)) @ w("mlp.down_proj").T


LayerWeights = Callable[[str], mx.array]
"""Name within a layer, such as "mlp.up_proj" → weight."""


def layer_weights(weights: Weights, index: int) -> LayerWeights:
    """Those of one layer."""
    return lambda name: weights[f"model.layers.{index}.{name}.weight"]


def attention_inputs(config: Qwen3Config, w: LayerWeights, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(B, T, D) → queries, keys and values (B, T, heads, d), neither normalized nor rotated."""
    y = mx.fast.rms_norm(x, w("input_layernorm"), config.rms_norm_eps)
    q, k, v = (_heads(config, y, w(f"self_attn.{name}_proj")) for name in "qkv")
    return q, k, v


def mlp_inputs(config: Qwen3Config, w: LayerWeights, x: mx.array) -> tuple[mx.array, mx.array]:
    """(B, T, D) → gate and up (B, T, F)."""
    y = mx.fast.rms_norm(x, w("post_attention_layernorm"), config.rms_norm_eps)
    return y @ w("mlp.gate_proj").T, y @ w("mlp.up_proj").T


def _heads(config: Qwen3Config, y: mx.array, projection: mx.array) -> mx.array:
    return (y @ projection.T).reshape(*y.shape[:2], -1, config.head_dim)
