"""Environments and tools in processes on other machines, spoken to as those here.

What is lost with its machine was not asked, as far as an episode is concerned: it is brought back elsewhere, and asked
there. What a machine answers is checked once more, for it may be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from troupe.environments.adapters import ADAPTERS
from troupe.environments.live import MOST_BYTES, Away, Budget, Deed, Died, Gone, Late, given, is_plain, read
from troupe.environments.processes.asking import Worker
from troupe.environments.processes.wire import Broken, Done, Threw
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.elsewhere import Code, DistantChild, Elsewhere, Service

_LONGEST = 10_000


class DistantWorker(Worker):
    """One process on another machine with everything loaded."""

    def __init__(self, child: DistantChild) -> None:
        super().__init__(child)
        self._distant = child

    @classmethod
    async def open(
        cls, elsewhere: Elsewhere, config: EnvironmentConfig, waits: Callable[[str | None], None]
    ) -> DistantWorker:
        """Wait for a machine that offers it all, and until it is loaded there.

        Raises:
            WorldError: where it cannot be loaded there, or not in time.
        """
        service = environment_service(config)
        while True:
            child = await elsewhere.open(service, waits)
            worker = cls(child)
            try:
                reply = await worker._answered(None, Budget(config.start_timeout_s))
            except Gone:
                continue
            except Late:
                why = f"it had not been loaded after {config.start_timeout_s:g} s; raise environment.start_timeout_s"
            except Died as error:
                why = str(error)
            else:
                if isinstance(reply, Done):
                    return worker
                why = (reply.message if isinstance(reply, Broken) else reply.told)[:_LONGEST]
                await worker.kill()
            child.accuse(why)
            raise WorldError(f"[environment] on another machine: {why}")

    async def _answered(self, frame: bytes | None, budget: Budget) -> Done | Threw | Broken:
        try:
            reply = await super()._answered(frame, budget)
        except (Late, Died, Gone) as error:
            if self._distant.is_away:
                raise Away(f"its machine is away: {error}") from None
            raise
        if frame is not None and isinstance(reply, Broken):
            await self.kill()
            raise self._no_answer(ValueError(reply.message))
        return Threw(reply.text[:_LONGEST], reply.told[:_LONGEST], reply.passing) if isinstance(reply, Threw) else reply

    def _read(self, deed: Deed, label: str, data: bytes) -> Any:
        if len(data) > MOST_BYTES:
            raise ValueError(f"the result has {len(data):,} bytes; the limit is {MOST_BYTES:,}")
        if deed.what == "save_state":  # for other machines alone; here it is kept as it is
            msgspec.msgpack.decode(data)
            return data
        result = given(deed, data)
        if deed.what == "attributes" and not is_plain(result):
            raise ValueError("the attributes are no plain data")
        return given(deed, read(deed, label, result))

    def _no_answer(self, error: Exception) -> Died:
        why = f"its process on another machine did not answer as it should: {error}"[:_LONGEST]
        self._distant.accuse(why)
        return Died(why, False)


def environment_service(section: EnvironmentConfig) -> Service:
    """What another machine is to load for a section. WorldError where a file cannot be read."""
    factory = section.factory
    named = {"": factory} if isinstance(factory, str) else factory or {}
    try:
        return Service(
            "environments",
            {name: _code(spec) for name, spec in named.items()},
            tuple(Code.of(spec, is_ours=False) for spec in section.tools),
        )
    except OSError as error:
        raise WorldError(f"[environment]: a file cannot be read: {error}") from error


def _code(spec: str) -> Code:
    prefix, colon, _ = spec.partition(":")
    return Code.of(spec, is_ours=bool(colon) and prefix in ADAPTERS)
