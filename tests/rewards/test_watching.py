"""What reward code may not have in the process that trains: noticed, refused, and nobody else's affair."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
import pytest

from troupe.rewards.watching import RefusedHere, Watch, begins, ends, tasks_of


@pytest.fixture
def watch() -> Watch:
    watch = Watch()
    watch.refuses_forks = True
    return watch


def in_thread(code: Callable[[], Any]) -> Any:
    """Run it in a thread, in this context."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(code())
        except BaseException as error:
            outcome.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,))
    thread.start()
    thread.join(30)
    return outcome[0]


def spawned_with_preexec() -> None:
    subprocess.run([sys.executable, "-c", ""], preexec_fn=lambda: None, check=True)


def spawned_as_another() -> None:
    subprocess.run([sys.executable, "-c", ""], user=os.getuid(), check=True)


REFUSED: dict[str, Callable[[], object]] = {
    "os.fork()": os.fork,
    "os.forkpty()": pty.fork,
    "a subprocess with preexec_fn": spawned_with_preexec,
    "a subprocess with uid": spawned_as_another,
    "os._exit(0)": lambda: os._exit(0),
    "os.exec…()": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_would_harm_the_process_is_refused_and_remembered(watch: Watch, what: str, hidden: bool) -> None:
    with watch.watching(), suppress(Exception) if hidden else pytest.raises(RefusedHere, match=r"rewards\.run"):
        REFUSED[what]()
    assert watch.found is not None
    assert watch.found.startswith(f"{what} ({__file__}:")


@pytest.mark.parametrize("what", ["os.fork()", "os._exit(0)"])
def test_so_it_is_in_threads_that_the_code_starts(watch: Watch, what: str) -> None:
    with watch.watching(), ThreadPoolExecutor(1) as threads:
        assert isinstance(threads.submit(REFUSED[what]).exception(30), RefusedHere)
    assert watch.found is not None


def test_a_plain_subprocess_is_nobodys_harm(watch: Watch) -> None:
    with watch.watching():
        assert in_thread(lambda: subprocess.run([sys.executable, "-c", ""], check=True).returncode) == 0
    assert watch.found is None


def test_a_fork_is_refused_only_where_something_may_be_computed() -> None:
    watch = Watch()
    with watch.watching():
        pid = os.fork()
        if pid == 0:
            os._exit(0)  # in the child it is what it is for
        assert os.waitpid(pid, 0)[1] == 0
    assert watch.found is None


def test_threads_of_a_file_that_was_loaded_may_not_fork_beside_a_run() -> None:
    watch, go = Watch(is_loading=True), threading.Event()

    def later() -> object:
        go.wait(30)
        return os.fork()

    with ThreadPoolExecutor(1) as threads:
        with watch.watching():
            error = threads.submit(later)
        watch.is_loaded = True
        begins(watch)
        go.set()
        assert isinstance(error.exception(30), RefusedHere)
        ends(watch)
    assert watch.may_fork


WANT_MAIN_THREAD: dict[str, Callable[[], object]] = {
    "signal.signal()": lambda: signal.signal(signal.SIGALRM, signal.SIG_DFL),
    "signal.alarm()": lambda: signal.alarm(0),
    "signal.setitimer()": lambda: signal.setitimer(signal.ITIMER_REAL, 0),
    "signal.set_wakeup_fd()": lambda: signal.set_wakeup_fd(-1),
    "asyncio.get_event_loop()": lambda: asyncio.get_event_loop(),
}


def with_coroutine(ask: Callable[[Any], object]) -> object:
    async def nothing() -> None: ...

    coroutine = nothing()
    try:
        return ask(coroutine)
    finally:
        coroutine.close()


ASK_FOR_A_LOOP: dict[str, Callable[[], object]] = {
    "a policy": lambda: asyncio.get_event_loop_policy().get_event_loop(),
    "ensure_future": lambda: with_coroutine(asyncio.ensure_future),
    "gather": lambda: with_coroutine(asyncio.gather),
}


@pytest.mark.parametrize("way", ASK_FOR_A_LOOP)
def test_a_loop_that_is_asked_for_in_another_way_is_noticed_too(watch: Watch, way: str) -> None:
    with watch.watching():
        assert isinstance(in_thread(ASK_FOR_A_LOOP[way]), RuntimeError)
    assert watch.found is not None
    assert watch.found.startswith(f"asyncio.get_event_loop() ({__file__}:")


@pytest.mark.parametrize("what", WANT_MAIN_THREAD)
def test_what_wants_the_main_thread_is_noticed_in_another_one(watch: Watch, what: str) -> None:
    def hides() -> object:
        with suppress(Exception):
            WANT_MAIN_THREAD[what]()
        return "hidden"

    with watch.watching():
        assert in_thread(hides) == "hidden"
    assert watch.found is not None
    assert watch.found.startswith(f"{what} ({__file__}:")
    with watch.watching():
        error = in_thread(WANT_MAIN_THREAD[what])
    assert isinstance(error, RuntimeError if "asyncio" in what else ValueError)


@pytest.mark.parametrize("what", ["signal.signal()", "signal.alarm()", "signal.setitimer()"])
def test_on_the_main_thread_it_is_as_ever(watch: Watch, what: str) -> None:
    with watch.watching():
        WANT_MAIN_THREAD[what]()
    assert watch.found is None


def test_a_thread_of_the_codes_own_is_not_the_main_one_in_a_process_either(watch: Watch) -> None:
    with watch.watching(), ThreadPoolExecutor(1) as threads:
        assert isinstance(threads.submit(WANT_MAIN_THREAD["signal.signal()"]).exception(30), ValueError)
    assert watch.found is None


def test_code_that_is_not_watched_is_left_alone(watch: Watch) -> None:
    with watch.watching():
        pass
    assert in_thread(WANT_MAIN_THREAD["signal.alarm()"]) == 0
    assert "main thread of the main interpreter" in str(in_thread(WANT_MAIN_THREAD["signal.signal()"]))
    assert watch.found is None


AT_THE_END = """
import os, troupe.rewards.watching as watching

class Late:
    def __del__(self, read=open):
        read("/dev/null").close()

watching.install()
os.late = watching.late = Late()
"""


def test_nothing_is_in_the_way_of_an_interpreter_that_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_a_file_that_is_loaded_in_a_thread_may_prepare_what_wants_the_main_one() -> None:
    watch = Watch(is_loading=True)
    before = signal.getsignal(signal.SIGALRM)
    with watch.watching():
        assert in_thread(lambda: signal.signal(signal.SIGALRM, lambda *_: None)) == before
        assert in_thread(lambda: signal.setitimer(signal.ITIMER_REAL, 3)) == (0.0, 0.0)
        loop = in_thread(asyncio.get_event_loop)
    loop.close()
    assert signal.getsignal(signal.SIGALRM) == before
    assert watch.found is not None
    assert watch.found.startswith("signal.signal()")


@pytest.mark.anyio
async def test_tasks_of_the_code_are_told_from_others(watch: Watch) -> None:
    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(anyio.sleep_forever())

    other = await begin()
    with watch.watching():
        own = await begin()
    assert tasks_of(watch) == [own]
    for task in (own, other):
        task.cancel()


@pytest.fixture(autouse=True)
def no_alarm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def test_a_fork_of_c_is_refused_where_it_is_looked_up(watch: Watch) -> None:
    watch.refuses_forks = True
    with watch.watching(), pytest.raises(RefusedHere, match=r"fork\(\) by ctypes"):
        ctypes.CDLL(None).fork  # noqa: B018 - looking it up is enough
    assert watch.found is not None
    loading = Watch(is_loading=True)
    with loading.watching():
        assert ctypes.CDLL(None).fork
    assert loading.found is not None
    assert ctypes.CDLL(None).fork
