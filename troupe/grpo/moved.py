"""Which part of the weights an update moves, where they are of 16 bits.

A bfloat16 weight near 0.02 moves in steps of 1e-4. What an update lacks of such a step is kept beside it (see
`optimizer`) and adds up, but the policy that samples is the one with the rounded weights: with a rate that is too low
it stays the same for a long time.
"""

from collections.abc import Mapping

import mlx.core as mx

LOOKED_AT = 2**16
"""Numbers, of all weights together: enough to see a part of 1e-5 in twenty steps, and few enough to cost nothing."""
_MOST = 64
"""Weights of which some are looked at, the largest: what it costs is a few kernels a weight."""
_16_BIT = {mx.bfloat16, mx.float16}


class Moved:
    """Some numbers of the weights, spread over the largest of them, as they were."""

    def __init__(self, weights: Mapping[str, mx.array]) -> None:
        """Copies them: no array of `weights` is held."""
        names = [name for name, weight in weights.items() if weight.dtype in _16_BIT]
        names = sorted(names, key=lambda name: (-weights[name].size, name))[:_MOST]
        stride = -(-sum(weights[name].size for name in names) // LOOKED_AT) | 1  # odd: not the same columns in each row
        self._places = {name: mx.arange(0, weights[name].size, stride) for name in names}
        self._before = self._numbers(weights)
        mx.eval(self._before)

    def figures(self, weights: Mapping[str, mx.array]) -> dict[str, float]:
        """`weights/moved`: which part of them is another number in `weights`; nothing where none is of 16 bits."""
        if not self._before:
            return {}
        pairs = zip(self._before, self._numbers(weights), strict=True)
        moved: int = mx.sum(mx.stack([mx.sum(before != after) for before, after in pairs])).item()  # type: ignore[assignment]
        return {"weights/moved": moved / sum(numbers.size for numbers in self._before)}

    def _numbers(self, weights: Mapping[str, mx.array]) -> list[mx.array]:
        return [mx.take(mx.view(weights[name], mx.uint16), places) for name, places in self._places.items()]
