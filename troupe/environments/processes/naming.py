"""By which names a process loads what a run uses."""

from troupe.environments.convention import World
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.code_files import name_of

_REMEDY = 'define it at the top of a file or module, or run it with environment.run = "thread"'


def section_of(world: World, config: EnvironmentConfig) -> EnvironmentConfig:
    """The section that loads the same world, whether a text or Python named what is in it.

    Raises:
        WorldError: for what cannot be loaded by name.
    """
    factory = config.factory
    if factory is None and world.factories:
        names = {name: _name(made, f"environment {name}") for name, made in world.factories.items()}
        factory = names if world.multi else next(iter(names.values()))
    known = len(config.tools)
    given = [_name(tool.function, f"tool {tool.spec.name}") for tool in world.tools[known:]]
    return EnvironmentConfig(
        factory=factory,
        tools=(*config.tools, *given),
        start_timeout_s=config.start_timeout_s,
    )


def _name(found: object, what: str) -> str:
    try:
        return name_of(found)
    except ValueError as error:
        raise WorldError(f'environment.run = "process": {what} {error}; {_REMEDY}') from None
