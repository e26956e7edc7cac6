"""Running code that nobody trusts to return, so that whoever waits for it can always go on.

A coroutine runs in a task of its own and a function in a daemon thread; both can be left behind. (anyio's worker
threads are no daemons: one that hangs would keep the whole process from ever ending.)
"""

import asyncio
import contextlib
import contextvars
import ctypes
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeGuard, TypeVar

import anyio

T = TypeVar("T")

GRACE_S = 1.0
"""That a cancelled coroutine may take to end before it is left behind."""


async def in_own_task(call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()` in a task of its own; what it returns or raises, a CancelledError included, comes through (but a
    GeneratorExit as a RuntimeError: as itself it would mean that the caller is being closed; and so a KeyboardInterrupt
    that no signal made).

    When the caller is cancelled, so is the task; one that ignores this is left behind after `GRACE_S`: its coroutine is
    closed, and where it ignores that too, never resumed.
    """
    shell = _Shell(call)
    task = asyncio.get_running_loop().create_task(shell)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            task.cancel()
            await asyncio.wait([task], timeout=GRACE_S)
            if not task.done():
                shell.leave()
                task.cancel()
                await asyncio.wait([task])
        raise
    if isinstance(shell.error, GeneratorExit) or is_own_interrupt(shell.error):
        raise as_failure(shell.error)
    if shell.error is not None:
        raise shell.error
    return shell.results[0]


class InPlace:
    """`with InPlace():` what runs in the body and would be taken for the end of who calls comes as a RuntimeError."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ends_caller = isinstance(error, (GeneratorExit, StopIteration, asyncio.CancelledError))
        if error is not None and (ends_caller or is_own_interrupt(error)):
            raise as_failure(error) from error


def as_failure(error: BaseException) -> RuntimeError:
    """An error of the code's own that must not come to others as itself, since it would mean something to them."""
    fault = RuntimeError(f"the called code raised {type(error).__name__}")
    fault.__cause__ = error
    return fault.with_traceback(error.__traceback__)


def is_own_interrupt(error: BaseException | None) -> TypeGuard[KeyboardInterrupt]:
    """Whether it is a KeyboardInterrupt that the code raised itself, as opposed to one that the user's Ctrl-C made."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    if threading.current_thread() is not threading.main_thread():
        return True  # no signal is delivered here
    return signal.getsignal(signal.SIGINT) is not signal.default_int_handler and not _may_be_asyncios(error)


class _Shell(Coroutine[Any, Any, None], Generic[T]):
    """Drives a coroutine for a task, and can stop doing so. Its error is kept: a SystemExit out of a task would end the
    event loop."""

    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        self._steps: Generator[Any, Any, T] | None = None
        self._left = False
        self.cr_await: Awaitable[T] | None = None
        self.results: list[T] = []
        self.error: BaseException | None = None

    def leave(self) -> None:
        """The next cancellation ends the task whatever the coroutine does."""
        self._left = True

    def send(self, value: None) -> Any:
        if self._steps is None:
            try:
                self.cr_await = self._call()
                self._steps = self.cr_await.__await__()
            except BaseException as error:
                self.error = error
                raise StopIteration from None
        try:
            return next(self._steps)
        except BaseException as error:
            self._end(error)
        raise StopIteration

    def throw(self, error: Any, *_: Any) -> Any:
        if self._steps is None:
            raise error
        try:
            if not self._left:
                return self._steps.throw(error)
            self.close()
            self.error = error
        except BaseException as raised:
            self._end(raised)
        raise StopIteration

    def close(self) -> None:
        if self.cr_await is not None:
            _close(self.cr_await)

    def _end(self, error: BaseException) -> None:
        if isinstance(error, StopIteration):
            self.results.append(error.value)
        else:
            self.error = error

    def __await__(self) -> Generator[Any, Any, None]:
        raise TypeError("a task drives it")


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> list[str]:
    """Cancel tasks and wait for them; after `GRACE_S` those that ignore it are left behind, so that the event loop ends
    without them → what these are, "NAME (FILE:LINE)"."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=GRACE_S)
    left = {task: _place_of(task) for task in tasks if not task.done()}
    if left and KNOWN_PYTHON:
        _forget(left)
    elif left:
        await _close_tasks(left)
    return list(left.values())


def _place_of(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    code = getattr(coroutine, "cr_code", None)
    name = getattr(coroutine, "__qualname__", None) or task.get_name()
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


async def _close_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Have tasks that ignore their cancellation end by closing what they run. Where that is ignored, too, the event
    loop will not end without them."""
    for task in tasks:
        _close(task.get_coro())
        task.cancel()
    done, _ = await asyncio.wait(tasks, timeout=GRACE_S)
    for task in done:
        if not task.cancelled():
            task.exception()  # of having been closed: asyncio need not tell of it


def _close(awaitable: object) -> None:
    frames = list(_chain(awaitable))
    try:
        if isinstance(awaitable, Coroutine):
            awaitable.close()
    except BaseException:  # one of them answers its end with an error, or ignores it
        _keep(frames)


def _chain(waiting: object) -> Iterator[object]:
    """What waits for what, from the outermost coroutine on."""
    while waiting is not None:
        yield waiting
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)


KNOWN_PYTHON = sys.implementation.name == "cpython" and sys.version_info < (3, 15)
"""Whether Python's insides are as the three functions below know them: nobody promises that they stay. With another
Python only what is public is used, by which less can be left behind."""

_KEPT: list[object] = []


def _keep(objects: Iterable[object]) -> None:
    """Never collect these, not even when the interpreter ends: they would be closed once more. (Another Python may do
    so, and say it on stderr.)"""
    for each in objects:
        if KNOWN_PYTHON:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
        else:
            _KEPT.append(each)


def _forget(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Have the event loop end without these tasks; who closes it would otherwise wait for them without end."""
    for task in tasks:
        asyncio._unregister_task(task)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        _keep(_chain(task.get_coro()))


def _may_be_asyncios(error: KeyboardInterrupt) -> bool:
    """Whether asyncio's handler of a second Ctrl-C has raised this. Another Python's may look like any."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return names[-1:] == ["_on_sigint"] or not KNOWN_PYTHON


class _ThreadCall:
    """Work for a thread, and the way back to who waits for it."""

    def __init__(
        self, work: Callable[[], Any], read: Callable[[Any], Any], within: AbstractContextManager[Any]
    ) -> None:
        self.work, self.read, self.within = work, read, within
        self.context = contextvars.copy_context()
        self.result: Any = None
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self._loop.create_future()

    def hand_over(self) -> None:
        """On the thread: give the result, or the error, to who waits."""
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return  # the event loop ended long before this abandoned call did

    def _deliver(self) -> None:
        if self.answer.done():  # cancelled meanwhile
            return
        if self.error is not None:
            self.answer.set_exception(self.error)
        else:
            self.answer.set_result(self.result)


class DaemonThreads:
    """Daemon threads that make calls, and are used again."""

    def __init__(self, idle_s: float = 30.0) -> None:
        """`idle_s`: after which a thread without work ends."""
        self.idle_s, self.lock = idle_s, threading.Lock()
        self.idle: list[_WorkerThread] = []

    def run(
        self,
        work: Callable[[], Any],
        read: Callable[[Any], Any] = lambda result: result,
        within: AbstractContextManager[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Run `work` in one that is idle or a new one, and there `read` what it returns, both of it `within` a context
        → the future of what was read.

        A cancelled call is left to itself: Python cannot stop a thread. Its thread ends with it and is never used
        again.
        """
        call = _ThreadCall(work, read, contextlib.nullcontext() if within is None else within)
        with self.lock:
            thread = self.idle.pop() if self.idle else None
        if thread is None:
            thread = _WorkerThread(self)
            thread.start()
        thread.calls.put(call)
        return call.answer

    def end_idle(self) -> None:
        """End the threads that wait for work; whoever has some later starts another."""
        with self.lock:
            ending, self.idle = self.idle, []
        for thread in ending:
            thread.calls.put(None)
        for thread in ending:
            thread.join()  # it does nothing but wait


class _WorkerThread(threading.Thread):
    """Makes one call after the other; idle in between, and at an end when it has been so for long."""

    def __init__(self, threads: DaemonThreads) -> None:
        super().__init__(name="troupe call", daemon=True)
        self._threads = threads
        self.calls: queue.SimpleQueue[_ThreadCall | None] = queue.SimpleQueue()

    def run(self) -> None:
        while (call := self._next()) is not None:
            try:
                with call.within:
                    call.result = call.context.run(call.read, call.context.run(call.work))
            except (KeyboardInterrupt, StopIteration, GeneratorExit, asyncio.CancelledError) as error:
                # No signal reaches this thread, so it is the code's own interrupt; no future carries a StopIteration;
                # and the others would mean that who waits is to end.
                call.error = as_failure(error)
            except BaseException as error:
                call.error = error
            if call.answer.cancelled():
                call.hand_over()
                return
            with self._threads.lock:
                self._threads.idle.append(self)
            call.hand_over()
            del call  # holds what the code was given

    def _next(self) -> _ThreadCall | None:
        try:
            return self.calls.get(timeout=self._threads.idle_s)
        except queue.Empty:
            with self._threads.lock:
                if self in self._threads.idle:
                    self._threads.idle.remove(self)
                    return None
        return self.calls.get()  # somebody has just taken it up


THREADS = DaemonThreads()
in_daemon_thread = THREADS.run
