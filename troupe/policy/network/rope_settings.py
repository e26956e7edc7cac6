"""What a config.json says of rotary positions, of either age, and how it is written. What is not understood is refused
by its key.

Older folders have `rope_theta` and `rope_scaling`, and Gemma's `rope_local_base_freq` for layers with a window; newer
ones all of it in `rope_parameters`, by kind of layer where there are two.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from troupe.errors import ModelError
from troupe.policy.network.families import FULL, SLIDING, Family
from troupe.policy.network.rotary import DEFAULT_ROPE_THETA, SCALINGS, RopeScaling, YarnScaling

T = TypeVar("T", bound=msgspec.Struct)

_UNSAID = object()
_PLACES = ("rope_scaling", "rope_parameters")
_TYPE_KEYS = ("rope_type", "type")
_LOCAL_THETA = "rope_local_base_freq"
_NAMES = frozenset().union(*(kind.__struct_fields__ for kind in SCALINGS.values()))
_TRAINED = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_KNOWN = frozenset({*_TYPE_KEYS, "rope_theta", _PARTIAL, *_NAMES})


class _Table(NamedTuple):
    """An object of a config.json that tells of rotary positions, and the key that it stands under."""

    key: str
    given: Mapping[str, Any]


def rope_settings(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A parsed config.json → the keys rope_theta, rope_scaling, local_rope_theta and partial_rotary_factor of a
    `NetworkConfig`. Raises ModelError.

    Where a `rope_scaling` stands beside `rope_parameters`, as Qwen's guide to YaRN has one add it, that one counts, as
    it does in transformers and mlx-lm.
    """
    for key in _PLACES:
        if not isinstance(settings.get(key, {}), Mapping | None):
            raise ModelError(f"{key}: {settings[key]!r} is refused; it must be an object")
    nested, local = _by_kind(settings, family)
    scaling = _Table("rope_scaling", settings.get("rope_scaling") or {})
    chosen = scaling if scaling.given else nested
    kind = _kind(chosen, family)
    for table in (scaling, nested, local):
        _refuse_unknown(table, family)
    if _PARTIAL not in family.rope_keys:
        _refuse_partial(_PARTIAL, settings)
    theta = _theta({**dict(_named(chosen)), "rope_theta": settings.get("rope_theta", _UNSAID), **dict(_named(nested))})
    found = {
        "rope_theta": family.defaults.get("rope_theta", DEFAULT_ROPE_THETA) if theta is None else theta,
        "rope_scaling": None if kind == "default" else _scaling(kind, chosen, settings),
    }
    if "local_rope_theta" in family.defaults:
        if _kind(local, family) != "default":
            raise ModelError(f"{local.key}.rope_type: {_kind(local, family)!r} is not supported; it must be 'default'")
        theta = _theta({**dict(_named(local)), _LOCAL_THETA: settings.get(_LOCAL_THETA, _UNSAID)})
        found["local_rope_theta"] = family.defaults["local_rope_theta"] if theta is None else theta
    if _PARTIAL in family.rope_keys:
        said = (place.get(_PARTIAL) for place in (chosen.given, nested.given, settings, family.defaults))
        found[_PARTIAL] = next(factor for factor in said if factor is not None)
    return found


def _by_kind(settings: Mapping[str, Any], family: Family) -> tuple[_Table, _Table]:
    """What `rope_parameters` says of layers that see all, and of those with a window, where it tells them apart."""
    nested = settings.get("rope_parameters") or {}
    apart = {kind: nested[kind] for kind in (FULL, SLIDING) if isinstance(nested.get(kind), Mapping)}
    if "local_rope_theta" not in family.defaults or not apart:
        return _Table("rope_parameters", nested), _Table("rope_parameters", {})
    if others := [key for key, value in nested.items() if key not in apart and value is not None]:
        raise ModelError(
            f"rope_parameters.{others[0]}: {nested[others[0]]!r} stands beside objects for kinds of layers"
        )
    full, local = (_Table(f"rope_parameters.{kind}", apart.get(kind, {})) for kind in (FULL, SLIDING))
    return full, local


def _named(table: _Table) -> Iterator[tuple[str, Any]]:
    yield f"{table.key}.rope_theta", table.given.get("rope_theta", _UNSAID)


def _theta(named: Mapping[str, Any]) -> Any:
    """The first base that is said; None where none is. ModelError where there is but a null."""
    theta = next((theta for theta in named.values() if theta is not None and theta is not _UNSAID), None)
    if theta is None and (empty := [place for place, said in named.items() if said is None]):
        raise ModelError(f"{empty[0]}: null is refused; name the base of the rotary positions, such as 1000000.0")
    return theta


def names_theta(settings: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json says what the base of the rotary positions is, which is the default elsewhere."""
    nested = settings.get("rope_parameters")
    inner = nested.get(FULL) if isinstance(nested, Mapping) else None
    places = (settings, *(settings.get(place) for place in _PLACES), inner)
    return any(isinstance(place, Mapping) and place.get("rope_theta") is not None for place in places)


def _kind(table: _Table, family: Family) -> str:
    """A `rope_type` of the family's."""
    key, chosen = table
    named = [(name, chosen[name]) for name in _TYPE_KEYS if chosen.get(name) is not None]
    if not named:
        if scaling := [name for name in _NAMES - {_TRAINED} if chosen.get(name) is not None]:
            raise ModelError(f"{key}.rope_type: missing, though there is a {min(scaling)}; name it, such as 'yarn'")
        return "default"
    if len(named) == 2 and named[0][1] != named[1][1]:
        raise ModelError(f"{key}.rope_type: {named[0][1]!r} is not the type beside it, {named[1][1]!r}; keep one")
    kind = named[0][1]
    if kind not in sorted(family.ropes):
        known = " or ".join(map(repr, sorted(family.ropes)))
        raise ModelError(f"{key}.rope_type: {kind!r} is not supported; it must be {known}")
    return str(kind)


def _refuse_unknown(table: _Table, family: Family) -> None:
    key, given = table
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise ModelError(
                f"{key}.{name}: an object of its own for a kind of layers is not supported; rope_type and rope_theta "
                f"must stand in {key} itself"
            )
        if name not in _KNOWN | family.rope_keys and value is not None:
            raise ModelError(f"{key}.{name}: {value!r} is not understood; leave it out if the network does without")
    if _PARTIAL not in family.rope_keys:
        _refuse_partial(f"{key}.{_PARTIAL}", given)


def _refuse_partial(key: str, given: Mapping[str, Any]) -> None:
    factor = given.get(_PARTIAL)
    if factor is not None and factor != 1.0:
        raise ModelError(f"{key}: {factor!r} is not supported; all of a head is turned")


def _scaling(kind: str, table: _Table, settings: Mapping[str, Any]) -> RopeScaling:
    """Check the scaling of a table; what it does not say of the positions that YaRN stretches, `settings` says."""
    key, given = table
    struct = SCALINGS[kind]
    scaling = {name: given[name] for name in struct.__struct_fields__ if given.get(name) is not None}
    for field in msgspec.structs.fields(struct):
        if field.required and field.name not in scaling and (kind, field.name) != ("yarn", _TRAINED):
            how = " how far to stretch, such as 4.0" if field.name == "factor" else " it"
            raise ModelError(f"{key}.{field.name}: missing; {kind} must be told{how}")
    if kind == "yarn":
        trained = settings.get(_TRAINED) or scaling.get(_TRAINED)
        scaling[_TRAINED] = trained or settings.get("max_position_embeddings", 32768)
    return convert_by_key(scaling, struct, f"{key}.")


def stretched_positions(scaling: RopeScaling | None) -> int:
    """Positions that a network is stretched to, beside what `max_position_embeddings` says; 0 where only that says."""
    return scaling.max_positions if isinstance(scaling, YarnScaling) else 0


def rope_table(scaling: RopeScaling | None) -> dict[str, Any]:
    """As both ages write it, for `config.json`."""
    if scaling is None:
        return {"rope_type": "default"}
    kind = next(kind for kind, struct in SCALINGS.items() if isinstance(scaling, struct))
    given = msgspec.structs.asdict(scaling)
    return {"rope_type": kind, **{key: value for key, value in given.items() if value is not None}}


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
