"""Decoding on NVIDIA cards with kernels of our own: the same network and the same cache, in a third of the launches.

Shapes as in `cache.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx

from troupe.policy.decode import cuda_kernels, cuda_layer
from troupe.policy.decode.cache import BLOCK, DecodingCache, PromptCache
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.forward import GATE_UP, QKV, Layer, embedded, normalized
from troupe.policy.network.gating import gated
from troupe.policy.network.rotary import Rope, attention_factor, inverse_frequencies
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import FINAL_NORM, Weights, norm_scale

_WORTH_COMPILING = 8
"""Steps of the same shapes after which it pays: for 28 layers it takes some 8 ms, and saves about 1 ms a step."""


def serves(config: NetworkConfig) -> bool:
    """Whether networks of this kind are decoded with these kernels, here. Not those with experts or gated delta nets,
    nor with attention that is gated or turns heads in part."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    is_plain = not config.sparse_layers and not config.delta_layers and not config.family.gates_attention
    return is_plain and config.rotary_dim == config.head_dim and cuda_kernels.can_serve(*heads)


class CudaDecodingCache(DecodingCache):
    """A `DecodingCache` whose rows keep their own keys and values together, (B, 2·K, N, d) a layer."""

    def __init__(self, prompts: PromptCache, width: int, limit: int) -> None:
        super().__init__(prompts, width, limit)
        self._own: list[mx.array] = []
        self._shape: object = None
        self._counter = cuda_layer.new_counter()
        self._steps = 0
        self._layers: Callable[..., mx.array] = _through_layers

    @property
    def arrays(self) -> list[mx.array]:
        return [*self._prompt_keys, *self._prompt_values, *self._own]

    def own(self, layer: int) -> tuple[mx.array, mx.array]:
        keys, values = mx.split(self._own[layer], 2, axis=1)
        return keys, values

    def empty(self, layer: int) -> None:
        super().empty(layer)
        self._own[layer : layer + 1] = [mx.array(0)] if layer < len(self._own) else []

    def forward(self, config: NetworkConfig, weights: Weights, ids: mx.array, routes: Routes | None = None) -> mx.array:
        """As `DecodingCache.forward`, with weights of `fuse_projections`, for networks without experts."""
        lengths, step = mx.array(self._prompt_lengths, mx.int32), mx.array([self.length], mx.int32)
        ropes = tuple(dict.fromkeys(config.layer(index).rope for index in range(config.num_hidden_layers)))
        turns = [_turn(config.head_dim, rope, (lengths + step)[:, None]) for rope in ropes]
        x = embedded(config, weights, ids)
        for index in range(config.num_hidden_layers):
            self._make_room(index, x.dtype)
        if self.length and self.length % BLOCK == 0:  # long before the old one comes to its end
            self._counter = cuda_layer.new_counter()
        plans = _plans(config, (len(ids), self.width), x.dtype, max(self._prompt_lengths) + self.length)
        shape = plans, self._own[0].shape
        if shape != self._shape:
            self._shape, self._steps, self._layers = shape, 0, partial(_through_layers, config, plans, ropes)
        self._steps += 1
        if self._steps == _WORTH_COMPILING:
            self._layers = mx.compile(self._layers)
        y = self._layers(
            x, dict(weights), (self._prompt_keys, self._prompt_values, self._own), turns, lengths, step, self._counter
        )
        self.advance()
        return y

    def select(
        self, slots: Sequence[int], rows: Sequence[int], width: int, before: Callable[[int], None] | None = None
    ) -> None:
        super().select(slots, rows, width, before)
        mx.eval(self._own)

    def _select(self, layer: int, slots: mx.array | None, rows: mx.array, shape: tuple[int, int]) -> list[mx.array]:
        found = super()._select(layer, slots, rows, shape)
        if layer < len(self._own):
            self._own[layer] = mx.contiguous(self._own[layer][rows])
            found.append(self._own[layer])
        return found

    def _make_room(self, layer: int, dtype: mx.Dtype) -> None:
        """Let the rows' own keys and values, (B, 2·K, N, d), have room for the next."""
        kept = self._own
        if layer == len(kept) or kept[layer].shape[2] == self.length:
            more = max(1, min(BLOCK, self._limit - self.length))
            _, K, _, d = self._prompt_keys[layer].shape
            room = mx.zeros((len(self._prompt_lengths) * self.width, 2 * K, more, d), dtype)
            whole = mx.concatenate([kept[layer], room], axis=2) if self.length else mx.contiguous(room)
            kept[layer : layer + 1] = [whole]
            mx.eval(whole)  # before it is written to, and before the next layer's: else all are there twice


def _turn(d: int, rope: Rope, positions: mx.array) -> tuple[mx.array, mx.array]:
    """Cosines and sines (S, d/2) of positions (S, 1), float32."""
    angles, factor = positions * mx.array(inverse_frequencies(d, *rope)), attention_factor(rope.scaling)
    return mx.cos(angles) * factor, mx.sin(angles) * factor


def _plans(
    config: NetworkConfig, rows: tuple[int, int], dtype: mx.Dtype, context: int
) -> dict[int | None, cuda_kernels.Launch]:
    """By the window of a layer. `rows`: how many in all, and a prompt."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    windows = {config.layer(index).window for index in range(config.num_hidden_layers)}
    seen = {window: context if window is None else min(context, window) for window in windows}
    return {window: cuda_kernels.plan_launch(*rows, *heads, dtype, tokens) for window, tokens in seen.items()}


def _through_layers(
    config: NetworkConfig,
    plans: Mapping[int | None, cuda_kernels.Launch],
    ropes: Sequence[Rope],
    x: mx.array,
    weights: Weights,
    kept: tuple[list[mx.array], list[mx.array], list[mx.array]],
    turns: Sequence[tuple[mx.array, mx.array]],
    lengths: mx.array,
    step: mx.array,
    counter: mx.array,
) -> mx.array:
    """Embedded ids (B, D) → hidden states after the final norm. `kept`: prompts' keys and values, and the rows' own;
    `turns`: one for each of `ropes`.

    To be compiled, which fuses nothing here, but takes down once what to launch.
    """
    family = config.family
    layers = [Layer(config, weights, index) for index in range(config.num_hidden_layers)]
    whole = all(plan.splits == 1 for plan in plans.values())
    whole = whole and all(cuda_layer.serves(layer, x) for layer in layers)  # some may have adapters, or be packed
    numbers = config.rms_norm_eps, config.attention_scale
    constants = {window: mx.array([*numbers, plan.together]) for window, plan in plans.items()}
    for layer, (*prompts, own) in zip(layers, zip(*kept, strict=True), strict=True):
        window, turn = layer.spec.window, turns[ropes.index(layer.spec.rope)]
        if whole:
            x = cuda_layer.through_layer(
                layer, x, turn, (prompts[0], prompts[1]), own, lengths, step, constants[window], counter
            )
            continue
        o = cuda_kernels.attend(
            layer.joined_inputs(QKV, layer.normalized("input_layernorm", x)),
            layer.fused_qk_scales,
            turn,
            (prompts[0], prompts[1]),
            own,
            lengths,
            step,
            constants[window],
            plan=plans[window],
            window=window,
        )
        x = layer.behind_attention(x, layer.linear("self_attn.o_proj")(o))  # mx.addmm takes twice as long to launch
        both = layer.joined_inputs(GATE_UP, layer.normalized(family.norm_before_mlp, x))
        if family.activation == "silu":
            inside = cuda_kernels.gate(both)
        else:
            inside = gated(family.activation, *mx.split(both, 2, axis=-1))
        x = layer.behind_mlp(x, layer.linear("mlp.down_proj")(inside))
    return normalized(config, x, norm_scale(config, weights[FINAL_NORM]))
