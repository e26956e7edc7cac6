"""Queries and keys turned by rotary positions (arXiv:2104.09864): by tables on a CPU, by one fused kernel elsewhere."""

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import WORTHWHILE, compiled, is_on_cpu
from troupe.policy.network.fused_kernels import has_kernels, turns_heads
from troupe.policy.network.rotary import Rope, attention_factor, inverse_frequencies

_FEWEST = 32
"""Numbers of a head that a fused kernel is given; of fewer MLX 0.32.4's for NVIDIA cards turns at most 128 rows, and
fails with more."""


class Rotations:
    """Of a network: one for each way in which positions turn in its layers."""

    def __init__(self, config: NetworkConfig, T: int, offset: int | mx.array) -> None:
        """T tokens; `offset` as in `Attention.offset`."""
        self._of = {rope: Rotation(config.rotary_dim, rope, T, offset) for rope in config.ropes}

    def of(self, rope: Rope) -> "Rotation":
        """The one of a layer."""
        return self._of[rope]


class Rotation:
    """Turns queries and keys by rotary positions."""

    def __init__(self, turned: int, rope: Rope, T: int, offset: int | mx.array) -> None:
        """T tokens, and the first numbers of a head that are turned, others not; `offset` as in `Attention.offset`."""
        self._d, self._base = turned, rope.theta
        self._factor = attention_factor(rope.scaling)
        self._offset = offset
        self._periods: mx.array | None = None
        frequencies = mx.array(inverse_frequencies(self._d, *rope))
        self._frequencies = frequencies
        self._of_tokens: tuple[mx.array, mx.array] | None = None
        self._has_tables = is_on_cpu() or turned < _FEWEST  # elsewhere one fused kernel is faster
        if rope.scaling is not None:
            self._periods = 1.0 / frequencies
        if self._has_tables:
            if isinstance(offset, mx.array):
                positions = offset[:, None] if offset.ndim == 2 else offset[:, None, None] + mx.arange(T)
            else:
                positions = offset + mx.arange(T)
            angles = positions[..., None].astype(mx.float32) * frequencies  # (T or B·1·T, d/2)
            self._cos, self._sin = mx.cos(angles) * self._factor, mx.sin(angles) * self._factor

    @property
    def turns_packed(self) -> bool:
        """Whether there is a position for every token, and kernels of our own for tokens that are so packed."""
        return isinstance(self._offset, mx.array) and self._offset.ndim == 2 and has_kernels()

    def tables(self, x: mx.array, scale: mx.array | None) -> tuple[mx.array, mx.array] | None:
        """Cosines and sines, float32 (T, d/2) each, where `turned_heads` is to turn x (1, T, heads, d) with a position
        for every token; else None."""
        if not self.turns_packed or not turns_heads(x, scale, self._d):
            return None
        assert isinstance(self._offset, mx.array)
        if self._of_tokens is None:
            angles = self._offset.reshape(-1, 1).astype(mx.float32) * self._frequencies
            self._of_tokens = mx.cos(angles) * self._factor, mx.sin(angles) * self._factor
        return self._of_tokens

    def __call__(self, y: mx.array) -> mx.array:
        """(B, heads, T, d) turned."""
        if y.shape[-1] > self._d:
            return mx.concatenate([self(y[..., : self._d]), y[..., self._d :]], axis=-1)
        if self._has_tables:
            return _turned(y, self._cos, self._sin)
        if isinstance(self._offset, int) or self._offset.ndim == 1:
            return self._turn(y, self._offset)
        B, heads, T, d = y.shape  # a position for every token: each is a row of its own
        tokens = y.swapaxes(1, 2).reshape(B * T, heads, 1, d)
        return self._turn(tokens, self._offset.reshape(-1)).reshape(B, T, heads, d).swapaxes(1, 2)

    def gradient(self, cotangent: mx.array) -> mx.array:
        """The cotangent of what was turned, from that of the result: turned back."""
        if cotangent.shape[-1] > self._d:
            return mx.concatenate([self.gradient(cotangent[..., : self._d]), cotangent[..., self._d :]], axis=-1)
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
