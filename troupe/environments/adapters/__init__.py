"""Environments of other packages, by names such as "gymnasium:NAME"; each package is an extra, imported when used."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from troupe.errors import WorldError, remedy

Adapter: TypeAlias = Callable[[str], Callable[[], Any]]
"""From what stands behind the colon to what makes an environment. WorldError where the package does not know it."""


class Place(NamedTuple):
    """Where an adapter is, and what it needs."""

    module: str
    """Ours, which imports the package where it is used, and has a function `factory`: an `Adapter`."""
    extra: str
    """Of Troupe's that installs the package."""


ADAPTERS: dict[str, Place] = {
    name: Place(f"{__name__}.{name}", name) for name in ("gymnasium", "openenv", "textarena", "verifiers")
}
"""Prefix → place."""


def adapted(prefix: str, rest: str) -> Callable[[], Any]:
    """What makes the environment of "PREFIX:REST".

    Raises:
        WorldError: the package is missing, or does not know the environment.
    """
    place = ADAPTERS[prefix]
    if not rest:
        raise WorldError(f'environment "{prefix}:" names nothing of {prefix}; write "{prefix}:NAME"')
    try:
        factory: Adapter = importlib.import_module(place.module).factory
        return factory(rest)
    except ImportError as error:
        raise WorldError(f'environment "{prefix}:{rest}" needs a package: {error}; {remedy(place.extra)}') from error
