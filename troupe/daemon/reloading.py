"""What of a configuration file that is read again a daemon takes over, and what it says of the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from troupe.daemon.attempts import Attempts
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.logs import LEVELS, LOGGER, set_limits
from troupe.daemon.orders import Order
from troupe.errors import ConfigError
from troupe.messages import Done, Refused, Set
from troupe.run.daemon_settings import DaemonConfig
from troupe.run.tables import flattened


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
