"""The watchdog on a clock of its own."""

from __future__ import annotations

import anyio
import pytest

from troupe.runtime.watchdog import Watchdog, watch

pytestmark = pytest.mark.anyio


def test_speaks_when_nothing_has_moved_for_the_limit_and_again_each_time_that_much_passes() -> None:
    dog = Watchdog(10.0)
    assert [now for now in range(0, 45, 1) if dog.speaks(float(now), 3.0)] == [13, 23, 33, 43]


def test_movement_makes_it_wait_anew() -> None:
    dog = Watchdog(10.0)
    assert dog.due_s(0.0) == 10.0
    assert not dog.speaks(10.0, 4.0)
    assert dog.speaks(14.0, 4.0)
    assert dog.due_s(4.0) == 24.0, "it has just spoken"
    assert not dog.speaks(24.0, 20.0)
    assert dog.speaks(30.0, 20.0)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_is_more_than_zero(limit: float) -> None:
    with pytest.raises(ValueError, match="would never be silent"):
        Watchdog(limit)


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
