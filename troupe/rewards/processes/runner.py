"""A reward function in processes that can be killed: for code that may hang, crash or eat a processor.

The function is named, not sent: the workers load it by file or module. Arguments and answers are msgpack.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import anyio

from troupe.errors import RewardError
from troupe.rewards.calling import Attempt, Caller
from troupe.rewards.convention import (
    OF_ENVIRONMENTS,
    PROVIDED,
    Reward,
    RewardFunction,
    check_available,
    check_signature,
    reward_name,
    reward_place,
    shown,
    unwrapped,
)
from troupe.rewards.extras import RewardLog, TrainerState
from troupe.rewards.faults import Fault
from troupe.rewards.outcomes import Batch, Outcome, as_outcome, finite, summed
from troupe.rewards.processes.asking import Lost, Worker
from troupe.rewards.processes.calls import LOOK, Broken, Call, Raised, Scores
from troupe.rewards.processes.distant import DistantWorker
from troupe.rewards.runners import Runner, not_started
from troupe.runtime.code_files import name_of
from troupe.runtime.elsewhere import Elsewhere
from troupe.runtime.frames import encode
from troupe.runtime.roles import together

_MOST_MACHINES = 5
"""That one call may lose."""


class ProcessRunner(Runner):
    """One reward function in `processes` workers, each of which makes one call at a time.

    A call past its deadline is ended by killing the worker's process group. Its samples, and those of a call in which
    the worker died, are then tried one by one, so that the sample at fault is missing and its neighbours are not; not
    where `scope` is set on the function, which says that its samples are compared with each other. A worker that is
    gone is replaced when it is needed. On other machines, where one is begun when it is needed first, a call that was
    lost with its machine is made again as it is.
    """

    def __init__(self, reward: RewardFunction, caller: Caller, spec: str, elsewhere: Elsewhere | None = None) -> None:
        """`elsewhere`: where the workers are, unless they are on this machine."""
        super().__init__(reward, caller)
        self._function, self._spec, self._elsewhere = reward, spec, elsewhere
        self._signature = check_signature(reward)
        self._apart = getattr(unwrapped(reward), "scope", None) is None
        self._workers = anyio.CapacityLimiter(caller.config.processes)
        self._idle: list[Worker] = []
        self._started = False

    async def start(self) -> None:
        """Start all workers."""
        self._started = True

        async def begin() -> None:
            self._idle.append(await self._new_worker())

        if self._elsewhere is not None:  # nobody need be there yet
            return
        await together([begin] * self.caller.config.processes)

    async def stop(self) -> Fault | None:
        """End the workers; those that are busy end with their calls."""
        self._started = False
        while self._idle:
            await self._idle.pop().stop(min(1.0, self.caller.config.timeout_s))
        return None

    async def score(self, batch: Batch) -> Outcome:
        """(G,) scores; missing where every attempt failed."""
        if not self._started:
            raise not_started(self.name)
        # each call of a worker has a limit of its own
        answer = await self.caller.run(
            partial(self._attempt, batch), lambda: nullcontext(Attempt()), patient=batch.patient
        )
        return answer if isinstance(answer, Outcome) else as_outcome(answer, batch.size)

    async def _attempt(self, batch: Batch) -> Outcome | Fault:
        """One call, and where its worker was lost one for each sample; a fault where that gave nothing."""
        answer = await self._once(batch)
        if not isinstance(answer, Lost):
            return answer
        if not self._apart or batch.size == 1:
            return answer.fault
        parts: dict[int, Outcome | Fault] = {}

        async def alone(index: int) -> None:
            part = await self._once(batch.part(index))
            parts[index] = part.fault if isinstance(part, Lost) else part

        await together([partial(alone, index) for index in range(batch.size)])
        faults = {index: part for index, part in parts.items() if isinstance(part, Fault)}
        if len(faults) == batch.size:
            return answer.fault
        return _merged({i: part for i, part in parts.items() if isinstance(part, Outcome)}, faults, batch.size)

    async def _once(self, batch: Batch) -> Outcome | Fault | Lost:
        """One call, of another worker where one is lost with its machine."""
        for _ in range(_MOST_MACHINES):
            answer = await self._of_one(batch)
            if not (isinstance(answer, Lost) and answer.is_away):
                break
        return answer

    async def _of_one(self, batch: Batch) -> Outcome | Fault | Lost:
        """One call of one worker."""
        frame = self._frame(batch)
        async with self._workers:
            worker = self._idle.pop() if self._idle else None
            if worker is None:
                try:
                    worker = await self._new_worker()
                except RewardError as error:  # it was loaded before, so this may pass
                    return Fault("reward_error", str(error))
            try:
                with self.caller.limited() as attempt:
                    attempt.outcome = await worker.ask(frame, batch.size)
            except BaseException:
                await worker.kill()  # it is still busy
                raise
            reply: Scores | Raised | Broken | Lost | Fault = attempt.outcome
            if isinstance(reply, Fault):
                is_away = worker.is_away
                await worker.kill()
                return Lost(Fault(reply.kind, f"{reply.message}; its process was killed"), is_away)
            if isinstance(reply, Lost):
                await worker.kill()
                return reply.fault if reply.is_wrong else reply
            if self._started:
                self._idle.append(worker)
            else:
                await worker.kill()
        if isinstance(reply, Broken):
            raise RewardError(reply.message)
        if isinstance(reply, Raised):
            return Fault("reward_error", reply.message, reply.by_code)
        return _read(reply, batch.size)

    async def _new_worker(self) -> Worker:
        limit_s = self.caller.config.start_timeout_s
        if self._elsewhere is not None:
            with self.caller.until_retired():
                return await DistantWorker.open(
                    self._elsewhere, self._spec, self.name, limit_s, self.caller.waits_for_machines
                )
        try:
            with anyio.fail_after(limit_s):
                return await Worker.start(self._spec, self.name)
        except TimeoutError:
            raise RewardError(
                f"reward {self.name}: its process had not loaded it after {limit_s:g} s; raise rewards.start_timeout_s"
            ) from None

    def _frame(self, batch: Batch) -> bytes:
        given: dict[str, Any] = {**batch.given, "log_extra": None, "log_metric": None}
        check_available(self._function, self._signature, given.keys())
        taken = self._signature.taken_of(given)
        for own in ("trainer_state", "log_extra", "log_metric"):
            taken.pop(own, None)
        environments = [view.plain for view in batch.views] if taken.pop("environments", None) is not None else None
        state = batch.arguments.get("trainer_state")
        if state is not None and not isinstance(state, TrainerState):
            raise RewardError(f"reward {self.name}: trainer_state {shown(state)} cannot be sent to a process")
        try:
            return encode(Call(self.name, batch.size, taken, state, environments))
        except (TypeError, OverflowError, ValueError) as error:
            columns = ", ".join(sorted(taken.keys() - PROVIDED - OF_ENVIRONMENTS)) or "none"
            raise RewardError(
                f"reward {self.name} runs in processes, which take plain data only, but its arguments hold other "
                f"things: {error} (columns: {columns})"
            ) from None


async def look_at(spec: str, name: str, limit_s: float) -> None:
    """See in a process whether a reward can be loaded, so that a file that hangs or ends its process does no harm.

    Raises:
        RewardError: where it cannot, or not within `limit_s`.
    """
    try:
        with anyio.fail_after(limit_s):
            worker = await Worker.start(spec, name, LOOK)
    except TimeoutError:
        raise RewardError(
            f"reward {name}: {spec} was not loaded after {limit_s:g} s; see what its file waits for"
        ) from None
    await worker.stop(1.0)


def process_spec(reward: Reward, spec: str | None, otherwise: str = 'run it as "auto"') -> str:
    """The name by which a process loads a reward: what the configuration calls it, or where it is defined.

    Raises:
        RewardError: for a reward that has no such name; it says what to do, or `otherwise`.
    """
    name = reward_name(reward)
    remedy = f"define it with `def` at the top of a module or file and name that, or {otherwise}"
    if not callable(reward):
        raise RewardError(f'reward {name} is a RewardActor and lives in the event loop; run it as "auto"')
    if spec is not None:
        return spec
    try:
        return name_of(reward)
    except ValueError as error:
        raise RewardError(f"{reward_place(reward)}reward {name} {error}; {remedy}") from None


def _read(reply: Scores, size: int) -> Outcome:
    log = RewardLog(size, {column: tuple(values) for column, values in reply.extra.items()}, reply.metrics)
    return finite(reply.scores, [Fault("reward_log", message) for message in reply.log_faults], log)


def _merged(parts: dict[int, Outcome], faults: dict[int, Fault], size: int) -> Outcome:
    """Samples that were scored one by one as one group again."""
    scores: list[float | None] = [None] * size
    extra: dict[str, list[Any]] = {}
    logged: dict[str, list[float]] = {}
    listed = summed(faults, size)
    faulted = set(faults)
    for index, part in sorted(parts.items()):
        (scores[index],) = part.scores
        faulted |= {index for _ in part.faulted}
        listed += [Fault(fault.kind, f"sample {index} of {size}, alone: {fault.message}") for fault in part.faults]
        for column, (value,) in part.log.extra.items():
            extra.setdefault(column, [None] * size)[index] = value
        for name, values in part.log.logged.items():
            logged.setdefault(name, []).extend(values)
    log = RewardLog(size, {column: tuple(values) for column, values in extra.items()}, logged)
    return Outcome(scores=scores, faults=listed, log=log, faulted=frozenset(faulted))
