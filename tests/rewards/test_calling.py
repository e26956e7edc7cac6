"""Calls: answers, retries with growing waits, timeouts, and which exceptions are the called code's own; the breaker:
opening, waiting, trying in turn, closing, and what a manager tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.rewards.scoring import until
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import Incident
from troupe.rewards import RewardActor, RewardManager, RewardSample, RewardsConfig
from troupe.rewards.calling import Caller, Exchanged
from troupe.rewards.faults import Fault

pytestmark = pytest.mark.anyio


def paced(
    waits: list[float], retries: int = 0, timeout_s: float = 5.0, jitter: float = 0.0, events: Any = None, **limits: Any
) -> Caller:
    """What makes calls so, and notes in `waits` how long it waits before it tries again."""

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    told = [] if events is None else events
    breaker = {"breaker_failures": 0, "breaker_max_wait_s": 0.001, **limits}
    config = RewardsConfig(timeout_s=timeout_s, retries=retries, concurrency=4, **breaker)
    return Caller("judge", config, lambda why, down_s: told.append(why), sleep=sleep, jitter=lambda: jitter)


async def made(caller: Caller, call: Callable[[], Awaitable[Any]], *, patient: bool = False) -> Any:
    return await caller.run(call, caller.limited, patient=patient)


class Flaky:
    """Raises what it is given, one by one, then answers 7."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls = list(errors), 0

    async def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


async def test_waits_double_up_to_half_a_minute() -> None:
    waits: list[float] = []
    await made(paced(waits, retries=8, jitter=1.0), Flaky(*[OSError("away")] * 8))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


async def test_an_answer_after_two_failures() -> None:
    waits: list[float] = []
    call = Flaky(ValueError("a"), OSError("b"))
    assert await made(paced(waits, retries=2, jitter=1.0), call) == 7
    assert (call.calls, waits) == (3, [0.5, 1.0])


async def test_the_last_fault_is_told_when_retries_are_used_up() -> None:
    waits: list[float] = []
    fault = await made(paced(waits, retries=1), Flaky(ValueError("a"), OSError("disk\nfull"), ValueError("c")))
    assert isinstance(fault, Fault)
    assert fault.kind == "reward_error"
    assert fault.message.startswith("OSError: disk full (")
    assert waits == [0.25]


async def test_a_hanging_call_is_a_timeout_and_is_tried_again() -> None:
    waits: list[float] = []
    fault = await made(paced(waits, retries=1, timeout_s=0.01), anyio.sleep_forever)
    assert fault == Fault("reward_timeout", "no answer within 0.01 s")
    assert len(waits) == 1


async def test_a_call_that_answers_its_cancellation_with_an_error_is_still_a_timeout() -> None:
    async def call() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("connection lost")

    assert await made(paced([], timeout_s=0.01), call) == Fault("reward_timeout", "no answer within 0.01 s")


@pytest.mark.parametrize(
    "error",
    [
        BaseExceptionGroup("many", [SystemExit(1), ValueError("x")]),
        ExceptionGroup("many", [ValueError("x")]),
        SystemExit(2),
        TimeoutError("of its own"),
        asyncio.CancelledError(),
        BaseExceptionGroup("many", [asyncio.CancelledError()]),
        StopAsyncIteration(),
    ],
)
async def test_whatever_the_code_raises_by_itself_is_its_own_failure(error: BaseException) -> None:
    fault = await made(paced([]), Flaky(error))
    assert isinstance(fault, Fault)
    assert fault.kind == "reward_error"
    assert fault.message.startswith(type(error).__name__)


@pytest.mark.parametrize("error", [RewardError("wrong length"), GeneratorExit()])
async def test_broken_contracts_and_the_end_of_the_program_come_through_at_once(error: BaseException) -> None:
    call = Flaky(error)
    with pytest.raises(type(error)):
        await made(paced([], retries=5), call)
    assert call.calls == 1


async def test_a_keyboard_interrupt_in_a_group_comes_through() -> None:
    group = BaseExceptionGroup("many", [ValueError(), BaseExceptionGroup("in", [KeyboardInterrupt()])])
    with pytest.raises(BaseExceptionGroup) as caught:
        await made(paced([], retries=5), Flaky(group))
    assert caught.value is group


async def test_our_own_cancellation_is_no_fault_of_the_call() -> None:
    outcomes: list[object] = []

    async def ask() -> None:
        outcomes.append(await made(paced([], retries=9), anyio.sleep_forever))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert outcomes == []


async def test_tries_that_fail_in_a_row_are_counted_until_one_succeeds() -> None:
    caller = paced([])
    tries = caller.tries
    await made(caller, Flaky(OSError("one")))
    since_s = tries.since_s
    await made(caller, Flaky(OSError("two")))
    assert (tries.failed, tries.since_s) == (2, since_s)
    assert "two" in tries.why
    assert await made(caller, Flaky()) == 7
    assert tries.failed == 0


class Service:
    """Fails until it is up; counts what it was asked."""

    def __init__(self, *, up: bool = False) -> None:
        self.up, self.asked = up, 0
        self.events: list[str | None] = []
        self.now = self.most = 0

    def caller(self, failures: int = 2, max_wait_s: float = 0.001) -> Caller:
        return paced([], events=self.events, breaker_failures=failures, breaker_max_wait_s=max_wait_s)

    async def call(self) -> int | Fault:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await anyio.lowlevel.checkpoint()
        self.now -= 1
        return self.asked if self.up else Fault("reward_error", f"fault {self.asked}")


async def test_the_last_of_the_calls_in_a_row_waits_and_the_others_have_failed() -> None:
    service = Service()
    caller = service.caller(failures=3)
    assert await made(caller, service.call, patient=True) == Fault("reward_error", "fault 1")
    assert await made(caller, service.call, patient=True) == Fault("reward_error", "fault 2")
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await made(caller, service.call, patient=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await until(lambda: service.asked > 5)
        assert answers == []
        assert service.events == ["fault 3"]
        assert caller.why is not None
        service.up = True
    assert answers == [service.asked]
    assert (caller.why, service.events) == (None, ["fault 3", None])


async def test_a_success_in_between_starts_the_count_anew_and_0_is_never() -> None:
    service = Service()
    caller, never = service.caller(failures=2), service.caller(failures=0)
    for up in (False, True, False, True, False):
        service.up = up
        await made(caller, service.call, patient=True)
    service.up = False
    for _ in range(20):
        assert isinstance(await made(never, service.call, patient=True), Fault)
    assert service.events == []


async def test_while_it_is_down_one_call_at_a_time_tries_and_all_take_turns() -> None:
    service, poison = Service(), Service()
    caller = service.caller(failures=1)
    answers: list[str] = []

    async def ask(name: str, call: Callable[[], Awaitable[Any]]) -> None:
        await made(caller, call, patient=True)
        answers.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "poison", poison.call)
        await until(lambda: caller.why is not None)
        for _ in range(4):
            tasks.start_soon(ask, "good", service.call)
        await until(lambda: service.asked > 8)
        assert poison.asked > 2, "it has its turns"
        assert (service.most, answers) == (1, [])
        service.up = True
        await until(lambda: len(answers) == 4)
        assert answers == ["good"] * 4, "a call that cannot succeed hides nothing"
        poison.up = True
    assert answers[-1] == "poison"


def test_waits_between_tries_double_up_to_the_limit() -> None:
    caller = Service().caller(failures=1, max_wait_s=60.0)
    assert [caller.wait_s(tries) * 2 for tries in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


async def test_calls_that_wait_when_another_reward_takes_over_say_so() -> None:
    service = Service()
    caller = service.caller(failures=1, max_wait_s=1000.0)
    raised: list[bool] = []

    async def ask() -> None:
        with pytest.raises(Exchanged):
            await made(caller, service.call, patient=True)
        raised.append(True)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ask)
        await until(lambda: caller.why is not None)
        caller.retire()
    assert raised == [True] * 3
    service.up = True
    assert isinstance(await made(service.caller(), service.call, patient=True), int)


class Judge(RewardActor):
    concurrency = 4

    def __init__(self) -> None:
        self.up = True
        self.name = "judge"

    async def score(self, sample: RewardSample) -> float | None:
        await anyio.lowlevel.checkpoint()
        if not self.up:
            raise ConnectionError("judge is away")
        return float(sample.index)


async def test_groups_wait_for_a_reward_that_is_down_and_get_their_scores_when_it_is_back() -> None:
    judge, told, results = Judge(), list[Incident](), []
    config = RewardsConfig(retries=0, breaker_failures=4, breaker_max_wait_s=0.001)
    manager = RewardManager([judge, lambda completions: [1.0] * len(completions)], config=config)
    manager.listen(told.append)

    async def score(place: int) -> None:
        results.append(await manager.score_group(make_group(make_prompt(0, place))))

    async with manager, anyio.create_task_group() as tasks:
        judge.up = False
        for place in range(3):
            tasks.start_soon(score, place)
        await until(lambda: "judge" in manager.down)
        assert "ConnectionError: judge is away" in manager.down["judge"]
        assert list(manager.down) == ["judge"]
        await until(lambda: bool(results))
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert len(results) == 1, "the group whose samples opened it"
        outside = await manager.compute_rewards(["p"], ["a"])
        assert outside.scores["judge"] == (None,), "who has nobody to tell does not wait"
        judge.up = True
    assert [incident.kind for incident in told] == ["reward_down", "reward_back"]
    assert told[0].message.startswith("reward judge is down, 4 calls in a row have failed: ConnectionError")
    missing = [score for result in results for score in result.scores["judge"] if score is None]
    assert len(missing) == 3, "those that opened it, but for the last"
    assert manager.down == {}


async def test_cancelled_calls_leave_the_reward_down_and_the_next_one_tries() -> None:
    judge = Judge()
    config = RewardsConfig(retries=0, breaker_failures=1, breaker_max_wait_s=0.001)
    async with RewardManager(judge, config=config) as manager:
        judge.up = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(manager.score_group, make_group(make_prompt(0, 0)))
            await until(lambda: bool(manager.down))
            tasks.cancel_scope.cancel()
        assert manager.down
        judge.up = True
        result = await manager.score_group(make_group(make_prompt(0, 0)))
        assert (result.scores["judge"], manager.down) == ((0.0, 1.0, 2.0), {})


def scoring(*outcomes: BaseException | None) -> Any:
    """A reward that fails so, call by call, and works where it is None; the last one stays."""
    left = list(outcomes)

    async def reward(completions: list[str], **_: Any) -> list[float]:
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error
        return [1.0] * len(completions)

    return reward


async def scored(manager: RewardManager, groups: int) -> None:
    for place in range(groups):
        await manager.score_group(make_group(make_prompt(0, place, batch_size=9)))


IMPATIENT = RewardsConfig(retries=0, breaker_failures=3, breaker_max_wait_s=0.001)
BY_CODE = [NameError("x"), AttributeError("x"), TypeError("x"), KeyError("x"), IndexError("x"), ImportError("x")]


@pytest.mark.parametrize("error", [*BY_CODE, ExceptionGroup("x", [TypeError("x"), KeyError("x")])], ids=repr)
async def test_a_reward_that_never_worked_and_whose_code_is_wrong_ends_the_run(error: Exception) -> None:
    manager, told = RewardManager(scoring(error), config=IMPATIENT), list[Incident]()
    manager.listen(told.append)
    with anyio.fail_after(30), pytest.raises(RewardError) as raised:
        await scored(manager, 3)
    assert str(raised.value).startswith(
        "reward reward has not worked once, and its first 3 calls failed by errors of its code, the last one by "
        + type(error).__name__
    )
    assert str(raised.value).endswith(f"{Path(__file__).name}:{_line_of_raise()}); correct it and start again")
    assert (told, manager.down) == ([], {})


def _line_of_raise() -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line == "            raise error")


@pytest.mark.parametrize(
    "outcomes",
    [
        (ConnectionError("away"),),
        (TypeError("x"), ConnectionError("away"), TypeError("x")),  # not all by its code
        (None, TypeError("x")),  # it has worked
    ],
    ids=repr,
)
async def test_otherwise_it_is_waited_for(outcomes: tuple[BaseException | None, ...]) -> None:
    manager = RewardManager(scoring(*outcomes), config=IMPATIENT)
    await held_by(manager)


async def held_by(manager: RewardManager) -> None:
    async with manager, anyio.create_task_group() as tasks:
        tasks.start_soon(scored, manager, 5)
        await until(lambda: bool(manager.down))
        tasks.cancel_scope.cancel()


async def test_wrong_code_that_takes_over_or_has_worked_in_an_earlier_start_is_waited_for() -> None:
    wrong = scoring(TypeError("x"))
    manager = RewardManager(scoring(None), config=IMPATIENT)
    await manager.exchange("reward", wrong)
    await held_by(manager)
    manager = RewardManager(wrong, config=IMPATIENT)
    manager.trust()
    await held_by(manager)


async def test_it_is_the_same_for_what_is_called_once_a_sample() -> None:
    class Wrong(RewardActor):
        async def score(self, sample: RewardSample) -> float:
            return sample.columns["no such column"]  # type: ignore[no-any-return]

    with pytest.raises(RewardError, match="reward Wrong has not worked once, and its first 3 calls failed"):
        async with RewardManager(Wrong(), config=IMPATIENT) as manager:
            await scored(manager, 1)
