"""The frequencies by which rotary positions turn, plain or stretched by YaRN. Numbers in, numbers out.

Everything is rounded to float32 at the same places as in transformers:
at position 100,000 the last bit of a frequency is a hundredth of a radian.

Sources: rotary positions (arXiv:2104.09864); YaRN (arXiv:2309.00071), sections 3.2 and 3.4.
"""

from __future__ import annotations

import math
import struct
from functools import cache

import msgspec

from troupe.errors import ModelError

_MOST_POSITIONS = 2**31


class YarnScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How far YaRN stretches the positions that a network was trained on; names as in `rope_scaling`."""

    factor: float
    """New positions ÷ old ones, at least 1."""
    original_max_position_embeddings: int
    """Positions that the network was trained on."""
    attention_factor: float | None = None
    """Queries and keys are both multiplied by this; None: 0.1 ln(factor) + 1, the paper's choice."""
    beta_fast: float = 32.0
    """Frequencies that turn at least this often within the old positions stay as they are."""
    beta_slow: float = 1.0
    """Frequencies that turn at most this often are divided by `factor`; those between are mixed."""
    mscale: float | None = None
    """With `mscale_all_dim`, changes what `attention_factor` None means."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the bounds of the mixed range outwards to whole dimensions."""

    def __post_init__(self) -> None:
        """Refuse what stretches nothing or has no formula. Raises ModelError, its message starting with the key."""
        if not 1.0 <= self.factor < math.inf:
            raise ModelError(f"factor: {self.factor} is refused; positions are stretched by a finite number from 1 on")
        if self.original_max_position_embeddings < 1:
            raise ModelError(
                f"original_max_position_embeddings: {self.original_max_position_embeddings} is too small; it must be "
                "at least 1"
            )
        if self.factor * self.original_max_position_embeddings >= _MOST_POSITIONS:
            raise ModelError(
                f"factor: {self.factor} is too large; it makes more positions of "
                f"{self.original_max_position_embeddings} than can be counted"
            )
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < math.inf:
                raise ModelError(f"{key}: {value} is refused; it must be a finite number above 0")
        if self.beta_fast < self.beta_slow:
            raise ModelError(f"beta_fast: {self.beta_fast} is below beta_slow {self.beta_slow}; exchange them")

    @property
    def max_positions(self) -> int:
        """Positions that the stretched network has."""
        return int(self.factor * self.original_max_position_embeddings)


@cache
def inverse_frequencies(d: int, base: float, scaling: YarnScaling | None = None) -> tuple[float, ...]:
    """Radians a position for each of the d/2 pairs of a head, float32 values, highest first.

    Plain: base^(−2i/d). YaRN: pairs that turn often keep that, those that turn seldom get it divided by `factor`, and
    between the two a straight line in i leads from one to the other.
    """
    periods = [_float32(base ** _float32(i / d)) for i in range(0, d, 2)]
    plain = tuple(_float32(1.0 / period) for period in periods)
    if scaling is None:
        return plain
    low, high = _mixed_pairs(d, base, scaling)
    mixed = []
    for i, period in enumerate(periods):
        way = _float32(_float32(i - _float32(low)) / _float32(high - low))  # 0 at the fast bound, 1 at the slow one
        kept = _float32(1.0 - min(max(way, 0.0), 1.0))
        slow = _float32(1.0 / _float32(scaling.factor * period))
        mixed.append(_float32(_float32(slow * _float32(1.0 - kept)) + _float32(plain[i] * kept)))
    return tuple(mixed)


def attention_factor(scaling: YarnScaling | None) -> float:
    """What rotated queries and keys are multiplied by; 1 without YaRN."""
    if scaling is None:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (growth * scaling.mscale + 1.0) / (growth * scaling.mscale_all_dim + 1.0)
    return growth + 1.0


def _mixed_pairs(d: int, base: float, scaling: YarnScaling) -> tuple[float, float]:
    """Between which pairs the two frequencies are mixed."""

    def pair_that_turns(times: float) -> float:
        old = scaling.original_max_position_embeddings
        return d * math.log(old / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return low, high + 0.001 if low == high else high  # no division by 0


def _float32(x: float) -> float:
    """The float32 nearest to `x` ≥ 0; infinite where none is so large."""
    try:
        value: float = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.inf
    return value
