"""A process that guards itself, with a real guardian."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.kills import processes
from troupe.runtime import guarding
from troupe.runtime.guardian import Page
from troupe.runtime.guarding import Guard, under_way

pytestmark = pytest.mark.anyio


async def until(there: Callable[[], object], within_s: float = 30.0) -> None:
    with anyio.fail_after(within_s):
        while not there():  # noqa: ASYNC110 - of another process, and of another thread
            await anyio.sleep(0.02)


async def test_signals_are_received_and_everything_is_as_before_afterwards() -> None:
    def handler(*_: Any) -> None: ...

    before, hang_up = signal.signal(signal.SIGTERM, handler), signal.getsignal(signal.SIGHUP)
    try:
        with Guard() as guard:
            assert guard.unavailable is None
            with guard.received(signal.SIGTERM, signal.SIGHUP) as signals:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                    os.kill(os.getpid(), number)
                    assert await signals.receive() == number
            assert guard.page.turns()[3] == 3
            child = guard.child
            assert child is not None
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGHUP) == hang_up
        assert signal.set_wakeup_fd(-1) == -1
        assert child.returncode == 0, "it ends with who it guards"
        assert "troupe-pulse" not in {thread.name for thread in threading.enumerate()}
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_calls_under_way_are_on_the_page() -> None:
    with under_way("nobody guards", None):
        pass
    with Guard(signals=False) as guard:
        guard.writes_in(Path("/runs/kind"))
        with under_way("kind", until.__code__), under_way("judge", None, in_turns=True):
            judge, kind = guard.page.calls()
        assert (kind.name, kind.file, kind.function) == ("kind", __file__, "until")
        assert (kind.thread, kind.native) == (threading.get_ident(), threading.get_native_id())
        assert (judge.name, judge.thread) == ("judge", 0)
        assert guard.page.calls() == []
        assert guard.page.read("folder") == "/runs/kind"
    assert guarding._pages == []


FORK = """
import os, signal, anyio
from troupe.runtime import guarding  # without MLX, which does not bear a fork
from troupe.runtime.guarding import Guard

async def main():
    with Guard() as guard, guard.received(signal.SIGTERM):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(len(guarding._pages))
        code = os.waitpid(child, 0)[1]
        await anyio.sleep(0.02)
        print(code, guard.page.turns()[3])

anyio.run(main)
"""


def test_a_fork_s_signals_are_its_own() -> None:
    """Ctrl-C comes to a reward's forked workers too, and must not count twice."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert done.stdout == "0 0\n"


async def test_it_tells_that_it_turns() -> None:
    with Guard(signals=False) as guard:
        turned_s, pulsed_s, thread, _ = guard.page.turns()
        assert thread == threading.get_ident()
        await until(lambda: guard.page.turns()[0] > turned_s and guard.page.turns()[1] > pulsed_s)


async def test_a_guardian_that_is_killed_is_replaced_a_few_times() -> None:
    told: list[str] = []
    with Guard(signals=False, tell=told.append, tick_s=0.01) as guard:
        for _ in range(4):
            child = guard.child
            assert child is not None
            child.kill()
            await until(lambda child=child: guard.child is not child)  # type: ignore[misc]
        assert guard.child is None
    assert len(told) == 1
    assert told[0].startswith("note: the guardian beside this run has ended 4 times (exit code -9)")


async def test_without_a_guardian_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Guard() as guard:
        assert guard.unavailable is not None
        assert "there is no guardian beside this run" in guard.unavailable


async def test_shared_memory_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with Guard(signals=False) as guard, under_way("kind", None):
        assert [call.name for call in guard.page.calls()] == ["kind"]
        assert [call.name for call in Page(guard._memory).calls()] == ["kind"]


HUNG = """
import sys, threading, time, anyio
from troupe.runtime.guarding import Guard, under_way

def hang():
    with under_way("kind", hang.__code__):
        sys.setswitchinterval(1000)
        print("hangs", flush=True)
        {code}

async def main():
    with Guard({limit}) as guard:
        with guard.received(*({signals})) as signals:
            threading.Thread(target=hang, daemon=True).start() if {thread} else hang()
            await anyio.sleep(1000)

import signal
anyio.run(main)
"""
REGEX = "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"
ALL = "signal.SIGINT, signal.SIGTERM, signal.SIGHUP"


@contextmanager
def hung(code: str, folder: Path, *, thread: bool = True, limit: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A process that hangs already."""
    script = HUNG.format(code=code, thread=thread, limit=limit, signals=ALL)
    (folder / "hung.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, "hung.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hangs\n"
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("code", "thread", "does"),
    [
        pytest.param(REGEX, True, "holds Python's lock", id="regular expression"),
        pytest.param("10 ** 10 ** 9", True, "holds Python's lock", id="power"),
        pytest.param(REGEX, False, "holds Python's lock", id="in the loop's thread"),
        pytest.param("time.sleep(1000)", False, "keeps the event loop from turning", id="without the lock"),
    ],
)
def test_the_third_signal_ends_what_hangs_and_names_it(code: str, thread: bool, does: str, tmp_path: Path) -> None:
    with hung(code, tmp_path, thread=thread) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.2)
        began_s = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (out, err)
    assert time.monotonic() - began_s < 20
    assert "troupe: ended without saving (signal 3): the reward kind (hung.py:" in err
    assert does in err


@pytest.mark.slow
@pytest.mark.alone
def test_no_guardian_outlives_whom_it_guards(tmp_path: Path) -> None:
    with hung("time.sleep(1000)", tmp_path) as process:
        [guardian] = [line.split()[1] for line in processes() if line.split()[0] == str(process.pid)]
        process.kill()
        process.communicate(timeout=60)  # which it has the end of, too
    until_s = time.monotonic() + 10.0
    while any(line.split()[1] == guardian for line in processes()):
        assert time.monotonic() < until_s, guardian
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.alone
def test_a_silence_that_is_too_long_ends_it(tmp_path: Path) -> None:
    with hung(REGEX, tmp_path, limit=6.0) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "ended without saving (daemon.kill_after_s = 6): the reward kind (hung.py:" in err


@pytest.mark.slow
@pytest.mark.alone
def test_who_is_stopped_by_somebody_is_left_alone(tmp_path: Path) -> None:
    with hung("time.sleep(2)", tmp_path, limit=5.0) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(9.0)
        assert process.poll() is None
        if sys.platform == "linux":  # nothing waits for it either, such as a request for its stacks, which would move
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert not [line for line in status.splitlines() if re.match(r"(Shd|Sig)Pnd:\s.*[1-9a-f]", line)]
        process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert process.poll() is None
        process.kill()
        _, err = process.communicate(timeout=60)
    assert err == ""
