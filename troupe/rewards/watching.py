"""Noticing what reward code asks for that it may not have in the process that trains, and refusing what would harm it.

That process computes in threads. A fork there stops OpenBLAS's threads under a product that is being computed, which
then never ends; `signal` and `asyncio.get_event_loop` want the main thread, where rewards do not run; `os._exit` and
`os.exec…` would end the run as if all were well, and an alarm without a handler would kill it. All of these work in a
process of its own. Code may hide that it was refused (`except Exception`), so each `Watch` remembers it, and who made
the call looks there, whatever the call came to.

Watched is what runs in a context that a `Watch` was entered in, in tasks begun there, and in threads started there.
Everybody else's calls go through as ever. Knows nothing of rewards.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import contextlib
import contextvars
import functools
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from troupe.rewards.causes import place_in

_OF_MAIN_THREAD = ("signal", "alarm", "setitimer", "set_wakeup_fd")
"""Functions of the module `signal` that want the main thread, or act on the whole process."""
_FORKS = {"os.fork": "os.fork()", "os.forkpty": "os.forkpty()"}
_THREAD_STARTS = {"_thread.start_new_thread", "_thread.start_joinable_thread"}
_EVENTS = {*_FORKS, *_THREAD_STARTS, "subprocess.Popen", "os.exec"}


class RefusedHere(RuntimeError):  # noqa: N818 - it says what happened
    """Reward code asked for what it may not have in this process."""


class Watch:
    """What the code of one reward has asked for."""

    def __init__(self) -> None:
        self.found: str | None = None
        """What it asked for first that needs a process of its own, and where: "os.fork() (rewards.py:3)"."""
        self.refuses_forks = False
        """Whether a fork is refused: something may be computed at the same time."""

    def note(self, what: str) -> str:
        """Remember that it was asked for by the code at work → what and where."""
        place = place_in(sys._getframe(1))
        said = f"{what} ({place})" if place else what
        self.found = self.found or said
        return said

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs in the body."""
        install()
        token = _WATCH.set(self)
        try:
            yield
        finally:
            _WATCH.reset(token)


_LOCK = threading.Lock()
_PID: int | None = None
"""Of the process that notices, and not of one that was forked from it."""
_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("troupe reward watch", default=None)
_THREADS: weakref.WeakKeyDictionary[threading.Thread, Watch] = weakref.WeakKeyDictionary()
"""Threads that watched code has started."""


def tasks_of(watch: Watch) -> list[asyncio.Task[Any]]:
    """The tasks of the running loop that watched code began and that have not ended."""
    here = asyncio.current_task()
    return [task for task in asyncio.all_tasks() if task is not here and _is_in(watch, task)]


def _is_in(watch: Watch, task: asyncio.Task[Any]) -> bool:
    # Task.get_context() came with Python 3.12
    contexts = [each for each in gc.get_referents(task) if isinstance(each, contextvars.Context)]
    return any(context.get(_WATCH) is watch for context in contexts)


def _current() -> Watch | None:
    return _WATCH.get() or _THREADS.get(threading.current_thread())


def _refuse(watch: Watch, what: str) -> RefusedHere:
    return RefusedHere(
        f'{watch.note(what)} is refused in the process that trains; the reward needs rewards.run = ["process"]'
    )


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Python's own note of what is about to happen; raising keeps it from happening."""
    if event not in _EVENTS:  # there are many, and this is called for each
        return
    if event in _THREAD_STARTS:
        watch = _current()
        thread = getattr(args[0], "__self__", None)
        if watch is not None and isinstance(thread, threading.Thread):
            _THREADS[thread] = watch
    elif event in _FORKS:
        watch = _current()
        if watch is not None and watch.refuses_forks:
            raise _refuse(watch, _FORKS[event])
    elif event == "subprocess.Popen":
        watch = _current()
        if watch is not None and watch.refuses_forks and (given := _forcing_a_fork()) is not None:
            raise _refuse(watch, f"a subprocess with {given}")
    elif event == "os.exec" and (watch := _current()) is not None and os.getpid() == _PID:
        raise _refuse(watch, "os.exec…()")


def _forcing_a_fork() -> str | None:
    """Which argument has `subprocess.Popen`, who is calling, fork instead of spawn."""
    here = sys._getframe(2).f_locals
    return next((name for name in ("preexec_fn", "uid", "gid", "gids") if here.get(name) is not None), None)


def _wrapped_signal(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        watch = _current()
        if watch is not None and threading.current_thread() is not threading.main_thread() and os.getpid() == _PID:
            raise ValueError(
                f"{watch.note(f'signal.{name}()')} was called in a thread, and signals only work in the main thread; "
                'the reward needs rewards.run = ["process"]'
            )
        return original(*args, **kwargs)

    return wrapper


def _wrapped_get_event_loop(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(original)
    def get_event_loop() -> Any:
        try:
            return original()
        except RuntimeError:
            watch = _current()
            if watch is not None and threading.current_thread() is not threading.main_thread():
                watch.note("asyncio.get_event_loop()")
            raise

    return get_event_loop


def _wrapped_exit(original: Callable[[int], Any]) -> Callable[[int], Any]:
    @functools.wraps(original)
    def _exit(status: int) -> Any:
        watch = _current()
        if watch is not None and os.getpid() == _PID:
            raise _refuse(watch, f"os._exit({status})")
        return original(status)

    return _exit


def watched_as(watch: Watch) -> Watch:
    """Who watches the code at work already, or else this one."""
    return _current() or watch


def install() -> None:
    """Begin to notice, once in a process; what is noticed of code that is not watched has no effect."""
    global _PID
    with _LOCK:
        if _PID is not None:
            return
        _PID = os.getpid()
        sys.addaudithook(_audit)
        for name in _OF_MAIN_THREAD:
            _replace(signal, name, functools.partial(_wrapped_signal, name))
        for module in (asyncio, asyncio.events):
            _replace(module, "get_event_loop", _wrapped_get_event_loop)
        _replace(os, "_exit", _wrapped_exit)


def _replace(module: ModuleType, name: str, wrapped: Callable[[Any], Any]) -> None:
    setattr(module, name, wrapped(getattr(module, name)))
