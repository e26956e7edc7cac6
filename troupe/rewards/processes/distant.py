"""A reward function in processes on other machines, spoken to as those here.

What they answer is checked once more: another machine may be wrong, and must not end a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio

from troupe.errors import RewardError
from troupe.rewards.convention import checked_scores
from troupe.rewards.extras import RewardLog
from troupe.rewards.faults import Fault
from troupe.rewards.loading import is_own
from troupe.rewards.processes.asking import Lost, Worker
from troupe.rewards.processes.calls import Broken, Raised, Scores
from troupe.runtime.elsewhere import Code, DistantChild, Elsewhere, Service

_LONGEST_FAULT = 1000


class DistantWorker(Worker):
    """One process on another machine with the reward loaded."""

    def __init__(self, child: DistantChild, name: str) -> None:
        super().__init__(child)
        self._distant, self._name = child, name

    @classmethod
    async def open(
        cls, elsewhere: Elsewhere, spec: str, name: str, limit_s: float, waits: Callable[[str | None], None]
    ) -> DistantWorker:
        """Wait for a machine that offers the reward, and until it is loaded there.

        Raises:
            RewardError: where it cannot be loaded there, or not within `limit_s`.
        """
        service = reward_service(spec, name)
        while True:
            child = await elsewhere.open(service, waits)
            worker = cls(child, name)
            try:
                with anyio.fail_after(limit_s):
                    await worker.loaded(name)
            except TimeoutError:
                await worker.kill()
                why = f"it had not loaded it after {limit_s:g} s; raise rewards.start_timeout_s"
            except RewardError as error:
                why = str(error)
            else:
                return worker
            if not child.is_away:
                child.accuse(why)
                raise RewardError(f"reward {name} on another machine: {why}")

    @property
    def is_away(self) -> bool:
        return self._distant.is_away

    async def ask(self, frame: bytes, size: int) -> Scores | Raised | Broken | Lost:
        """Have one call made, and its answer checked."""
        reply = await super().ask(frame, size)
        if isinstance(reply, Lost):
            return reply
        if isinstance(reply, Broken):  # by another machine alone no run is ended
            return Raised(reply.message[:_LONGEST_FAULT], by_code=True)
        if isinstance(reply, Raised):
            return Raised(reply.message[:_LONGEST_FAULT], by_code=reply.by_code)
        try:
            return _checked(reply, self._name, size)
        except RewardError as error:
            return self._no_answer(Fault("reward_error", f"another machine answered what is no score: {error}"))

    def _no_answer(self, fault: Fault) -> Lost:
        self._distant.accuse(fault.message)
        return Lost(fault, is_wrong=True)


def reward_service(spec: str, name: str) -> Service:
    """What another machine is to load for a reward. RewardError where its file cannot be read."""
    try:
        return Service("rewards", {"": Code.of(spec, is_ours=is_own(spec))})
    except OSError as error:
        raise RewardError(f"reward {name}: {Path(spec.rpartition(':')[0])} cannot be read: {error}") from error


def _checked(reply: Scores, name: str, size: int) -> Scores:
    """The same as the process that answered should have made it. RewardError where it did not."""
    log = RewardLog(size)
    for column, values in reply.extra.items():
        log.log_extra(column, values)
    for metric, numbers in reply.metrics.items():
        for number in numbers:
            log.log_metric(metric, number)
    extra = {column: list(values) for column, values in log.extra.items()}
    faults = [fault[:_LONGEST_FAULT] for fault in reply.log_faults[:10]] + log.faults
    return Scores(checked_scores(reply.scores, name, size), extra, log.logged, faults)
