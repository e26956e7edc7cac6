"""The loop whose clock jumps: hours take no time, order follows from the times, and a deadlock is told."""

from __future__ import annotations

import time
from functools import partial
from threading import Thread

import anyio
import pytest

from tests.support import virtual_time
from tests.support.virtual_time import StuckError, VirtualTimeLoop


def test_hours_take_no_time_and_end_in_order() -> None:
    ended: list[tuple[int, float]] = []

    async def sleep(hours: int) -> None:
        await anyio.sleep(hours * 3600)
        ended.append((hours, anyio.current_time()))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            for hours in (3, 1, 2):
                tasks.start_soon(sleep, hours)

    began_s = time.perf_counter()
    virtual_time.run(main)
    assert ended == [(1, 3600.0), (2, 7200.0), (3, 10800.0)]
    assert time.perf_counter() - began_s < 30


def test_a_deadline_passes_at_its_moment() -> None:
    async def main() -> tuple[bool, float]:
        with anyio.move_on_after(60) as scope:
            await anyio.sleep_forever()
        return scope.cancelled_caught, anyio.current_time()

    assert virtual_time.run(main) == (True, 60.0)


class Somebody:
    name = "somebody"

    async def handle(self, event: anyio.Event) -> None:
        await event.wait()


def test_a_deadlock_is_told_with_who_waits_where() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Somebody().handle, anyio.Event())
            await anyio.sleep(5)

    with pytest.raises(StuckError, match=r"deadlock at 5 s.*\n.*\n?.*somebody: test_virtual_time.py:\d+ .*handle"):
        virtual_time.run(main)


def test_timers_that_only_come_again_are_a_deadlock_too() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110 - nobody else is there
            await anyio.sleep(100)

    with pytest.raises(StuckError, match="nothing but timers before 1100 s"):
        virtual_time.run(main, horizon_s=1000)


def test_turning_for_ever_at_one_moment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "TURNS", 1000)

    async def main() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    with pytest.raises(StuckError, match="the clock stands at 0 s for 1000 turns"):
        virtual_time.run(main)


def test_the_clock_waits_for_a_thread_at_work() -> None:
    async def main() -> float:
        loop = anyio.lowlevel.current_token().native_token
        assert isinstance(loop, VirtualTimeLoop)
        done = anyio.Event()
        loop.threads_at_work += 1
        worker = Thread(target=partial(loop.call_soon_threadsafe, done.set))
        loop.call_later(50, done.set)
        worker.start()
        await done.wait()
        loop.threads_at_work -= 1
        worker.join()
        return anyio.current_time()

    assert virtual_time.run(main) == 0.0
