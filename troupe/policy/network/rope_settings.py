"""What a config.json says of rotary positions, wherever it says it; what is not understood is refused by its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from troupe.errors import ModelError
from troupe.policy.network.rotary import YarnScaling

DEFAULT_ROPE_THETA = 10000.0
"""Where nothing names it: transformers' own, which its older versions leave out when they write a config.json."""

T = TypeVar("T", bound=msgspec.Struct)

_UNSAID = object()
_PLACES = ("rope_scaling", "rope_parameters")
_TYPE_KEYS = ("rope_type", "type")
_SCALING = tuple(key for key in YarnScaling.__struct_fields__ if key != "original_max_position_embeddings")
_KNOWN = frozenset({*_TYPE_KEYS, "rope_theta", "partial_rotary_factor", *YarnScaling.__struct_fields__})


def rope_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json → the keys rope_theta and rope_scaling of a `Qwen3Config`. Raises ModelError.

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
