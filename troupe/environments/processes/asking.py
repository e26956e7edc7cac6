"""One process with environments and tools loaded, and what it answers."""

from __future__ import annotations

import signal
from typing import Any

import anyio
import msgspec

from troupe.environments.convention import EnvironmentFault
from troupe.environments.live import Budget, Deed, Died, Gone, Late, Raised, given
from troupe.environments.processes.wire import Broken, Do, Done, Load, Order, Threw, decode_reply
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import WorldError
from troupe.runtime.elsewhere import Child
from troupe.runtime.frames import FrameError, encode
from troupe.runtime.process import ChildProcess

WORKER = "troupe.environments.processes.worker"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""Sets of texts have one order, so that an answer does not depend on the process that gave it."""
_KILLED_BY = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that others send: a system without memory, an operator."""


class Worker:
    """One process with everything loaded."""

    def __init__(self, child: Child) -> None:
        self._child, self._turn = child, anyio.Lock()
        self._over = False
        self.episodes = 0
        """That have an instance in it."""
        self.waiting = 0
        """Orders that are being carried out or wait for it."""

    @classmethod
    async def start(cls, config: EnvironmentConfig) -> Worker:
        """Spawn it and wait until everything is loaded.

        Raises:
            WorldError: where it cannot be loaded, or not in time, or the process does not start or ends.
        """
        try:
            child = await ChildProcess.start(WORKER, env=ENVIRONMENT)
        except OSError as error:  # no memory, processes or files left: a machine's fault, which may pass
            raise WorldError(f"[environment]: a process could not be started: {error}") from error
        worker = cls(child)
        try:
            await worker.ask(Load(config), Budget(config.start_timeout_s))
        except Late:
            raise WorldError(
                f"[environment]: a process had not loaded it after {config.start_timeout_s:g} s; see what its files "
                "wait for, or raise environment.start_timeout_s"
            ) from None
        except (Died, Gone) as error:
            raise WorldError(f"[environment]: a process ended while it was loaded: {error}") from None
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be asked of it."""
        return self._over or self._child.returncode is not None

    async def ask(self, order: Order, budget: Budget) -> bytes:
        """Have an order carried out, in its turn → what came of it. Raised, Late, Died or Gone where nothing does."""
        frame = _encoded(order)
        self.waiting += 1
        try:
            async with self._turn:
                reply = await self._answered(frame, budget)
        finally:
            self.waiting -= 1
        if isinstance(reply, Broken):
            await self.kill()
            raise WorldError(reply.message)
        if isinstance(reply, Threw):
            raise Raised(reply.text, reply.told, reply.passing)
        return reply.data

    async def _answered(self, frame: bytes | None, budget: Budget) -> Done | Threw | Broken:
        if self.is_over:
            raise Gone(self._child.how_it_ended())
        reply = None
        try:
            with budget, anyio.move_on_after(budget.left_s):
                reply = await self._reply(frame)
        finally:
            if reply is None:
                await self.kill()  # it is still busy, or dead
        if reply is None:
            raise Late(budget.seconds)
        return reply

    async def do(self, number: int | None, deed: Deed, budget: Budget, label: str = "") -> Any:
        """What comes of a deed, of an environment of that label. Raises as `ask`."""
        data = await self.ask(Do(number, deed), budget)
        try:
            return self._read(deed, label, data)
        except (msgspec.MsgspecError, EnvironmentFault, ValueError, RecursionError) as error:
            await self.kill()
            raise self._no_answer(error) from None

    def _read(self, deed: Deed, label: str, data: bytes) -> Any:
        return given(deed, data)

    def _no_answer(self, error: Exception) -> Died:
        return Died(f"its process did not answer as it should: {error}", True)

    async def _reply(self, frame: bytes | None) -> Done | Threw | Broken:
        try:
            if frame is not None:
                await self._child.send(frame)
            return decode_reply(await self._child.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            code = self._child.returncode
            itself = code is not None and -code not in _KILLED_BY
            raise Died(str(error), itself) from None
        except FrameError as error:
            raise self._no_answer(error) from None

    async def kill(self) -> None:
        """Kill its process group and wait until it is gone."""
        self._over = True
        self._child.kill()
        await self._child.aclose(0.0)

    async def stop(self, grace_s: float) -> None:
        """Let it end, and kill it where it does not."""
        self._over = True
        await self._child.aclose(grace_s)


def _encoded(order: Order) -> bytes:
    try:
        return encode(order)
    except (TypeError, OverflowError, ValueError) as error:
        if isinstance(order, Do) and order.deed.what == "call":  # the policy's arguments
            raise Raised(f"the arguments cannot be sent to the tool: {error}", str(error)) from None
        raise WorldError(
            f'environment.run = "process" takes plain data only, but the columns of a row hold other things: {error}'
        ) from None
