"""From what a configuration or a call names to the world that a run uses: tools, environments, what they offer.

User files are run as Python, so they must be the user's own.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from troupe.dataset.rows import PromptRow
from troupe.environments.adapters import ADAPTERS, adapted
from troupe.environments.convention import EnvironmentSpec, Tool, World
from troupe.environments.describing import check_names, describe, describe_tool, place_of_class
from troupe.environments.schemas import place_of
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.rewards.convention import shown
from troupe.rewards.faults import described
from troupe.rewards.watching import remember
from troupe.runtime.code_loading import Wanted, load_named, suggestion

Factory: TypeAlias = Callable[[], Any]
"""Makes an environment: a class, or a function without arguments."""

_FORMS = "give FILE.py:NAME, MODULE:NAME, or what an adapter takes, such as gymnasium:NAME"
_ENVIRONMENT = Wanted("environment", "class or function", _FORMS, WorldError, described, imported=remember)
_TOOL = Wanted("tool", "function", "give FILE.py:NAME or MODULE:NAME", WorldError, described, imported=remember)


def load_world(
    config: EnvironmentConfig,
    tools: Sequence[Callable[..., Any]] = (),
    environment_factory: Factory | Mapping[str, Factory] | None = None,
    base: Path | None = None,
) -> World:
    """What the section `[environment]` names and what is given besides, read and checked. One instance of each
    environment is made, to look at.

    `tools` are functions beside those of `config`; `environment_factory` is one, or a table of them of which a row's
    column `environment` names one. Relative files start at `base`, by default the working folder.

    Raises:
        WorldError: with file, line or name, for whatever cannot be used.
    """
    functions = [load_named(spec, base, _TOOL).value for spec in config.tools]
    named = tuple(Tool(describe_tool(each), each) for each in [*functions, *tools])
    check_names([tool.spec for tool in named])
    factories, multi = _factories(config, environment_factory, base)
    told = [tool.spec for tool in named]
    if not factories:
        if not named:
            raise WorldError("there is no environment and no tool; give environment.factory or environment.tools")
        return World(environments={"": EnvironmentSpec(name="", tools=tuple(told))}, factories={}, tools=named)
    probes = {name: _made(factory, name) for name, factory in factories.items()}
    specs = {name: describe(probe, name, told) for name, probe in probes.items()}
    if not multi:
        (spec,) = specs.values()
        factories, probes, specs = ({spec.name: each[""]} for each in (factories, probes, specs))  # type: ignore[assignment]
    return World(environments=specs, factories=factories, tools=named, multi=multi, probes=probes)


def check_rows(world: World, rows: Iterable[PromptRow], source: str) -> None:
    """Refuse rows that no episode can begin with.

    Raises:
        WorldError: naming source, line or row, for a row that names an environment which is not there, or none where
            there are several; that lacks a column which `reset` requires; or whose prompt is a plain text.
    """
    for row in rows:
        where = f"{source}:{row.line}" if row.line is not None else f"{source}, row {row.row}"
        if world.multi:
            _check_name(world, row.columns.get("environment"), where)
        spec = world.spec_of(row.columns)
        missing = [name for name in spec.reset_requires if name not in {"prompt", *row.columns}]
        if missing:
            raise WorldError(
                f"{where}: there is no column {missing[0]!r}, which reset of {spec.label} requires; add it, or give "
                "the argument a default"
            )
        if isinstance(row.prompt, str):
            raise WorldError(
                f'{where}: the prompt is a plain text, and an episode is a conversation; set data.chat = "always", or '
                "give lists of messages"
            )


def _check_name(world: World, name: Any, where: str) -> None:
    names = list(world.environments)
    if name is None:
        raise WorldError(
            f"{where}: the row has no column `environment`; it says which one is meant, of {', '.join(names)}"
        )
    if not isinstance(name, str) or name not in world.environments:
        close = suggestion(name, names) if isinstance(name, str) else ""
        raise WorldError(
            f"{where}: the row's environment {shown(name)} is unknown{close}; there are {', '.join(names)}"
        )


def _factories(
    config: EnvironmentConfig, given: Factory | Mapping[str, Factory] | None, base: Path | None
) -> tuple[dict[str, Factory], bool]:
    """By name, an empty one where there is a single environment; and whether rows choose."""
    if config.factory is not None and given is not None:
        raise WorldError(
            f"environment_factory is given, and environment.factory = {config.factory!r} as well; give one of them"
        )
    if isinstance(config.factory, str):
        return {"": _loaded(config.factory, base)}, False
    if config.factory is not None:
        return {name: _loaded(spec, base) for name, spec in _checked_names(config.factory).items()}, True
    if isinstance(given, Mapping):
        return {name: _callable(each, f"environment {name!r}") for name, each in _checked_names(given).items()}, True
    return ({} if given is None else {"": _callable(given, "environment_factory")}), False


def _checked_names(table: Mapping[str, Any]) -> Mapping[str, Any]:
    if not table or not all(isinstance(name, str) and name for name in table):
        raise WorldError("a table of environments needs names, each a text that is not empty")
    return table


def _loaded(spec: str, base: Path | None) -> Factory:
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ADAPTERS:
        return adapted(prefix, rest)
    found = load_named(spec, base, _ENVIRONMENT)
    return _callable(found.value, f"{found.path}: {found.name}")


def _callable(factory: Any, what: str) -> Factory:
    if not callable(factory):
        raise WorldError(
            f"{what} is {shown(factory)}, which cannot be called; name a class, or a function that makes an environment"
        )
    if inspect.iscoroutinefunction(factory):
        raise WorldError(f"{place_of(factory)}{what} is an async function; write one that returns the environment")
    return factory  # type: ignore[no-any-return]


def _made(factory: Factory, name: str) -> Any:
    """One instance."""
    place = place_of_class(factory) if inspect.isclass(factory) else place_of(factory)
    label = getattr(factory, "__name__", type(factory).__name__)
    called = f"{label}() of environment {name!r}" if name else f"{label}()"
    try:
        made = factory()
    except WorldError:
        raise
    except Exception as error:
        raise WorldError(
            f"{place}{called} failed: {described(error)}; it is called without arguments, so give them defaults"
        ) from error
    if made is None or inspect.isclass(made):
        raise WorldError(f"{place}{called} returned {shown(made)}; it must return an environment")
    return made
