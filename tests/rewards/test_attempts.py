"""Attempts: answers, retries with growing waits, timeouts, and which exceptions are the called code's own."""

from __future__ import annotations

import asyncio

import anyio
import msgspec
import pytest

from troupe.errors import RewardError
from troupe.rewards.attempts import Attempts, Fault, Pace, Tries, described, in_short

pytestmark = pytest.mark.anyio


def attempts(waits: list[float], retries: int = 0, timeout_s: float = 5.0, jitter: float = 0.0) -> Attempts:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    pace = Pace(timeout_s=timeout_s, retries=retries, concurrency=1)
    return Attempts(pace=pace, sleep=sleep, jitter=lambda: jitter)


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
    for attempt in (1, 2, 3, 7, 8):
        await attempts(waits, jitter=1.0).wait(attempt)
    assert waits == [0.5, 1.0, 2.0, 30.0, 30.0]


async def test_an_answer_after_two_failures() -> None:
    waits: list[float] = []
    call = Flaky(ValueError("a"), OSError("b"))
    assert await attempts(waits, retries=2, jitter=1.0).run(call) == 7
    assert (call.calls, waits) == (3, [0.5, 1.0])


async def test_the_last_fault_is_told_when_retries_are_used_up() -> None:
    waits: list[float] = []
    fault = await attempts(waits, retries=1).run(Flaky(ValueError("a"), OSError("disk\nfull"), ValueError("c")))
    assert isinstance(fault, Fault)
    assert fault.kind == "reward_error"
    assert fault.message.startswith("OSError: disk full (")
    assert waits == [0.25]


async def test_a_hanging_call_is_a_timeout_and_is_tried_again() -> None:
    waits: list[float] = []
    fault = await attempts(waits, retries=1, timeout_s=0.01).run(anyio.sleep_forever)
    assert fault == Fault("reward_timeout", "no answer within 0.01 s")
    assert len(waits) == 1


async def test_a_call_that_answers_its_cancellation_with_an_error_is_still_a_timeout() -> None:
    async def call() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("connection lost")

    assert await attempts([], timeout_s=0.01).run(call) == Fault("reward_timeout", "no answer within 0.01 s")


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
    fault = await attempts([]).run(Flaky(error))
    assert isinstance(fault, Fault)
    assert fault.kind == "reward_error"
    assert fault.message.startswith(type(error).__name__)


@pytest.mark.parametrize("error", [RewardError("wrong length"), GeneratorExit()])
async def test_broken_contracts_and_the_end_of_the_program_come_through_at_once(error: BaseException) -> None:
    call = Flaky(error)
    with pytest.raises(type(error)):
        await attempts([], retries=5).run(call)
    assert call.calls == 1


async def test_a_keyboard_interrupt_in_a_group_comes_through() -> None:
    group = BaseExceptionGroup("many", [ValueError(), BaseExceptionGroup("in", [KeyboardInterrupt()])])
    with pytest.raises(BaseExceptionGroup) as caught:
        await attempts([], retries=5).run(Flaky(group))
    assert caught.value is group


async def test_our_own_cancellation_is_no_fault_of_the_call() -> None:
    outcomes: list[object] = []

    async def play() -> None:
        outcomes.append(await attempts([], retries=9).run(anyio.sleep_forever))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(play)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert outcomes == []


def test_what_utf_8_cannot_say_is_told_by_its_escape() -> None:
    assert described(ValueError("no file caf\udce9")) == r"ValueError: no file caf\udce9"


def test_long_texts_are_cut_and_empty_ones_left_out() -> None:
    assert described(ValueError()) == "ValueError"
    assert described(ValueError("x" * 1000)) == "ValueError: " + "x" * 299 + "…"


async def test_tries_that_fail_in_a_row_are_counted_until_one_succeeds() -> None:
    tries = Tries()
    paced = msgspec.structs.replace(attempts([], retries=5), tries=tries)
    assert await paced.run(Flaky(OSError("one"), OSError("two"))) == 7
    assert tries.failed == 0
    await paced.once(Flaky(OSError("three")))
    since_s = tries.since_s
    await paced.once(Flaky(OSError("four")))
    assert (tries.failed, tries.since_s) == (2, since_s)
    assert "four" in tries.why


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("ConnectionRefusedError: [Errno 111] Connection refused (/home/me/judge.py:12)", "connection refused"),
        ("OSError: Multiple exceptions: [Errno 111] Connect call failed ('::1', 9, 0, 0)", "connection refused"),
        ("URLError: <urlopen error [Errno 61] Connection refused>", "connection refused"),
        ("no answer within 60 s", "no answer within 60 s"),
        ("ValueError: odd (f.py:1) one\ntwo (/a b/judge.py:3)", "ValueError: odd (f.py:1) one two"),
        ("x" * 200, "x" * 99 + "…"),
    ],
)
def test_a_fault_in_a_few_words(message: str, short: str) -> None:
    assert in_short(message) == short
