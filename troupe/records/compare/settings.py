"""What differs between the configurations of runs, and which of them are one configuration with other seeds."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

Settings = dict[str, Any]
"""Dotted key → value; keys that are not said are not there."""

_OF_ONE_RUN = ("seed", "output", "data.eval_path", "sft.eval_dataset", "sft.eval_steps")
"""What may differ between runs of one configuration."""
_BESIDE_TRAINING = ("metrics", "daemon", "checkpoint", "evaluation")
"""Sections that say nothing of what is learned."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that is not the same in all runs."""

    key: str
    values: tuple[Any, ...]
    """One a run, in their order; None where a run does not say it."""


def settings_of(config: Mapping[str, Any]) -> Settings:
    """A configuration by dotted keys; tables in a list by their names, where they have some."""
    return dict(_flat(config, ""))


def _flat(table: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value, 1):
                yield from _flat(one, f"{key}.{one.get('name', number)}.")
        else:
            yield key, value


def differences(runs: Sequence[Settings]) -> list[Difference]:
    """The settings that differ, in the order in which a configuration has them; the folder of a run is none."""
    keys = dict.fromkeys(key for settings in runs for key in settings if key != "output")
    rows = [Difference(key=key, values=tuple(settings.get(key) for settings in runs)) for key in keys]
    sections = {key.partition(".")[0]: None for key in keys}
    order = {section: at for at, section in enumerate(sections)}
    return sorted(
        (row for row in rows if any(value != row.values[0] for value in row.values)),
        key=lambda row: order[row.key.partition(".")[0]],
    )


def groups_of(runs: Sequence[Settings]) -> list[list[int]]:
    """The runs, by their places, that learn by one configuration with other seeds are together; in order."""
    found: dict[bytes, list[int]] = {}
    for place, settings in enumerate(runs):
        same = {key: value for key, value in settings.items() if _is_of_training(key)} or {"": place}
        found.setdefault(msgspec.json.encode(same, order="sorted", enc_hook=str), []).append(place)
    return list(found.values())


def _is_of_training(key: str) -> bool:
    return key not in _OF_ONE_RUN and key.partition(".")[0] not in _BESIDE_TRAINING


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each of several folders: as few of the last parts of its path as tell it from the others."""
    paths = [folder.absolute().parts for folder in folders]
    names = []
    for parts in paths:
        count = 1
        while count < len(parts) and any(o != parts and o[-count:] == parts[-count:] for o in paths):
            count += 1
        names.append(str(Path(*parts[-count:])))
    return names


def group_name(names: Sequence[str]) -> str:
    """What several runs are called together: what their names share, a star for the rest."""
    first, rest = names[0], names[1:]
    if not rest:
        return first
    shortest = min(map(len, names))
    begin = next((at for at in range(shortest) if any(name[at] != first[at] for name in rest)), shortest)
    end = next((at for at in range(shortest - begin) if any(n[-1 - at] != first[-1 - at] for n in rest)), 0)
    shared = f"{first[:begin]}*{first[len(first) - end :]}"
    return shared if len(shared) > 1 else f"{first} and {len(rest)} more"
