"""Runs that act in virtual time in which every turn, every gradient step and every answer takes a given time, so that
what a step takes follows by arithmetic."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec

from tests.support import virtual_time
from tests.support.acting import CONTEXT, WORLD, FakeAnswers, Follows, understand
from tests.support.wiring import Hooks, Ledger, ScriptedEngine, ScriptedTrainer, prepared_run, virtual_factories
from troupe import RunConfig
from troupe.actors.conversations import Conversations, Rules
from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import CheckpointConfig
from troupe.environments.convention import Said
from troupe.grpo import LearnerConfig
from troupe.messages import Answer, PromptText
from troupe.policy import CompletedTurn, GenerationConfig, TurnRequest
from troupe.rewards import RewardManager, RewardsConfig
from troupe.run.supervisor import Supervisor
from troupe.runtime.device import DeviceThread, Turns


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What the episodes of a step take; virtual seconds."""

    turn_s: tuple[float, ...]
    """Of the device, for each turn of all rows together."""
    answer_s: tuple[float, ...]
    """Of the environment, for its answer to each turn."""
    learn_s: float
    """Of the device."""
    late_s: float = 0.0
    """By how much longer the environment takes for every other sample."""
    one_device: bool = False
    """Whether generator and learner share one; else each has its own."""

    def on_one_device(self) -> Work:
        return msgspec.structs.replace(self, one_device=True)

    @property
    def device_s(self) -> float:
        return sum(self.turn_s) + self.learn_s

    @property
    def tools_s(self) -> float:
        return sum(self.answer_s)


class Device:
    """Makes one call after the other; each takes as long as it has spent."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._busy = False
        self._calls: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def spend(self, seconds: float) -> None:
        """For the call that is being made."""
        self._spent_s += seconds

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.append((future, function, args))
        self._next()
        return future

    def shutdown(self, *, wait: bool) -> None:
        """Nothing is left behind."""

    def _next(self) -> None:
        if self._busy or not self._calls:
            return
        self._busy, self._spent_s = True, 0.0
        future, function, args = self._calls.popleft()
        try:
            done = partial(future.set_result, function(*args))
        except BaseException as error:
            done = partial(future.set_exception, error)
        asyncio.get_running_loop().call_later(self._spent_s, self._end, done)

    def _end(self, done: Callable[[], None]) -> None:
        self._busy = False
        done()
        self._next()


class TimedThread(DeviceThread):
    """An actor's way to a device."""

    def __init__(self, device: Device) -> None:
        self._executor: Any = device
        self.turns = Turns()

    async def close(self) -> None:
        """There is no thread."""


class TimedEngine(ScriptedEngine):
    """All rows end their turn at its last token."""

    def __init__(self, work: Work, device: Device) -> None:
        super().__init__(0)
        self._work, self._device = work, device

    def session(self, *, sessions: int = 1) -> Any:
        return TimedSession(self, self._work, self._device)

    def open_session(self, *, sessions: int = 1) -> Any:
        return TimedSession(self, self._work, self._device)


class TimedSession:
    """Rows keep nothing."""

    def __init__(self, engine: ScriptedEngine, work: Work, device: Device) -> None:
        self._engine, self._work, self._device = engine, work, device
        self._queue: deque[TurnRequest] = deque()

    def decode(self, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
        yield []
        self._spend(requests)
        yield [self._completed(request) for request in requests]

    def join(self, requests: Sequence[TurnRequest]) -> None:
        self._queue.extend(requests)

    def end(self) -> None:
        """It ends whenever there is nothing to do: in virtual time nobody can wait in a thread."""

    def serve(self) -> Iterator[list[CompletedTurn]]:
        """Turns have four parts; others join when one has ended."""
        live: list[TurnRequest] = []
        parts: Counter[tuple[int, ...]] = Counter()
        while live or self._queue:
            live += self._queue
            self._queue.clear()
            self._spend(live, 0.25)
            parts.update(request.row for request in live)
            ended = [request for request in live if parts[request.row] == 4]
            for request in ended:
                live.remove(request)
                del parts[request.row]
            if ended:
                yield [self._completed(request) for request in ended]

    def forget(self, rows: Sequence[tuple[int, ...]]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""

    def _spend(self, requests: Sequence[TurnRequest], part: float = 1.0) -> None:
        turns = {request.start // 2 for request in requests}
        self._device.spend(part * max(self._work.turn_s[turn] for turn in turns))

    def _completed(self, request: TurnRequest) -> CompletedTurn:
        return CompletedTurn(
            row=request.row,
            token_ids=(1 + request.row[-1],),
            log_probs=(-1.0,),
            sampling_log_probs=(-1.0,),
            versions=(self._engine.loaded()[1],),
            finish_reason="stop",
        )


class TimedTrainer(ScriptedTrainer):
    """Notes when each step ends."""

    def __init__(self, *given: Any, work: Work, device: Device, ends_s: list[float], **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._work, self._device, self._ends_s = work, device, ends_s

    def learn(self, *given: Any) -> Any:
        self._device.spend(self._work.learn_s)
        self._ends_s.append(asyncio.get_running_loop().time() + self._work.learn_s)
        return super().learn(*given)


class OneToken:
    """What comes back is one token."""

    def opening(self, messages: Any) -> tuple[int, ...]:
        return (1, 2)

    def following(self, *given: Any, **_: Any) -> Follows:
        return Follows((3,))


class TimedAnswers(FakeAnswers):
    """Over with the last turn of the work."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    async def open(self, name: Any, prompt: PromptText, columns: Mapping[str, Any]) -> Answer:
        return Answer(said={})

    async def answer(self, name: Any, turn: int, token_ids: Sequence[int], said: Said) -> Answer:
        self.delay_s = lambda: self._work.answer_s[turn - 1] + self._work.late_s * (name.sample % 2)
        answer = Answer(
            said=said.message, messages=({"role": "user", "content": "!"},), done=turn == len(self._work.answer_s)
        )
        return await self._once((*name, turn), answer)


async def _numbers(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(i) for i in range(len(completion_ids))]  # not in a thread: the clock would not wait for it


def step_s(work: Work, **schedule: Any) -> float:
    """Virtual seconds of a step: the mean of twelve, after six that begin the run."""
    steps, ends_s = 20, list[float]()
    with TemporaryDirectory(prefix="troupe-timed-") as folder:
        _run(work, folder, steps, ends_s, ScheduleConfig(generator="thread", watchdog_s=0.0, **schedule))
    assert len(ends_s) == steps
    return (ends_s[17] - ends_s[5]) / 12


def waits_s(work: Work, **schedule: Any) -> list[float]:
    """Virtual seconds that somebody in no hurry waits for the generator's device, again and again."""
    found = list[float]()

    async def ask(device: DeviceThread) -> None:
        while True:
            await anyio.sleep(1.0)
            began_s = anyio.current_time()
            async with device.turn(hurried=False):
                found.append(anyio.current_time() - began_s)

    with TemporaryDirectory(prefix="troupe-timed-") as folder:
        _run(work, folder, 20, [], ScheduleConfig(generator="thread", watchdog_s=0.0, **schedule), beside=ask)
    return found


def _run(
    work: Work,
    folder: str,
    steps: int,
    ends_s: list[float],
    schedule: ScheduleConfig,
    beside: Callable[[DeviceThread], Coroutine[Any, Any, None]] | None = None,
) -> None:
    generator = Device()
    threads: dict[str, DeviceThread] = {}

    def thread(name: str) -> DeviceThread:
        return threads.setdefault(name, TimedThread(computing.get(name) or Device()))

    learner = generator if work.one_device else Device()
    config = RunConfig(
        output=f"{folder}/run",
        generation=GenerationConfig(num_generations=2, max_completion_length=2 * len(work.turn_s)),
        rewards=RewardsConfig(),
        learner=LearnerConfig(batch_size=2, max_steps=steps),
        schedule=schedule,
        checkpoint=CheckpointConfig(every=99),
    )
    answers: Any = TimedAnswers(work)
    acting_setup: Any = SimpleNamespace(
        manager=answers,
        rules=Rules(context=CONTEXT),
        conversations=lambda: Conversations(
            answers, WORLD, {"game": OneToken()}, understand=understand, rules=Rules(context=CONTEXT)
        ),
    )
    prepared = prepared_run(config, RewardManager([_numbers], config=config.rewards), rows=4, acting_setup=acting_setup)
    ledger = Ledger(99)
    factories = virtual_factories(prepared, Hooks(), ledger)
    computing = {"generator": generator, "learner": learner}
    factories = msgspec.structs.replace(
        factories,
        device=thread,
        engine=lambda *_, **__: TimedEngine(work, generator),
        trainer=partial(
            TimedTrainer, hooks=Hooks(), ledger=ledger, real_statistics=False, work=work, device=learner, ends_s=ends_s
        ),
    )

    async def perform() -> None:
        async with Supervisor(config, factories=factories) as run, anyio.create_task_group() as tasks:
            if beside is not None:
                tasks.start_soon(beside, threads["generator"])
            await run.wait()
            tasks.cancel_scope.cancel()

    virtual_time.run(perform)
