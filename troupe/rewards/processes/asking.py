"""One process with a reward loaded, and what it answers."""

from __future__ import annotations

import signal

import anyio
import msgspec

from troupe.errors import RewardError
from troupe.rewards.faults import Fault
from troupe.rewards.processes.calls import Broken, Loaded, Raised, Scores, decode_reply
from troupe.runtime.elsewhere import Child
from troupe.runtime.frames import FrameError, MessageError
from troupe.runtime.process import ChildProcess

WORKER = "troupe.rewards.processes.worker"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""Sets of texts have one order, so that a score does not depend on the process that gave it."""
_KILLED_BY = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that others send: a system without memory, an operator."""


class Lost(msgspec.Struct, frozen=True):
    """The worker had to be killed, or has died."""

    fault: Fault
    is_away: bool = False
    """Whether it went with its machine, so that the same call is to be made elsewhere."""
    is_wrong: bool = False
    """Whether another machine has answered what is no answer, which says nothing of the samples."""


class Worker:
    """One process with the reward loaded."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @classmethod
    async def start(cls, spec: str, name: str, *how: str) -> Worker:
        """Spawn it and wait until the reward is loaded. `how`: LOOK, to have it end then.

        Raises:
            RewardError: where it cannot be loaded, or the process does not start or ends.
        """
        try:
            child = await ChildProcess.start(WORKER, spec, *how, env=ENVIRONMENT)
        except OSError as error:  # no memory, processes or files left: a machine's fault, which may pass
            raise RewardError(f"reward {name}: its process could not be started: {error}") from error
        worker = cls(child)
        await worker.loaded(name)
        return worker

    async def loaded(self, name: str) -> None:
        """Wait until the reward is loaded; ended where that fails. RewardError says why."""
        try:
            reply = decode_reply(await self._child.receive())
        except anyio.EndOfStream as error:
            await self._child.aclose(0.0)
            raise RewardError(f"reward {name}: its process ended while it was loaded: {error}") from None
        except FrameError as error:
            await self._child.aclose(0.0)
            raise RewardError(f"reward {name}: its process did not answer as a reward's does: {error}") from error
        except BaseException:
            await self._child.aclose(0.0)
            raise
        if not isinstance(reply, Loaded):
            await self._child.aclose(0.0)
            raise RewardError(f"reward {name}: {reply.message if isinstance(reply, Broken) else reply}")

    @property
    def is_away(self) -> bool:
        """Whether its machine is, so that a call which got no answer has met no fault of its own."""
        return False

    async def ask(self, frame: bytes, size: int) -> Scores | Raised | Broken | Lost:
        """Have one call made, for `size` completions."""
        try:
            await self._child.send(frame)
            reply = decode_reply(await self._child.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError, FrameError) as error:
            fault = Fault("reward_error", str(error), by_code=self._ended_itself)
            return self._no_answer(fault) if isinstance(error, MessageError) else Lost(fault, self.is_away)
        if isinstance(reply, Loaded):
            return self._no_answer(Fault("reward_error", "its process answered out of turn"))
        return reply

    def _no_answer(self, fault: Fault) -> Lost:
        return Lost(fault)

    @property
    def _ended_itself(self) -> bool:
        """Whether it left, or crashed, which the same code does again, as opposed to having been killed by others."""
        code = self._child.returncode
        return code is not None and -code not in _KILLED_BY

    async def kill(self) -> None:
        """Kill its process group and wait until it is gone."""
        self._child.kill()
        await self._child.aclose(0.0)

    async def stop(self, grace_s: float) -> None:
        """Let it end, and kill it where it does not."""
        await self._child.aclose(grace_s)
