"""Noticing what reward code asks for that it may not have in the process that trains, and refusing what would harm it.

That process computes in threads. A fork there stops OpenBLAS's threads under a product that is being computed, which
then never ends; `signal` and `asyncio.get_event_loop` want the main thread, where rewards do not run; `os._exit` and
`os.exec…` would end the run as if all were well, and an alarm without a handler would kill it. All of these work in a
process of its own. Code may hide that it was refused (`except Exception`), so each `Watch` remembers it, and who made
the call looks there, whatever the call came to.

Watched is what runs in a context that a `Watch` was entered in, in tasks begun there, and in threads started there.
Everybody else's calls go through as ever.
"""

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
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from troupe.rewards.faults import is_library, place_in

_OF_MAIN_THREAD = ("signal", "alarm", "setitimer", "set_wakeup_fd")
"""Functions of the module `signal` that want the main thread, or act on the whole process."""
_FORKS = {"os.fork": "os.fork()", "os.forkpty": "os.forkpty()"}
_IDLE_ANSWERS: dict[str, Any] = {"alarm": 0, "setitimer": (0.0, 0.0), "set_wakeup_fd": -1}
_FORKS_OF_C = frozenset({"fork", "vfork", "forkpty"})
_EVENTS = frozenset({*_FORKS, "subprocess.Popen", "os.exec", "ctypes.dlsym"})


class RefusedHere(RuntimeError):  # noqa: N818 - it says what happened
    """Reward code asked for what it may not have in this process."""


class Watch:
    """What the code of one reward has asked for."""

    def __init__(self, *, is_loading: bool = False) -> None:
        """`is_loading`: the code is loaded, and not called yet. What wants the main thread does nothing then."""
        self.is_loading = is_loading
        self.remedy = "" if is_loading else '; the reward needs rewards.run = ["process"]'
        self.refused = "while a reward is loaded" if is_loading else "in the process that trains"
        self.found: str | None = None
        """What it asked for first that needs a process of its own, and where: "os.fork() (rewards.py:3)"."""
        self.refuses_forks = False
        """Whether a fork is refused: something may be computed at the same time."""
        self.is_loaded = False
        """Whether what was to be loaded is, so that threads of it do what they do beside a run."""

    @property
    def may_fork(self) -> bool:
        """Whether a fork does no harm now."""
        return not self.refuses_forks and not (self.is_loaded and _RUNS)

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
_RUNS: list[object] = []
"""Who has rewards started."""
_FOUND_IN: dict[str, str] = {}
_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("troupe reward watch", default=None)
_THREADS: weakref.WeakKeyDictionary[threading.Thread, Watch] = weakref.WeakKeyDictionary()
"""Threads that watched code has started."""


def begins(run: object) -> None:
    """Rewards are at work from now on, until `ends`: something may be computed."""
    _RUNS.append(run)


def ends(run: object) -> None:
    """The same `run` as begun; safe to call for one that has not."""
    _RUNS[:] = [each for each in _RUNS if each is not run]


def remember(module: str) -> None:
    """What was found while a module was loaded holds for all that is in it."""
    watch = _WATCH.get()
    if watch is not None and watch.found is not None:
        _FOUND_IN[module] = watch.found


def found_in(module: str | None) -> str | None:
    """What was found when the module was loaded."""
    return None if module is None else _FOUND_IN.get(module)


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
    return RefusedHere(f"{watch.note(what)} is refused {watch.refused}{watch.remedy}")


def _audit(
    event: str, args: tuple[Any, ...], events: frozenset[str] = _EVENTS, of_c: frozenset[str] = _FORKS_OF_C
) -> None:
    """Python's own note of what is about to happen; raising keeps it from happening.

    `events` and `of_c` are its own: it is called until the interpreter has ended, when a module's names are no more.
    """
    if event not in events:  # there are many, and this is called for each
        return
    if event in _FORKS:
        watch = _current()
        if watch is not None and not watch.may_fork and os.getpid() == _PID:
            raise _refuse(watch, _FORKS[event])
    elif event == "subprocess.Popen":
        watch = _current()
        if watch is not None and not watch.may_fork and (given := _forcing_a_fork()) is not None:
            raise _refuse(watch, f"a subprocess with {given}")
    elif event == "ctypes.dlsym":  # Python is not told of the call, but of the look-up before it
        name = next((each for each in args if isinstance(each, str)), "")  # first or last, by the kind of look-up
        if name in of_c and (watch := _current()) is not None and os.getpid() == _PID:
            if not watch.may_fork:
                raise _refuse(watch, f"{name}() by ctypes")
            watch.note(f"{name}() by ctypes")
    elif event == "os.exec" and (watch := _current()) is not None and os.getpid() == _PID:
        raise _refuse(watch, "os.exec…()")


def _forcing_a_fork() -> str | None:
    """Which argument has `subprocess.Popen`, who is calling, fork instead of spawn."""
    here = sys._getframe(2).f_locals
    return next((name for name in ("preexec_fn", "uid", "gid", "gids") if here.get(name) is not None), None)


def _wrapped_signal(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        watch = _in_thread()
        if watch is None:
            return original(*args, **kwargs)
        if watch.is_loading and not is_library(sys._getframe(1).f_code.co_filename):
            watch.note(f"signal.{name}()")
            return signal.getsignal(args[0]) if name == "signal" else _IDLE_ANSWERS[name]
        raise ValueError(
            f"{watch.note(f'signal.{name}()')} was called in a thread, and signals only work in the main thread"
            f"{watch.remedy}"
        )

    return wrapper


def _wrapped_get_event_loop(original: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(original)
    def get_event_loop() -> Any:
        try:
            return original()
        except RuntimeError:
            watch = _in_thread()
            if watch is None:
                raise
            watch.note("asyncio.get_event_loop()")
            if not watch.is_loading:
                raise
            return asyncio.new_event_loop()  # what is loaded here is called elsewhere

    return get_event_loop


def _wrapped_policy(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What `ensure_future`, `gather` and their like ask for a loop, past `asyncio.get_event_loop`."""

    @functools.wraps(original)
    def get_event_loop(self: Any) -> Any:
        try:
            return original(self)
        except RuntimeError:
            watch = _in_thread()
            if watch is not None:
                watch.note("asyncio.get_event_loop()")
            raise

    return get_event_loop


def _loop_policy() -> type:
    """The class that answers for all policies which do not do so themselves."""
    return next(each for each in type(_policy()).__mro__ if "get_event_loop" in vars(each))


def _policy() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.14 on
        return asyncio.get_event_loop_policy()


def _in_thread() -> Watch | None:
    """Who watches the call at work, where it is in another thread than the main one. (A thread that it has started
    is not in the main one in a process of its own either.)"""
    watch = _WATCH.get()
    return None if threading.current_thread() is threading.main_thread() or os.getpid() != _PID else watch


def _wrapped_start(original: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        watch = _current()
        if watch is not None:
            _THREADS[self] = watch
        original(self)

    return start


def _wrapped_exit(original: Callable[[int], Any]) -> Callable[[int], Any]:
    @functools.wraps(original)
    def _exit(status: int) -> Any:
        watch = _current()
        if watch is not None and os.getpid() == _PID:
            raise _refuse(watch, f"os._exit({status})")
        return original(status)

    return _exit


def loading_watch() -> Watch:
    """Who watches the code at work if it is one that is there for loading, or else a new one."""
    watch = _WATCH.get()
    return watch if watch is not None and watch.is_loading else Watch(is_loading=True)


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
        _replace(_loop_policy(), "get_event_loop", _wrapped_policy)
        _replace(os, "_exit", _wrapped_exit)
        _replace(threading.Thread, "start", _wrapped_start)


def leave_alone() -> None:
    """This process is a reward's own: nothing in it is to be noticed. Before `install`."""
    global _PID
    with _LOCK:
        _PID = 0


def _replace(module: ModuleType | type, name: str, wrapped: Callable[[Any], Any]) -> None:
    setattr(module, name, wrapped(getattr(module, name)))
