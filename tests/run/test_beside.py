"""When it is said that nothing has moved, on a clock of its own."""

from __future__ import annotations

import anyio
import pytest

from troupe.run.beside import watch

pytestmark = pytest.mark.anyio


async def test_watch_sleeps_until_it_may_be_time_and_tells_how_long_it_has_been_still() -> None:
    now_s, moved_s = 100.0, 100.0
    told: list[tuple[float, float]] = []
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s, moved_s
        slept.append(seconds)
        if len(slept) == 2:
            moved_s = now_s + 4.0  # amid the second nap
        if len(slept) == 5:
            await anyio.sleep_forever()
        now_s += seconds

    async with anyio.create_task_group() as group:
        group.start_soon(
            lambda: watch(10.0, lambda: moved_s, lambda s: told.append((now_s, s)), clock=lambda: now_s, sleep=sleep)
        )
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert slept == [10.0, 10.0, 4.0, 10.0, 10.0]
    assert told == [(110.0, 10.0), (124.0, 10.0), (134.0, 20.0)]
