from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import mlx.core as mx
import msgspec
import pytest

from troupe.runtime.device import DeviceThread, arrays_in

pytestmark = pytest.mark.anyio


class Pair(msgspec.Struct):
    left: Any
    right: Any = None


@dataclass
class Record:
    value: Any
    number: int = 0


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"troupe-{name}")]


def test_finds_every_array_of_a_tree() -> None:
    arrays = [mx.array(float(i)) for i in range(8)]
    a, b, c, d, e, f, g, h = arrays
    tree = (
        1,
        a,
        [0.5, "text", b],
        {"x": c, "y": {"z": (None, d)}},
        Pair(left=e, right=[Record(value=f)]),
        (((g,),),),
        Record,
        b"bytes",
        [3, 4, h],
    )
    assert [array.item() for array in arrays_in(tree)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


async def test_lazy_results_can_be_used_in_any_thread_whatever_stands_before_them() -> None:
    def work(x: mx.array) -> Any:
        return 7, x + 1, [0, x * 2], Pair(left=x - 1)

    async with DeviceThread("lazy") as device:
        number, plus, (_, twice), pair = await device.run(work, mx.array([1.0, 2.0]))
        kept = await device.run(lambda: mx.arange(3) + 1)
    found: list[Any] = []
    reader = threading.Thread(
        target=lambda: found.extend([plus.tolist(), twice.tolist(), pair.left.tolist(), kept.tolist()])
    )
    reader.start()
    reader.join()
    assert number == 7
    assert found == [[2.0, 3.0], [2.0, 4.0], [0.0, 1.0], [1, 2, 3]]


async def test_always_the_same_thread_with_a_stream_of_its_own() -> None:
    async with DeviceThread("one") as one, DeviceThread("two") as two:
        seen = [
            await one.run(lambda: (threading.get_ident(), str(mx.default_stream(mx.default_device())))) for _ in "abc"
        ]
        other = await two.run(lambda: (threading.get_ident(), str(mx.default_stream(mx.default_device()))))
    here = (threading.get_ident(), str(mx.default_stream(mx.default_device())))
    assert len(set(seen)) == 1
    assert len({seen[0], other, here}) == 3
    assert len({seen[0][1], other[1], here[1]}) == 3


async def test_exceptions_pass_and_the_thread_lives_on() -> None:
    def fail() -> None:
        raise ValueError("no")

    async with DeviceThread("fail") as device:
        with pytest.raises(ValueError, match="no"):
            await device.run(fail)
        assert await device.run(lambda: 3) == 3


async def test_a_stop_iteration_is_told_instead_of_waited_for() -> None:
    async with DeviceThread("next") as device:
        with anyio.fail_after(30), pytest.raises(RuntimeError, match="StopIteration"):
            await device.run(next, iter(()))


async def test_an_evaluation_that_fails_is_raised_where_it_was_asked_for() -> None:
    async with DeviceThread("eval") as device:
        with pytest.raises(ValueError, match=r"broadcast|shape"):
            await device.run(lambda: mx.zeros((2,)) + mx.zeros((3,)))


async def test_cancellation_asks_for_an_early_end_and_waits_for_it() -> None:
    started, asked = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        started.set()
        assert asked.wait(10)
        ended.append("work")

    def ask() -> None:
        ended.append("asked")
        asked.set()

    async with DeviceThread("cancel") as device, anyio.create_task_group() as group:

        async def call() -> None:
            try:
                await device.run(work, on_cancel=ask)
            finally:
                ended.append("call")

        group.start_soon(call)
        await anyio.to_thread.run_sync(started.wait)
        group.cancel_scope.cancel()
    assert ended == ["asked", "work", "call"]


async def test_a_cancelled_call_that_fails_is_still_a_cancellation() -> None:
    started, asked = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        asked.wait(10)
        raise ValueError("nobody asks any more")

    async with DeviceThread("cancel") as device, anyio.create_task_group() as group:
        group.start_soon(lambda: device.run(work, on_cancel=asked.set))
        await anyio.to_thread.run_sync(started.wait)
        group.cancel_scope.cancel()


async def test_a_call_cancelled_before_it_began_never_runs_after_the_caller_has_gone() -> None:
    gate = threading.Event()
    ran: list[int] = []
    async with DeviceThread("queue") as device, anyio.create_task_group() as group:
        group.start_soon(device.run, gate.wait)
        with anyio.CancelScope() as scope:
            scope.cancel()
            gate.set()
            await device.run(ran.append, 1)
        done = list(ran)
    assert ran == done


async def test_an_iterator_runs_ahead_of_who_looks_at_its_items() -> None:
    made: list[int] = []
    third = threading.Event()

    def count() -> Iterator[list[int]]:
        for i in range(1, 5):
            if i == 3:
                third.set()
            made.append(i)
            yield made[-1:]

    async with DeviceThread("ahead") as device, device.iterate(count(), on_leave=lambda: made.append(-1)) as items:
        assert await items.next() == [1]
        assert await items.next() == [2]
        await anyio.to_thread.run_sync(third.wait, 10)  # though nobody has asked for it
        assert [await items.next() for _ in range(3)] == [[3], [4], None]
    assert made == [1, 2, 3, 4], "who saw the end has not left early"


@pytest.mark.parametrize("why", ["error", "cancel", "return"])
async def test_who_leaves_an_iterator_early_asks_it_to_end_and_waits(why: str) -> None:
    asked, inside = threading.Event(), threading.Event()
    seen: list[str] = []

    def work() -> Iterator[str]:
        yield "first"
        inside.set()
        assert asked.wait(10)
        seen.append("worked")
        yield "second"

    def ask() -> None:
        seen.append("asked")
        asked.set()

    with anyio.CancelScope() as scope, suppress(ValueError):
        async with DeviceThread("leave") as device:
            async with device.iterate(work(), on_leave=ask) as items:
                assert await items.next() == "first"
                await anyio.to_thread.run_sync(inside.wait, 10)
                if why == "cancel":
                    scope.cancel()
                    await items.next()
                if why == "error":
                    raise ValueError("no use for it")
            seen.append("left")
    assert seen == ["asked", "worked"] + ["left"] * (why == "return")


async def test_an_iterator_that_fails_gives_what_came_before_and_then_its_error() -> None:
    def work() -> Iterator[int]:
        yield 1
        raise OSError("the device is gone")

    async with DeviceThread("fails") as device, device.iterate(work(), on_leave=lambda: None) as items:
        assert await items.next() == 1
        with pytest.raises(OSError, match="the device is gone"):
            await items.next()


async def test_close_ends_the_thread_and_may_come_twice() -> None:
    device = DeviceThread("close")
    assert await device.run(lambda: mx.array(1.0) + 1) == mx.array(2.0)
    assert len(threads("close")) == 1
    await device.close()
    await device.close()
    assert threads("close") == []
    with pytest.raises(RuntimeError, match="shutdown"):
        await device.run(lambda: 1)


async def test_leaving_closes_even_when_cancelled() -> None:
    with anyio.CancelScope() as scope:
        async with DeviceThread("leave") as device:
            await device.run(lambda: 1)
            scope.cancel()
    assert threads("leave") == []


def test_a_process_that_used_device_threads_exits_cleanly() -> None:
    program = """
        import troupe, anyio, mlx.core as mx
        from troupe.runtime.device import DeviceThread
        async def main():
            async with DeviceThread("a") as a, DeviceThread("b") as b:
                x = await a.run(lambda: mx.random.normal((64, 64), key=mx.random.key(0)) @ mx.ones((64, 64)))
                y = await b.run(lambda z: mx.sum(z), x)
                assert y.item() == mx.sum(x).item()
        anyio.run(main)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
