"""Code that does not return is left behind: hanging threads, and coroutines that ignore their cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest

from troupe.rewards import RewardActor, RewardManager, RewardSample, RewardsConfig
from troupe.runtime import isolation
from troupe.runtime.isolation import DaemonThreads, InPlace, end_tasks, in_daemon_thread, in_own_task

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GRACE_S", 0.01)


async def stubborn() -> None:
    """Ignores every way to end it."""
    while True:
        try:
            await asyncio.sleep(3600)
        except BaseException:
            continue


async def deaf() -> None:
    """Ignores its cancellation, but may be closed."""
    while True:
        try:
            await anyio.sleep(3600)
        except asyncio.CancelledError:
            continue


async def within_a_task_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        await stubborn()


async def slow_to_close() -> None:
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(3600)


async def test_threads_are_used_again() -> None:
    first = await in_daemon_thread(threading.current_thread)
    assert first.daemon
    assert {await in_daemon_thread(threading.current_thread) for _ in range(5)} == {first}


async def test_calls_at_the_same_time_have_threads_of_their_own() -> None:
    barrier, threads = threading.Barrier(5), set[threading.Thread]()

    def meet() -> None:
        barrier.wait(30)
        threads.add(threading.current_thread())

    await asyncio.gather(*(in_daemon_thread(meet) for _ in range(5)))
    assert len(threads) == 5


async def test_a_hanging_thread_is_left_alone_when_cancelled_and_never_used_again() -> None:
    released, stuck = threading.Event(), list[threading.Thread]()

    def hang() -> None:
        stuck.append(threading.current_thread())
        released.wait()

    with anyio.move_on_after(0.05) as scope:
        await in_daemon_thread(hang)
    assert scope.cancelled_caught
    assert await in_daemon_thread(threading.current_thread) not in stuck
    released.set()
    stuck[0].join(30)
    assert not stuck[0].is_alive()


def test_a_thread_that_outlives_the_event_loop_ends_quietly() -> None:
    released, stuck = threading.Event(), list[threading.Thread]()

    def hang() -> None:
        stuck.append(threading.current_thread())
        released.wait()

    async def abandon() -> None:
        with anyio.move_on_after(0.05):
            await in_daemon_thread(hang)

    anyio.run(abandon)
    released.set()
    stuck[0].join(30)
    assert not stuck[0].is_alive()


async def test_an_idle_thread_ends() -> None:
    threads = DaemonThreads(idle_s=0.01)
    thread = await threads.run(threading.current_thread)
    thread.join(30)
    assert not thread.is_alive()
    assert await threads.run(lambda: 7) == 7


async def test_what_a_thread_raises_comes_through_and_context_goes_along() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(3)
    assert await in_daemon_thread(variable.get) == 3
    turned = (StopIteration(), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError())
    for error, expected in [
        (KeyError("x"), KeyError),
        (SystemExit(2), SystemExit),
        *((error, RuntimeError) for error in turned),
    ]:

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(expected):
            await in_daemon_thread(fail)


@pytest.mark.parametrize("error", [StopIteration(), GeneratorExit(), asyncio.CancelledError()], ids=repr)
async def test_what_is_called_in_place_does_not_end_its_caller(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError, match=f"the called code raised {type(error).__name__}"), InPlace():
        fail()


async def test_an_interrupt_of_the_codes_own_is_told_from_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    async def fail_later() -> None:
        fail()

    def _on_sigint() -> None:  # as asyncio's handler is called
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), InPlace():
            fail()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: _on_sigint)
        with pytest.raises(RuntimeError, match="the called code raised KeyboardInterrupt"), InPlace():
            fail()
        with pytest.raises(RuntimeError, match="the called code raised KeyboardInterrupt"):
            await in_own_task(fail_later)
        with pytest.raises(KeyboardInterrupt), InPlace():
            _on_sigint()


def test_an_event_loop_ends_although_a_task_ignores_its_cancellation() -> None:
    async def leave_behind() -> list[str]:
        tasks = [asyncio.create_task(stubborn()), asyncio.create_task(anyio.sleep_forever())]
        await anyio.lowlevel.checkpoint()
        left = await end_tasks(tasks)
        assert tasks[1].cancelled()
        return left

    line = stubborn.__code__.co_firstlineno
    assert anyio.run(leave_behind) == [f"stubborn ({__file__}:{line})"]


async def test_with_a_python_that_is_not_known_only_what_is_public_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "KNOWN_PYTHON", False)
    monkeypatch.setattr(asyncio, "_unregister_task", None)
    monkeypatch.setattr(isolation, "ctypes", None)
    released = asyncio.Event()

    async def deaf_to_its_end() -> None:
        while not released.is_set():
            try:
                await asyncio.sleep(3600)
            except BaseException:
                continue

    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(code()) for code in (deaf, deaf_to_its_end, anyio.sleep_forever)]
    await anyio.lowlevel.checkpoint()
    left = await end_tasks(tasks)
    assert [place.partition(" ")[0].rpartition(".")[2] for place in left] == ["deaf", "deaf_to_its_end"]
    assert asyncio.all_tasks() - before == {tasks[1]}, "one that may be closed ends"
    released.set()
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])

    with anyio.move_on_after(0.01) as scope:
        await in_own_task(stubborn)
    assert scope.cancelled_caught
    assert asyncio.all_tasks() == before


async def test_with_such_a_python_every_interrupt_in_the_main_thread_is_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation, "KNOWN_PYTHON", False)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with pytest.raises(KeyboardInterrupt), InPlace():
        fail()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C means what it means in a program that has not asked for anything else."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
async def test_a_task_of_its_own_gives_what_the_coroutine_gives() -> None:
    async def add(a: int, b: int) -> int:
        await anyio.lowlevel.checkpoint()
        return a + b

    assert await in_own_task(lambda: add(3, 4)) == 7
    errors = (ValueError("x"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit())
    for error in errors:

        async def fail(error: BaseException = error) -> None:
            await anyio.lowlevel.checkpoint()
            raise error

        with pytest.raises(RuntimeError if isinstance(error, GeneratorExit) else type(error)):
            await in_own_task(fail)


@pytest.mark.parametrize("code", [stubborn, deaf, within_a_task_group, slow_to_close])
async def test_a_coroutine_that_ignores_its_cancellation_is_left_behind(code: Callable[[], Awaitable[Any]]) -> None:
    before = asyncio.all_tasks()
    with anyio.fail_after(30):
        with anyio.move_on_after(0.01) as scope:
            await in_own_task(code)
    assert scope.cancelled_caught
    if code is not within_a_task_group:  # its own tasks are its own
        assert asyncio.all_tasks() == before


async def test_one_that_closes_in_time_may_do_so() -> None:
    closed = []

    async def tidy() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
                closed.append(True)

    with anyio.move_on_after(0.01):
        await in_own_task(tidy)
    assert closed == [True]


class Stubborn(RewardActor):
    """Hangs where it is told to, and ignores cancellation."""

    timeout_s = 0.01

    def __init__(self, where: str) -> None:
        self.where = where

    async def start(self) -> None:
        if self.where == "start":
            await stubborn()

    async def score(self, sample: RewardSample) -> float | None:
        if self.where == "score" and sample.index == 1:
            await stubborn()
        return 1.0

    async def stop(self) -> None:
        if self.where == "stop":
            await stubborn()


async def test_actors_that_hang_and_ignore_cancellation_hold_up_nothing() -> None:
    from troupe.errors import RewardError

    config = RewardsConfig(retries=0, start_timeout_s=0.01)
    with anyio.fail_after(30):
        with pytest.raises(RewardError, match=r"reward Stubborn did not start within 0\.01 s"):
            await RewardManager(Stubborn("start"), config=config).start()
        async with RewardManager(Stubborn("score"), config=config) as manager:
            result = await manager.compute_rewards(["p"] * 3, ["a"] * 3)
        assert result.scores == {"Stubborn": (1.0, None, 1.0)}
        manager = RewardManager(Stubborn("stop"), config=config)
        await manager.start()
        (incident,) = await manager.stop()
        assert incident.message == "reward Stubborn: did not stop: no answer within 0.01 s"


async def test_an_async_function_that_ignores_cancellation_is_missing() -> None:
    async def hangs(completions: list[str]) -> list[float]:
        await stubborn()
        return []

    config = RewardsConfig(retries=0, timeout_s=0.01)
    with anyio.fail_after(30):
        result = await RewardManager(hangs, config=config).compute_rewards(["p"], ["a"])
    assert [incident.kind for incident in result.incidents] == ["reward_timeout"]


LEAVES_ONE_BEHIND = """
import anyio, asyncio
from troupe.runtime import isolation
from tests.runtime.test_isolation import stubborn

async def main():
    isolation.GRACE_S = 0.01
    with anyio.move_on_after(0.01):
        await isolation.in_own_task(stubborn)

anyio.run(main)
"""


def test_what_was_left_behind_does_not_keep_the_process_from_ending() -> None:
    result = subprocess.run([sys.executable, "-c", LEAVES_ONE_BEHIND], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
