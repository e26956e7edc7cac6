"""The child's side of a reward in a process: load it by name, then answer one call after the other.

`python -m troupe.rewards.processes.worker REWARD`, or `… REWARD look` to see only whether it can be loaded. What the
reward prints goes to stderr.
"""

import asyncio
import inspect
import signal
import sys
from collections.abc import Awaitable
from functools import partial
from typing import Any

from troupe.errors import RewardError, sayable
from troupe.rewards.actor import RewardActor
from troupe.rewards.convention import RewardFunction, Signature, checked_scores
from troupe.rewards.episodes import EnvironmentView
from troupe.rewards.extras import RewardLog
from troupe.rewards.faults import described, may_pass
from troupe.rewards.loading import load_reward
from troupe.rewards.processes.calls import LOOK, Broken, Loaded, Raised, Scores, decode_call
from troupe.rewards.watching import leave_alone
from troupe.runtime.frames import Connection, Wire, encode
from troupe.runtime.process import serve_plainly


def answer_calls(wire: Wire) -> None:
    """Answer calls until the parent wants no more. A function that is not async has the main thread to itself, without
    an event loop that runs, as in a program of its own."""
    leave_alone()
    spec, *rest = sys.argv[1:]
    try:
        if rest == [LOOK]:
            load_reward(spec)
            wire.send(encode(Loaded()))
            return
        function = _load(spec)
    except RewardError as error:
        wire.send(encode(Broken(sayable(str(error)))))
        return
    signature = Signature.of(function)
    wire.send(encode(Loaded()))
    if signature.is_async:
        wire.run(partial(_answer_async, function, signature))
        return
    loop = asyncio.new_event_loop()
    while (frame := wire.receive()) is not None:
        if loop.is_closed():  # by the function, for which it was there
            loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        wire.send(_answer(function, signature, frame, loop))


async def _answer_async(function: RewardFunction, signature: Signature, connection: Connection) -> None:
    while True:
        given = _Given(await connection.receive())
        try:
            result = function(**signature.taken_of(given.arguments))
            reply = given.scores(await result if inspect.isawaitable(result) else result)
        except BaseException as error:  # a SystemExit is the reward's own failure
            reply = _failed(error)
        await connection.send(reply)


def _answer(function: RewardFunction, signature: Signature, frame: bytes, loop: asyncio.AbstractEventLoop) -> bytes:
    given = _Given(frame)
    try:
        result = function(**signature.taken_of(given.arguments))
        return given.scores(loop.run_until_complete(_awaited(result)) if inspect.isawaitable(result) else result)
    except BaseException as error:
        return _failed(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)  # an alarm that it has left would end the wait for the next call


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


class _Given:
    """A call, and what comes of it."""

    def __init__(self, frame: bytes) -> None:
        self._call = decode_call(frame)
        self._log = RewardLog(self._call.size)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the function may take."""
        own: dict[str, Any] = {"log_extra": self._log.log_extra, "log_metric": self._log.log_metric}
        if self._call.environments is not None:
            own["environments"] = [EnvironmentView(*made_of) for made_of in self._call.environments]
        return {**self._call.arguments, **own, "trainer_state": self._call.trainer_state}

    def scores(self, result: Any) -> bytes:
        """The frame that answers; RewardError where the result breaks the convention."""
        scores = checked_scores(result, self._call.name, self._call.size)
        extra = {column: list(values) for column, values in self._log.extra.items()}
        return encode(Scores(scores, extra, self._log.logged, self._log.faults))


def _failed(error: BaseException) -> bytes:
    if isinstance(error, RewardError):
        return encode(Broken(sayable(str(error))))
    return encode(Raised(described(error), not may_pass(error)))


def _load(spec: str) -> RewardFunction:
    found = load_reward(spec)
    if isinstance(found, RewardActor):
        raise RewardError(f"reward {spec} is a RewardActor; only functions run in processes")
    get_ready = getattr(found, "get_ready", None)
    if get_ready is not None:  # what its first call would otherwise have to wait for
        try:
            get_ready()
        except Exception as error:
            raise RewardError(f"reward {spec} cannot get ready: {described(error)}") from error
    return found


if __name__ == "__main__":
    serve_plainly(answer_calls)
