"""Decoding on NVIDIA cards with kernels of our own: the same network and the same cache, in a third of the launches.

Shapes as in `cache.py`. Knows nothing of sampling and stopping.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from troupe.policy import cuda_kernels
from troupe.policy.cache import BLOCK, DecodingCache, PromptCache
from troupe.policy.qwen3 import EMBEDDING, FINAL_NORM, Qwen3Config, Weights
from troupe.policy.rotary import attention_factor, inverse_frequencies


class CudaDecodingCache(DecodingCache):
    """A `DecodingCache` whose rows keep their own keys and values together, (B, 2·K, N, d) a layer."""

    def __init__(self, prompts: PromptCache, width: int, limit: int) -> None:
        super().__init__(prompts, width, limit)
        self._own: list[mx.array] = []

    @property
    def arrays(self) -> list[mx.array]:
        """See `DecodingCache.arrays`."""
        return [*self._prompt_keys, *self._prompt_values, *self._own]

    def forward(self, config: Qwen3Config, weights: Weights, ids: mx.array) -> mx.array:
        """See `DecodingCache.forward`. `weights` are those of `fuse_projections`."""
        eps = config.rms_norm_eps
        lengths, step = mx.array(self._prompt_lengths, mx.int32), mx.array([self.length], mx.int32)
        frequencies = mx.array(inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        angles, factor = (lengths + step)[:, None] * frequencies, attention_factor(config.rope_scaling)
        turn = mx.cos(angles) * factor, mx.sin(angles) * factor
        constants = mx.array([eps, config.head_dim**-0.5])
        context = max(self._prompt_lengths) + self.length
        x = weights[EMBEDDING][ids]
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}."
            y = mx.fast.rms_norm(x, weights[layer + "input_layernorm.weight"], eps)
            o = cuda_kernels.attend(
                y @ weights[layer + "self_attn.qkv_proj.weight"].T,
                weights[layer + "self_attn.qk_norm.weight"],
                turn,
                (self._prompt_keys[index], self._prompt_values[index]),
                self._own_of(index, x),
                lengths,
                step,
                constants,
                context=context,
            )
            x = x + o @ weights[layer + "self_attn.o_proj.weight"].T  # mx.addmm takes twice as long to launch
            y = mx.fast.rms_norm(x, weights[layer + "post_attention_layernorm.weight"], eps)
            gated = cuda_kernels.gate(y @ weights[layer + "mlp.gate_up_proj.weight"].T)
            x = x + gated @ weights[layer + "mlp.down_proj.weight"].T
        self.advance()
        return mx.fast.rms_norm(x, weights[FINAL_NORM], eps)

    def select(self, slots: Sequence[int], rows: Sequence[int], width: int) -> None:
        """See `DecodingCache.select`."""
        super().select(slots, rows, width)
        index = mx.array(list(rows))
        self._own = [mx.contiguous(x[index]) for x in self._own]
        mx.eval(self._own)

    def _own_of(self, layer: int, x: mx.array) -> mx.array:
        """The rows' own keys and values, (B, 2·K, N, d), with room for the next; `x` (B, …) has their type."""
        kept = self._own
        if layer == len(kept) or kept[layer].shape[2] == self.length:
            more = max(1, min(BLOCK, self._limit - self.length))
            _, K, _, d = self._prompt_keys[layer].shape
            room = mx.zeros((x.shape[0], 2 * K, more, d), x.dtype)
            whole = mx.concatenate([kept[layer], room], axis=2) if self.length else mx.contiguous(room)
            kept[layer : layer + 1] = [whole]
            mx.eval(whole)  # before it is written to, and before the next layer's: else all are there twice
        return kept[layer]
