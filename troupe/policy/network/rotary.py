"""The frequencies by which rotary positions turn, plain or stretched by YaRN, and what a config.json says of them.

Everything is rounded to float32 at the same places as in transformers: at position 100,000 the last bit of a frequency
is a hundredth of a radian. What is not understood of a config.json is refused by its key.

Sources: rotary positions (arXiv:2104.09864); YaRN (arXiv:2309.00071), sections 3.2 and 3.4.
"""

import math
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from troupe.errors import ModelError

DEFAULT_ROPE_THETA = 10000.0
"""Where nothing names it: transformers' own, which its older versions leave out when they write a config.json."""
_MOST_POSITIONS = 2**31

T = TypeVar("T", bound=msgspec.Struct)


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


@cache
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


_UNSAID = object()
_PLACES = ("rope_scaling", "rope_parameters")
_TYPE_KEYS = ("rope_type", "type")
_SCALING = tuple(key for key in YarnScaling.__struct_fields__ if key != "original_max_position_embeddings")
_KNOWN = frozenset({*_TYPE_KEYS, "rope_theta", "partial_rotary_factor", *YarnScaling.__struct_fields__})


def rope_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json → the keys rope_theta and rope_scaling of a `NetworkConfig`. Raises ModelError.

    Newer folders nest both in `rope_parameters`. Where a `rope_scaling` stands beside it, as Qwen's guide to YaRN has
    one add it, that one counts, as it does in transformers and mlx-lm.
    """
    for key in _PLACES:
        if not isinstance(settings.get(key, {}), Mapping | None):
            raise ModelError(f"{key}: {settings[key]!r} is refused; it must be an object")
    key = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    chosen, nested = settings.get(key) or {}, settings.get("rope_parameters") or {}
    kind = _kind(key, chosen)
    for place in _PLACES:
        _refuse_unknown(place, settings.get(place) or {})
    _refuse_partial("partial_rotary_factor", settings)
    named = {
        f"{key}.rope_theta": chosen.get("rope_theta", _UNSAID),
        "rope_theta": settings.get("rope_theta", _UNSAID),
        "rope_parameters.rope_theta": nested.get("rope_theta", _UNSAID),
    }
    theta = next((theta for theta in named.values() if theta is not None and theta is not _UNSAID), None)
    if theta is None and (empty := [place for place, said in named.items() if said is None]):
        raise ModelError(f"{empty[0]}: null is refused; name the base of the rotary positions, such as 1000000.0")
    theta = DEFAULT_ROPE_THETA if theta is None else theta
    return {"rope_theta": theta, "rope_scaling": _yarn(key, chosen, settings) if kind == "yarn" else None}


def names_theta(settings: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json says what the base of the rotary positions is, which is the default elsewhere."""
    places = (settings, *(settings.get(place) for place in _PLACES))
    return any(isinstance(place, Mapping) and place.get("rope_theta") is not None for place in places)


def _kind(key: str, chosen: Mapping[str, Any]) -> str:
    """ "default" or "yarn"."""
    named = [(name, chosen[name]) for name in _TYPE_KEYS if chosen.get(name) is not None]
    if not named:
        if scaling := [name for name in _SCALING if chosen.get(name) is not None]:
            raise ModelError(f"{key}.rope_type: missing, though there is a {scaling[0]}; name it, such as 'yarn'")
        return "default"
    if len(named) == 2 and named[0][1] != named[1][1]:
        raise ModelError(f"{key}.rope_type: {named[0][1]!r} is not the type beside it, {named[1][1]!r}; keep one")
    kind = named[0][1]
    if kind not in ("default", "yarn"):
        raise ModelError(f"{key}.rope_type: {kind!r} is not supported; it must be 'default' or 'yarn'")
    return str(kind)


def _refuse_unknown(key: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise ModelError(
                f"{key}.{name}: an object of its own for a kind of layers is not supported; rope_type and rope_theta "
                f"must stand in {key} itself"
            )
        if name not in _KNOWN and value is not None:
            raise ModelError(f"{key}.{name}: {value!r} is not understood; leave it out if the network does without")
    _refuse_partial(f"{key}.partial_rotary_factor", given)


def _refuse_partial(key: str, given: Mapping[str, Any]) -> None:
    factor = given.get("partial_rotary_factor")
    if factor is not None and factor != 1.0:
        raise ModelError(f"{key}: {factor!r} is not supported; all of a head is turned")


def _yarn(key: str, given: Mapping[str, Any], settings: Mapping[str, Any]) -> YarnScaling:
    """Check the scaling under `key`; what it does not say of the trained positions, `settings` says."""
    scaling = {name: given[name] for name in YarnScaling.__struct_fields__ if given.get(name) is not None}
    if "factor" not in scaling:
        raise ModelError(f"{key}.factor: missing; YaRN must be told how far to stretch, such as 4.0")
    trained = settings.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    scaling["original_max_position_embeddings"] = trained or settings.get("max_position_embeddings", 32768)
    return convert_by_key(scaling, YarnScaling, f"{key}.")


def convert_by_key(settings: Mapping[str, Any], kind: type[T], place: str = "") -> T:
    """Settings as a struct. Raises ModelError, its message starting with the key at fault behind `place`."""
    try:
        for field in msgspec.structs.fields(kind):  # one at a time, so that the message can name the key
            if field.name in settings:
                try:
                    msgspec.convert(settings[field.name], field.type)
                except msgspec.ValidationError as error:
                    raise ModelError(f"{field.name}: {settings[field.name]!r} is refused: {error}") from None
        return msgspec.convert(settings, kind)
    except ModelError as error:
        raise ModelError(f"{place}{error}") from None
