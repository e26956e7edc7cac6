"""Configurations as plain tables: `section.key=value`, laying one table over another. Quick to import."""

import datetime
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import quote, unquote

import msgspec

from troupe.dataset.sources import anchored_source
from troupe.environments.adapters import ADAPTERS
from troupe.errors import ConfigError
from troupe.run.folder_names import moved_demo_file
from troupe.runtime.files import expanded


def parse_setting(text: str) -> tuple[str, Any]:
    """`section.key=value` → key and value. The value is read as TOML and, where that fails, as plain text."""
    key, equals, value = text.partition("=")
    key = key.strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {text!r}: this is not UTF-8 text") from None
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: write it as section.key=value, for instance learner.lr=1e-5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    except RecursionError:
        raise ConfigError(f"--set {key}: the value is nested too deeply") from None
    if isinstance(parsed, datetime.date | datetime.time):  # no key takes one, but a folder may be called so
        parsed = value.strip()
    return key, parsed


def table_of(setting: str) -> dict[str, Any]:
    """`section.key=value` as a nested table."""
    key, value = parse_setting(setting)
    *sections, name = key.split(".")
    table: dict[str, Any] = {name: value}
    for section in reversed(sections):
        table = {section: table}
    return table


def anchored_reward(spec: Any, base: Path) -> Any:
    """The name of a reward whose file, if it has one, is found from everywhere; other names as they are."""
    file, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not file.endswith(".py") or spec.startswith("format:"):
        return spec
    return f"{(base / expanded(file)).absolute()}:{name}"


def anchored_environment(table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A section [environment] whose names of files are found from everywhere."""
    anchored = dict(table)
    factory, tools = table.get("factory"), table.get("tools")
    if isinstance(factory, Mapping):
        anchored["factory"] = {name: _anchored_factory(spec, base) for name, spec in factory.items()}
    elif factory is not None:
        anchored["factory"] = _anchored_factory(factory, base)
    if isinstance(tools, list | tuple):
        anchored["tools"] = [anchored_reward(spec, base) for spec in tools]
    return anchored


def anchored_schedule(table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A section [schedule] whose names of folders are found from everywhere."""
    anchored = dict(table)
    if isinstance(engines := table.get("engines"), list | tuple):
        anchored["engines"] = [_anchored_engine(engine, base) for engine in engines]
    return anchored


def anchored_evaluation(table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A section [evaluation] whose rows and rewards are found from everywhere."""
    anchored = dict(table)
    if isinstance(sets := table.get("sets"), list | tuple):
        anchored["sets"] = [_anchored_set(each, base) for each in sets]
    return anchored


def _anchored_set(table: Any, base: Path) -> Any:
    if not isinstance(table, Mapping):
        return table
    anchored, rewards = dict(table), table.get("rewards")
    if isinstance(path := table.get("path"), str):
        anchored["path"] = moved_demo_file(anchored_source(path, base))
    if isinstance(rewards, list | tuple):
        anchored["rewards"] = [anchored_reward(spec, base) for spec in rewards]
    return anchored


def _anchored_engine(engine: Any, base: Path) -> Any:
    """Its folder of weights, and its model where that is a folder here; a name that only the server knows stays."""
    if not isinstance(engine, Mapping):
        return engine
    anchored = dict(engine)
    if isinstance(folder := engine.get("weights_folder"), str):
        anchored["weights_folder"] = str((base / expanded(folder)).absolute())
    model = engine.get("model")
    if isinstance(model, str) and (base / expanded(model)).is_dir():
        anchored["model"] = str((base / expanded(model)).absolute())
    return anchored


def _anchored_factory(spec: Any, base: Path) -> Any:
    """As `anchored_reward`; of what an adapter takes, also the files that its options name."""
    prefix, colon, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or prefix not in ADAPTERS:
        return anchored_reward(spec, base)
    name, mark, query = rest.partition("?")
    options = [_anchored_option(part, base) for part in query.split("&")]
    return f"{prefix}:{anchored_reward(name, base)}{mark}{'&'.join(options)}"


def _anchored_option(part: str, base: Path) -> str:
    key, equals, value = part.partition("=")
    anchored = anchored_reward(unquote(value), base)
    return part if anchored == unquote(value) else f"{key}{equals}{quote(anchored, safe='/:')}"


def copied(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of its own, whose tables are its own too."""
    return {key: copied(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def lay_over(table: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Change `table` in place: what `change` says counts, all else stays."""
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            lay_over(table[key], value)
        else:
            table[key] = value


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` → value, for every value that is no table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def without_none(value: Any) -> Any:
    """A table without what is None, also in its tables and lists of tables; any other value as it is."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return type(value)(without_none(item) for item in value)
    return value


def says(table: Any, key: str) -> bool:
    """Whether a table has a value for `section.key`, which may end in the place within a list."""
    for part in key.split("."):
        name = part.partition("[")[0]
        if not isinstance(table, Mapping) or name not in table:
            return False
        table = table[name]
    return True


def value_at(table: Any, key: str) -> Any:
    """What a table has at `section.key`, or at a place within a list there."""
    for part in key.split("."):
        name, _, index = part.rstrip("]").partition("[")
        table = table.get(name) if isinstance(table, dict) else table
        if index.isdigit():
            table = table[int(index)]
    return table


def choices_of(struct: type[msgspec.Struct], key: str) -> list[Any]:
    """The values that a key of a config admits, where it is one of a few."""
    kind: Any = struct
    for part in key.split("."):
        kind = get_type_hints(kind)[part.partition("[")[0]] if hasattr(kind, "__struct_fields__") else None
    pending: list[Any] = [kind]
    found: list[Any] = []
    while pending:
        kind = pending.pop()
        if get_origin(kind) is Literal:
            found += get_args(kind)
        else:
            pending += get_args(kind)
    return found
