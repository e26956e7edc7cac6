"""Decoding on NVIDIA cards with kernels of our own: the same network and the same cache, in a third of the launches.

Shapes as in `cache.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.cache import BLOCK, DecodingCache, PromptCache
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.forward import GATE_UP, QK_NORM, QKV, Layer, embedded
from troupe.policy.network.rotary import attention_factor, inverse_frequencies
from troupe.policy.network.tensors import FINAL_NORM, Weights

_WORTH_COMPILING = 8
"""Steps of the same shapes after which it pays: for 28 layers it takes some 8 ms, and saves about 1 ms a step."""


class CudaDecodingCache(DecodingCache):
    """A `DecodingCache` whose rows keep their own keys and values together, (B, 2·K, N, d) a layer."""

    def __init__(self, prompts: PromptCache, width: int, limit: int) -> None:
        super().__init__(prompts, width, limit)
        self._own: list[mx.array] = []
        self._shape: object = None
        self._steps = 0
        self._layers: Callable[..., mx.array] = _through_layers

    @property
    def arrays(self) -> list[mx.array]:
        return [*self._prompt_keys, *self._prompt_values, *self._own]

    def forward(self, config: NetworkConfig, weights: Weights, ids: mx.array) -> mx.array:
        """As `DecodingCache.forward`, with weights of `fuse_projections`."""
        lengths, step = mx.array(self._prompt_lengths, mx.int32), mx.array([self.length], mx.int32)
        frequencies = mx.array(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        angles, factor = (lengths + step)[:, None] * frequencies, attention_factor(config.rope_scaling)
        turn = mx.cos(angles) * factor, mx.sin(angles) * factor
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        x = embedded(config, weights, ids)
        for index in range(config.num_hidden_layers):
            self._make_room(index, x.dtype)
        plan = cuda_kernels.plan_launch(len(ids), *heads, x.dtype, max(self._prompt_lengths) + self.length)
        shape = plan, self._own[0].shape
        if shape != self._shape:
            self._shape, self._steps, self._layers = shape, 0, partial(_through_layers, config, plan)
        self._steps += 1
        if self._steps == _WORTH_COMPILING:
            self._layers = mx.compile(self._layers)
        y = self._layers(x, dict(weights), (self._prompt_keys, self._prompt_values, self._own), turn, lengths, step)
        self.advance()
        return y

    def select(self, slots: Sequence[int], rows: Sequence[int], width: int) -> None:
        super().select(slots, rows, width)
        index = mx.array(list(rows))
        self._own = [mx.contiguous(x[index]) for x in self._own]
        mx.eval(self._own)

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


def _through_layers(
    config: NetworkConfig,
    plan: cuda_kernels.Launch,
    x: mx.array,
    weights: Weights,
    kept: tuple[list[mx.array], list[mx.array], list[mx.array]],
    turn: tuple[mx.array, mx.array],
    lengths: mx.array,
    step: mx.array,
) -> mx.array:
    """Embedded ids (B, D) → hidden states after the final norm. `kept`: prompts' keys and values, and the rows' own.

    To be compiled, which fuses nothing here, but takes down once what to launch.
    """
    eps = config.rms_norm_eps
    constants = mx.array([eps, config.head_dim**-0.5])
    for index, (*prompts, own) in enumerate(zip(*kept, strict=True)):
        layer = Layer(config, weights, index)
        y = mx.fast.rms_norm(x, layer.norm("input_layernorm"), eps)
        o = cuda_kernels.attend(
            layer.joined_inputs(QKV, y),
            layer.norm(QK_NORM),
            turn,
            (prompts[0], prompts[1]),
            own,
            lengths,
            step,
            constants,
            plan=plan,
        )
        x = x + layer.linear("self_attn.o_proj")(o)  # mx.addmm takes twice as long to launch
        y = mx.fast.rms_norm(x, layer.norm("post_attention_layernorm"), eps)
        x = x + layer.linear("mlp.down_proj")(cuda_kernels.gate(layer.joined_inputs(GATE_UP, y)))
    return mx.fast.rms_norm(x, weights[FINAL_NORM], eps)
