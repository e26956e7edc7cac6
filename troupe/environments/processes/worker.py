"""The child's side of environments in a process: load what a section names, then carry out one order after the other.

`python -m troupe.environments.processes.worker`. Code that is not async has the main thread to itself, without an event
loop that runs, as in a program of its own; async code has an event loop in another thread, which turns all the time.
What is printed goes to stderr.
"""

import asyncio
import inspect
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

from troupe.environments.convention import World
from troupe.environments.live import Deed, Raised, awaited, is_async, read
from troupe.environments.loading import load_world
from troupe.environments.processes.wire import Broken, Do, Done, Leave, Load, Order, Take, Threw, decode_order
from troupe.errors import InputError, sayable
from troupe.rewards.watching import leave_alone
from troupe.runtime.frames import Wire, encode
from troupe.runtime.process import serve_plainly


def carry_out(wire: Wire) -> None:
    """Carry out orders until the parent has no more."""
    leave_alone()
    frame = wire.receive()
    if frame is None:
        return
    order = decode_order(frame)
    assert isinstance(order, Load), order
    try:
        desk = Desk(load_world(order.config))
    except InputError as error:
        wire.send(encode(Broken(sayable(str(error)))))
        return
    wire.send(encode(Done()))
    while (frame := wire.receive()) is not None:
        try:
            reply: Done | Threw = Done(desk.carry_out(decode_order(frame)))
        except BaseException as error:  # a SystemExit is the code's own failure
            raised = Raised.by(error)
            reply = Threw(raised.text, raised.told, raised.passing)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # an alarm that it has left would end the wait for the next order
        wire.send(encode(reply))
    desk.close()


class Desk:
    """The instances of a process, by number."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._taken: dict[int, tuple[str, Any]] = {}
        self._idle: dict[str, list[Any]] = defaultdict(list)
        self._probes = dict(world.probes)

    def carry_out(self, order: Order) -> bytes:
        """What came of it, as msgpack. Whatever the code raises."""
        match order:
            case Take(number, environment, new):
                self._taken[number] = environment, self._instance(environment, new)
            case Do(number=None, deed=deed):
                function = self._world.function(deed.name)
                assert function is not None, deed.name
                return self._result(deed, deed.name, deed.called(function))
            case Do(number=int(number), deed=deed):
                environment, instance = self._taken[number]
                if deed.what == "call" and self._world.environments[environment].tool(deed.name) is None:
                    raise ValueError(f"{deed.name!r} is no tool of {self._label(environment)}")
                return self._result(deed, self._label(environment), deed.called(instance))
            case Leave(number, again):
                environment, instance = self._taken.pop(number)
                if again and getattr(instance, "reuse", True):
                    self._idle[environment].append(instance)
                elif self._world.environments[environment].has_close:
                    self._result(Deed(what="close"), "", instance.close)
        return b""

    def close(self) -> None:
        """Close all that is there, as far as that can be done."""
        there = [*self._taken.values(), *self._probes.items()]
        there += [(environment, instance) for environment, idle in self._idle.items() for instance in idle]
        for environment, instance in there:
            if self._world.environments[environment].has_close:
                with suppress(BaseException):
                    self._result(Deed(what="close"), "", instance.close)

    def _instance(self, environment: str, new: bool) -> Any:
        if self._idle[environment] and not new:
            return self._idle[environment].pop()
        if environment in self._probes:
            return self._probes.pop(environment)
        return self._world.factories[environment]()

    def _label(self, environment: str) -> str:
        return self._world.environments[environment].label

    def _result(self, deed: Deed, label: str, call: Callable[[], Any]) -> bytes:
        result = self._waited_for(call) if is_async(call) else call()
        if inspect.isawaitable(result):
            result = self._waited_for(partial(awaited, result))
        return read(deed, label, result)

    def _waited_for(self, call: Callable[[], Any]) -> Any:
        async def kept() -> tuple[Any, BaseException | None]:
            try:
                return await call(), None
            except BaseException as error:  # a SystemExit would end the event loop
                return None, error

        result, error = asyncio.run_coroutine_threadsafe(kept(), self._loop).result()
        if error is not None:
            raise error
        return result

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="troupe-async", daemon=True).start()
        return loop


if __name__ == "__main__":
    serve_plainly(carry_out)
