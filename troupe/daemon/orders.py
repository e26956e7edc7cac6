"""What `troupe daemon` is asked to run, and the little of it that the daemon itself has to know.

What of a configuration file that is read again it takes over, and what it says of the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.daemon.attempts import Attempts
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.logs import LEVELS, LOGGER, set_limits
from troupe.errors import ConfigError
from troupe.messages import Done, Refused, Set
from troupe.records.layout import RUN_TOML
from troupe.run.daemon_settings import DaemonConfig
from troupe.run.folder_names import run_folder_named
from troupe.run.tables import flattened, lay_over, table_of
from troupe.runtime.files import read_toml


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run to be kept alive. All paths are absolute."""

    run_toml: Path
    output: Path
    settings: tuple[str, ...] = ()
    allow_changes: tuple[str, ...] = ()
    table: dict[str, Any] = {}
    """The configuration as it was when the order was given."""

    @classmethod
    def given(
        cls, run_toml: Path, output: str | None, settings: Sequence[str] = (), allow_changes: Sequence[str] = ()
    ) -> Order:
        """The order that the command line means. InputError where it names no run folder, or its file is not readable.

        A run folder in place of the file is the run that stands there, by its own `run.toml`. Whether the rest of the
        configuration can be used is for the trainer to say.
        """
        if (run_toml / RUN_TOML).is_file():
            output = str(run_toml) if output is None else output
            run_toml = run_toml / RUN_TOML
        order = cls(
            run_toml=run_toml.absolute(),
            output=Path(),
            settings=tuple(settings),
            allow_changes=tuple(allow_changes),
        )
        table = order.read()
        named = table.get("output") if output is None else output
        if not isinstance(named, str):
            raise ConfigError(
                f"{run_toml}: a daemon has to know its run folder before the run begins; name it with -o OUT_DIR, or "
                "as output in the file"
            )
        return msgspec.structs.replace(order, output=run_folder_named(named), table=table)

    def read(self) -> dict[str, Any]:
        """The configuration as it is now, settings included, types unchecked. ConfigError where it cannot be read."""
        table = read_toml(self.run_toml)
        for setting in self.settings:
            lay_over(table, table_of(setting))
        return table

    @property
    def daemon(self) -> DaemonConfig:
        """The daemon's own section; its defaults where that is no such section, which the trainer will refuse."""
        try:
            return msgspec.convert(self.table.get("daemon", {}), DaemonConfig)
        except msgspec.ValidationError:
            return DaemonConfig()


class Reloading:
    """What is in force of one order's file, and how it changes."""

    def __init__(self, order: Order, attempts: Attempts, ask: Callable[[Request], Awaitable[Reply]]) -> None:
        """`ask` passes a request on to the trainer."""
        self._order = order
        self._attempts = attempts
        self._ask = ask
        self._in_force = flattened(order.table)
        """What the file says that has been taken over."""

    async def reload(self) -> Reply:
        """Take over what has changed in the file and may change; name the rest."""
        try:
            new = flattened(self._order.read())
        except (ConfigError, ValueError) as error:  # the second: a number of thousands of digits
            return Refused(message=f"nothing was taken over: {error}")
        changed = sorted(
            key
            for key in self._in_force.keys() | new.keys()
            if key not in new or key not in self._in_force or new[key] != self._in_force[key]
        )
        said = [await self._take_over(key, new) for key in changed]
        return Done(message="; ".join(said) or "nothing has changed in the configuration")

    async def _take_over(self, key: str, new: dict[str, Any]) -> str:
        section, _, name = key.partition(".")
        if key not in new:
            return f"{key} is not named any more: its default needs a restart of the daemon"
        try:
            msgspec.msgpack.encode(new[key])  # as it is passed on to the trainer
        except OverflowError:
            return f"{key} was not taken over: a number in it has more than 64 bits"
        except (TypeError, ValueError) as error:
            return f"{key} was not taken over: {error!a}"
        if key == "daemon.page":  # looked at once, at its start
            return f"{key} needs a restart of the daemon"
        if section == "daemon":
            try:
                self._take_over_own(name, new[key])
            except (msgspec.ValidationError, AttributeError) as error:
                return f"{key} is {new[key]!r}: {error}"
        else:
            reply = await self._ask(Set(key=key, value=new[key]))
            if not isinstance(reply, Done):
                return f"{key} needs a restart: {reply.message if isinstance(reply, Refused) else reply}"
        self._in_force[key] = new[key]
        return f"{key} is now {new[key]!r}"

    def _take_over_own(self, name: str, value: Any) -> None:
        table = msgspec.to_builtins(self._attempts.config) | {name: value}
        self._attempts.config = msgspec.convert(table, DaemonConfig)
        if name == "log_level":
            LOGGER.setLevel(LEVELS[value])
        else:
            set_limits(self._attempts.config)


def set_level(level: Any) -> Reply:
    """Have the daemon's log say more, or less."""
    if not isinstance(level, str) or level not in LEVELS:
        return Refused(message=f"log.level is {level!r}: give one of {', '.join(LEVELS)}")
    LOGGER.setLevel(LEVELS[level])
    return Done(message=f"log.level is now {level}")
