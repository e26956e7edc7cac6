"""The child's side of a reward in a process: load it by name, then answer one call after the other.

`python -m troupe.rewards.worker REWARD`. What the reward prints goes to stderr.
"""

from __future__ import annotations

import sys

import anyio
import msgspec

from troupe.errors import RewardError, sayable
from troupe.rewards.actor import RewardActor
from troupe.rewards.attempts import described, is_by_code
from troupe.rewards.calls import Broken, Call, Raised, Ready, Scores
from troupe.rewards.functions import RewardFunction, Signature, checked_scores
from troupe.rewards.loading import load_reward
from troupe.rewards.reward_log import RewardLog
from troupe.runtime import Connection, serve

_encode = msgspec.msgpack.Encoder().encode


async def play(connection: Connection) -> None:
    """Answer calls until the parent wants no more."""
    try:
        function = _load(sys.argv[1])
    except RewardError as error:
        await connection.send(_encode(Broken(sayable(str(error)))))
        return
    signature = Signature.of(function)
    await connection.send(_encode(Ready()))
    while True:
        call = msgspec.msgpack.decode(await connection.receive(), type=Call)
        await connection.send(await _answer(function, signature, call))


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


async def _answer(function: RewardFunction, signature: Signature, call: Call) -> bytes:
    log = RewardLog(call.size)
    given = {**call.arguments, "log_extra": log.log_extra, "log_metric": log.log_metric}
    given["trainer_state"] = call.trainer_state
    try:
        result = function(**signature.taken_of(given))
        if signature.is_async or hasattr(result, "__await__"):
            result = await result
        scores = checked_scores(result, call.name, call.size)
        extra = {column: list(values) for column, values in log.extra.items()}
        return _encode(Scores(scores, extra, log.logged, log.faults))
    except RewardError as error:
        return _encode(Broken(sayable(str(error))))
    except anyio.get_cancelled_exc_class():
        return _encode(Raised("the call was cancelled by itself"))
    except BaseException as error:  # a SystemExit is the reward's own failure
        return _encode(Raised(described(error), is_by_code(error)))


if __name__ == "__main__":
    serve(play)
