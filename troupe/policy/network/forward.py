"""A network as pure functions over a flat dict of arrays named as in Hugging Face folders: one forward for all.

In what families differ is data: `NetworkConfig`, with its `Family`. Which tokens see each other is not said here:
whoever decodes step by step, or packs many rows into one, passes its own `Attention`.

Shapes: B rows, T tokens, D hidden size, V vocabulary, H query heads, K key/value heads, d head size.

Sources: those of `FAMILIES`; RMSNorm (arXiv:1910.07467); rotary positions (arXiv:2104.09864); SwiGLU
(arXiv:2002.05202); grouped-query attention (arXiv:2305.13245).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import attention_mask
from troupe.policy.network.delta import DeltaInputs, DeltaSizes, DeltaState, gated_norm, rates, through_rows
from troupe.policy.network.dropout import Dropout
from troupe.policy.network.experts import Places, Routed, Stack, are_few, likeliest, shares
from troupe.policy.network.fused_kernels import turned_heads
from troupe.policy.network.gating import gated
from troupe.policy.network.head import embed
from troupe.policy.network.linear import JOINED, A, Linear
from troupe.policy.network.rotation import Rotation, Rotations
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    ROUTER,
    STACKS,
    Weights,
    norm_scale,
    weights_dtype,
)


class Attention(Protocol):
    """How the queries of new tokens meet keys and values, their own and earlier ones, and what a gated delta net
    carries on to them. Layers are counted among those of their sort (`NetworkConfig.place`)."""

    @property
    def offset(self) -> int | mx.array:
        """Rotary position of the first new token: one for all rows, or int32 (B,); or of every token, int32 (B, T)."""

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        """Queries (B, H, T, d), new keys and values (B, K, T, d), all rotated → (B, H, T, d). `window`: how many tokens
        each sees at most, itself among them."""

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        """What the gated delta rule gives of new tokens, behind earlier ones: float32 (B, T, value heads, b)."""


class WholeRows:
    """Attention within whole rows: a token sees itself and what comes before it."""

    offset: int | mx.array = 0

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        mask = attention_mask(q.shape[2], k.shape[2], window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        return through_rows(inputs, DeltaState.empty(inputs.mixed.shape[0], sizes), sizes, paced=False)[0]


def hidden_states(
    config: NetworkConfig,
    weights: Weights,
    ids: mx.array,
    *,
    attention: Attention | None = None,
    routes: Routes | None = None,
) -> mx.array:
    """Integer ids (B, T) → hidden states (B, T, D) after the final norm, in the weights' dtype.

    Without `attention` every row attends within itself, and padding on its right changes nothing. `routes`: where
    tokens go in layers that are mixtures of experts, and what is noted of it; None: where the routers say. Pure but for
    that, so it can be differentiated by its weights (`policy/gradient/backward.py` does that with less memory and
    faster); with those of `fuse_projections` it is faster.
    """
    attention = attention or WholeRows()
    rotations = Rotations(config, ids.shape[1], attention.offset)
    x = embedded(config, weights, ids)
    for index in range(config.num_hidden_layers):
        x = _through_layer(Layer(config, weights, index, routes=routes), x, attention, rotations)
    return normalized(config, x, norm_scale(config, weights[FINAL_NORM]))


def normalized(config: NetworkConfig, x: mx.array, scale: mx.array) -> mx.array:
    """x (…, n) over the root of its mean square, times `scale` (n,) of `norm_scale`; in the type of x."""
    y = mx.fast.rms_norm(x, scale, config.rms_norm_eps)
    return y.astype(x.dtype) if config.family.norm_offset else y


def embedded(config: NetworkConfig, weights: Weights, ids: mx.array) -> mx.array:
    """Integer ids (…) → what the embedding has for them (…, D), scaled where the family does so."""
    table = Linear.of(config, weights, EMBEDDING.removesuffix(".weight"))
    x = embed(table.weight, ids) if table.scales is None else table.expanded(weights_dtype(weights), ids)
    scale = embedding_scale(config, x.dtype)
    return x if scale is None else x * scale


def embedding_scale(config: NetworkConfig, dtype: mx.Dtype) -> mx.array | None:
    """What embedded tokens are multiplied by, rounded to their type as in transformers; None: by nothing."""
    return mx.array(math.sqrt(config.hidden_size), dtype) if config.family.scales_embedding else None


def head_of(config: NetworkConfig, weights: Weights) -> Linear:
    """The matrix (V, D) that gives logits: the embedding, where names are tied."""
    return Linear.of(config, weights, (EMBEDDING if config.tie_word_embeddings else HEAD).removesuffix(".weight"))


def project(config: NetworkConfig, weights: Weights, hidden: mx.array) -> mx.array:
    """Hidden states (…, D) → logits (…, V) in the weights' dtype."""
    return head_of(config, weights)(hidden)


QKV, GATE_UP = JOINED
DELTA = "linear_attn."
DELTA_PARTS = [f"{DELTA}in_proj_{name}" for name in ("qkv", "z", "b", "a")]
DELTA_OUT = f"{DELTA}out_proj"
DELTA_KERNEL = "conv1d.weight"
DELTA_NORM = "norm.weight"
QK_NORM = "self_attn.qk_norm"


class Layer:
    """One decoder layer of a network's weights, by the names within it."""

    def __init__(
        self,
        config: NetworkConfig,
        weights: Weights,
        index: int,
        dropout: Dropout | None = None,
        routes: Routes | None = None,
    ) -> None:
        self.config, self.index, self._dropout, self.routes = config, index, dropout, routes
        self._weights, self._prefix = weights, f"model.layers.{index}."
        self.family, self.spec = config.family, config.layer(index)
        self.place = config.place(index)
        """Its number among the layers of its sort."""

    def norm(self, name: str) -> mx.array:
        """What one of its norms, such as "input_layernorm", multiplies by."""
        weight = self._weights[f"{self._prefix}{name}.weight"]
        return norm_scale(self.config, weight) if self.family.norm_offset else weight

    def norm_dtype(self, name: str) -> mx.Dtype:
        """The type of the weight of one of its norms."""
        return self._weights[f"{self._prefix}{name}.weight"].dtype

    def normalized(self, name: str | None, x: mx.array) -> mx.array:
        """x through one of its norms; None is no norm."""
        return x if name is None else normalized(self.config, x, self.norm(name))

    def linear(self, name: str) -> Linear:
        """One of its matrices, such as "mlp.up_proj", or of those that are joined."""
        module = self._prefix + name
        linear = Linear.of(self.config, self._weights, module)
        if self._dropout is None or linear.a is None:
            return linear
        return linear._replace(drop=partial(self._dropout.of, module))

    @property
    def has_adapters(self) -> bool:
        """Whether beside any of its matrices there is one."""
        modules = [name for whole in JOINED for name in self.parts(whole)] + ["self_attn.o_proj", "mlp.down_proj"]
        modules += [*DELTA_PARTS, DELTA_OUT]
        return any(f"{self._prefix}{module}{A}.weight" in self._weights for module in modules)

    def parts(self, whole: str) -> Sequence[str]:
        """The matrices that there are of those that `whole` joins: itself, or each."""
        return [whole] if f"{self._prefix}{whole}.weight" in self._weights else JOINED[whole]

    def inputs(self, whole: str, y: mx.array) -> list[mx.array]:
        """(…, D) → the products of the matrices that `whole` joins, each (…, out)."""
        found = [self.linear(name)(y) for name in self.parts(whole)]
        if len(found) > 1:
            return found
        config, d = self.config, self.config.head_dim
        if whole == GATE_UP:
            return list(mx.split(found[0], 2, axis=-1))
        ends = [config.query_size, config.query_size + config.num_key_value_heads * d]
        return list(mx.split(found[0], ends, axis=-1))

    def joined_inputs(self, whole: str, y: mx.array) -> mx.array:
        """As `inputs`, behind each other."""
        found = [self.linear(name)(y) for name in self.parts(whole)]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)

    def attention_inputs(self, x: mx.array) -> list[mx.array]:
        """(B, T, D) → queries, keys and values (B, T, heads, d), neither normalized nor rotated; and where attention is
        gated, its gates, like the queries, a head of which stands before each of theirs in what the matrix gives."""
        q, *rest = [self._heads(part) for part in self.inputs(QKV, self.normalized("input_layernorm", x))]
        return [q[:, :, 0::2], *rest, q[:, :, 1::2]] if self.family.gates_attention else [q, *rest]

    def delta_products(self, x: mx.array) -> list[mx.array]:
        """(B, T, D) → what a gated delta net mixes, gates by, and has its rates and decays from, each (B, T, out)."""
        y = self.normalized("input_layernorm", x)
        return [self.linear(name)(y) for name in DELTA_PARTS]

    def delta_tensor(self, name: str) -> mx.array:
        """A tensor of a gated delta net that is no matrix, by its name in it; of a convolution (C, taps)."""
        tensor = self._weights[f"{self._prefix}{DELTA}{name}"]
        return tensor.squeeze(1) if tensor.ndim == 3 else tensor

    def delta_inputs(self, mixed: mx.array, a: mx.array, b: mx.array) -> DeltaInputs:
        """For `Attention.recur`, of three of its products."""
        decay, rate = rates(a, b, self.delta_tensor("A_log"), self.delta_tensor("dt_bias"))
        return DeltaInputs(mixed, decay, rate, self.delta_tensor(DELTA_KERNEL))

    def mlp(self, x: mx.array) -> mx.array:
        """(B, T, D) → what the MLP, or the experts, give of it, (B, T, D)."""
        h, activation = self.normalized(self.family.norm_before_mlp, x), self.family.activation
        if self.spec.experts is None:
            return self.linear("mlp.down_proj")(gated(activation, *self.inputs(GATE_UP, h)))
        rows = h.reshape(-1, h.shape[-1])
        routed = self.routed(rows)
        if are_few(self.spec.experts, routed.chosen):
            return self._mixed_one_by_one(rows, routed).reshape(x.shape)
        places = Places.of(routed.chosen)
        y = self.stack("down")(gated(activation, *self.expert_inputs(rows, places)), places.experts)
        return self.mixed(routed, places, y).reshape(x.shape)

    def _mixed_one_by_one(self, rows: mx.array, routed: Routed) -> mx.array:
        """The same for few tokens (N, D), each of which is k times in a row."""
        experts, k = routed.chosen.reshape(-1), routed.chosen.shape[1]
        repeated = mx.repeat(rows, k, axis=0)
        gate, up = (self.stack(name)(repeated, experts, is_sorted=False) for name in ("gate", "up"))
        y = self.stack("down")(gated(self.family.activation, gate, up), experts, is_sorted=False)
        return self._added_up(routed, y.reshape(len(rows), k, -1))

    def routed(self, rows: mx.array) -> Routed:
        """Where tokens (N, D) go, in a layer that is a mixture of experts."""
        assert self.spec.experts is not None
        logits = self.linear(ROUTER)(rows)
        if self.routes is not None:
            return self.routes.route(self.index, logits)
        return Routed(logits, likeliest(self.spec.experts, mx.stop_gradient(logits)))

    def stack(self, name: str) -> Stack:
        """The matrices "gate", "up" or "down" of all experts."""
        return Stack.of(self.config, self._weights, self._prefix + STACKS[name])

    def expert_inputs(self, rows: mx.array, places: Places) -> list[mx.array]:
        """(N, D) → gate and up (n, F), in the order of the experts."""
        x = rows[places.tokens]
        return [self.stack(name)(x, places.experts) for name in ("gate", "up")]

    def mixed(self, routed: Routed, places: Places, y: mx.array) -> mx.array:
        """What experts give (n, D), in their order, added up by the shares → (N, D)."""
        return self._added_up(routed, places.collected(y, len(routed.chosen)))

    def _added_up(self, routed: Routed, parts: mx.array) -> mx.array:
        """What experts give of each token (N, k, D), by their shares → (N, D)."""
        assert self.spec.experts is not None
        return mx.sum(parts * shares(self.spec.experts, *routed).astype(parts.dtype)[..., None], axis=1)

    def behind_attention(self, x: mx.array, o: mx.array) -> mx.array:
        """What attention adds to x, where `o` is what its last product gives."""
        return x + (self.normalized(self.family.norm_behind_attention, o) if self.family.norms_behind else o)

    def behind_mlp(self, x: mx.array, y: mx.array) -> mx.array:
        """What the MLP adds to x, where `y` is what its last product gives."""
        return x + (self.normalized(self.family.norm_behind_mlp, y) if self.family.norms_behind else y)

    @property
    def fused_qk_scales(self) -> mx.array | None:
        """What the norms of queries and keys multiply by (H + K, d), as `fuse_projections` lays it out; None where the
        family has no such norms. KeyError where it is not laid out."""
        return self._weights[f"{self._prefix}{QK_NORM}.weight"] if self.family.qk_norm else None

    def turned(self, q: mx.array, k: mx.array, rotate: Rotation) -> tuple[mx.array, mx.array]:
        """Queries and keys (B, T, heads, d) → (B, heads, T, d), normalized, where the family does so, and rotated."""
        names = ("self_attn.q_norm", "self_attn.k_norm") if self.family.qk_norm else (None, None)
        q, k = (self._turned(y, name, rotate) for y, name in zip((q, k), names, strict=True))
        return q, k

    def _turned(self, y: mx.array, name: str | None, rotate: Rotation) -> mx.array:
        scale = None if name is None else self.norm(name)
        tables = rotate.tables(y, scale)
        if tables is None:
            return rotate(self.normalized(name, y).swapaxes(1, 2))
        return turned_heads(y, scale, self.config.rms_norm_eps, *tables).swapaxes(1, 2)

    def rotated_inputs(self, x: mx.array, rotate: Rotation) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """(B, T, D) → queries, keys and values (B, heads, T, d), normalized and rotated, and gates (B, T, H, d)."""
        H, K, qk_norm = self.config.num_attention_heads, self.config.num_key_value_heads, self.family.qk_norm
        is_joined = f"{self._prefix}{QK_NORM if qk_norm else QKV}.weight" in self._weights
        if not is_joined or rotate.turns_packed:  # the latter as the learner's gradient does, in the same bits
            q, k, v, *gate = self.attention_inputs(x)
            return *self.turned(q, k, rotate), v.swapaxes(1, 2), gate[0] if gate else None
        qkv = self._heads(self.joined_inputs(QKV, self.normalized("input_layernorm", x)))
        both = qkv[:, :, : H + K]
        if qk_norm:
            scales = self._weights[f"{self._prefix}{QK_NORM}.weight"]
            both = both.astype(scales.dtype) if self.family.norm_offset else both
            both = mx.fast.rms_norm(both, None, self.config.rms_norm_eps) * scales
            both = both.astype(x.dtype) if self.family.norm_offset else both
        both = rotate(both.swapaxes(1, 2))
        return both[:, :H], both[:, H:], qkv[:, :, H + K :].swapaxes(1, 2), None

    def _heads(self, y: mx.array) -> mx.array:
        return y.reshape(*y.shape[:2], -1, self.config.head_dim)


def _through_layer(layer: Layer, x: mx.array, attention: Attention, rotations: Rotations) -> mx.array:
    """(B, T, D) → (B, T, D)."""
    if layer.spec.is_delta:
        o = _through_delta(layer, x, attention)
    else:
        config, spec = layer.config, layer.spec
        *turned, gate = layer.rotated_inputs(x, rotations.of(spec.rope))
        q, k, v = turned
        o = attention.attend(layer.place, q, k, v, config.attention_scale, spec.window)
        o = o.swapaxes(1, 2) if gate is None else gated_heads(o.swapaxes(1, 2), gate)
        o = layer.linear("self_attn.o_proj")(o.reshape(*x.shape[:2], -1))
    x = layer.behind_attention(x, o)
    return layer.behind_mlp(x, layer.mlp(x))


def gated_heads(o: mx.array, gate: mx.array) -> mx.array:
    """What attention gives, times σ of its gate, elementwise."""
    return o * mx.sigmoid(gate)


def _through_delta(layer: Layer, x: mx.array, attention: Attention) -> mx.array:
    """(B, T, D) → what a gated delta net adds to it."""
    mixed, z, b, a = layer.delta_products(x)
    o = attention.recur(layer.place, layer.delta_inputs(mixed, a, b), layer.config.delta).astype(mixed.dtype)
    y = gated_norm(o, z, layer.delta_tensor(DELTA_NORM), layer.config.rms_norm_eps)
    return layer.linear(DELTA_OUT)(y)
