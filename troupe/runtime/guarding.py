"""A trainer's side of its guardian: the page that both share, the pulse, the signals, and the calls under way.

`with Guard(...)` in the event loop of a program's main thread. What the guardian does is in `guardian.py`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from troupe.runtime import guardian
from troupe.runtime.guardian import (
    CALL,
    CALL_BYTES,
    CALLS,
    CALLS_AT,
    HEAD,
    STACKS_S,
    STACKS_SIGNAL,
    TEXTS,
    TICK_S,
    Call,
    Page,
)

_RESTARTS = 3
"""Guardians that may end before no other is started."""
_END_S = 2.0
"""That a guardian may take to end."""
_WAKES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WrittenPage(Page):
    """The page, as the trainer writes it: that never waits."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._free = list(range(CALLS))

    def tell(self, turned_s: float, pulsed_s: float, loop_thread: int, heeded: int) -> None:
        """Write down what `turns` reads."""
        HEAD.pack_into(self.memory, 0, turned_s, pulsed_s, loop_thread, heeded)

    def write(self, what: str, text: str) -> None:
        """Keep a text of those in TEXTS. One that is too long is left out."""
        start, room = TEXTS[what]
        data = text.encode(errors="surrogateescape")
        if len(data) <= room - 4:
            struct.pack_into("<I", self.memory, start, 0)
            self.memory[start + 4 : start + 4 + len(data)] = data
            struct.pack_into("<I", self.memory, start, len(data))

    def begin(self, call: Call) -> int | None:
        """Note a call → its place; None where all places are taken."""
        try:
            place = self._free.pop()
        except IndexError:
            return None
        start = CALLS_AT + place * CALL_BYTES
        text = "\0".join((call.name[:80], call.function[:80], call.file)).encode(errors="replace")
        text = text[: CALL_BYTES - CALL.size - 1] + b"\0"
        self.memory[start + CALL.size : start + CALL.size + len(text)] = text
        CALL.pack_into(self.memory, start, 1, call.since_s, call.thread, call.native)
        return place

    def end(self, place: int | None) -> None:
        """The call is over."""
        if place is not None:
            self.memory[CALLS_AT + place * CALL_BYTES] = 0
            self._free.append(place)


_pages: list[WrittenPage] = []
"""The page of who guards this process: the lock is the process's, too."""


@contextmanager
def under_way(name: str, code: CodeType | None, *, in_turns: bool = False) -> Iterator[None]:
    """Have the guardian know that a call of user code named `name` is under way in this thread; `in_turns`: in the
    event loop, with others. Where nobody guards, nothing happens."""
    if not _pages:
        yield
        return
    page = _pages[-1]
    thread, native = (0, 0) if in_turns else (threading.get_ident(), threading.get_native_id())
    file, function = ("", "") if code is None else (code.co_filename, code.co_name)
    place = page.begin(Call(time.monotonic(), thread, native, name, file, function))
    try:
        yield
    finally:
        page.end(place)


class Guard:
    """Keeps a guardian beside this process: `with Guard(limit_s) as guard`, in the event loop.

    While it is entered the guardian names who keeps the event loop from turning, ends the process at the third signal
    that is not heeded, and after `limit_s` seconds (0: never). Where no guardian can be started, `unavailable` says
    why; one that ends is replaced, a few times.
    """

    def __init__(
        self,
        limit_s: float = 0.0,
        *,
        signals: bool = True,
        tell: Callable[[str], None] | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        """`signals`: whether this process heeds them by `received`; to be entered in the main thread, then. `tell` is
        given a sentence when the guardian is gone for good; called from another thread."""
        self.unavailable: str | None = None
        self._limit_s, self._with_signals, self._tell, self._tick_s = limit_s, signals, tell, tick_s
        self._turned_s = self._pulsed_s = time.monotonic()
        self._heeded = self._starts = 0
        self._numbers: frozenset[int] = frozenset()
        self._sender: MemoryObjectSendStream[int] | None = None
        self._over = threading.Event()
        self.child: subprocess.Popen[bytes] | None = None
        self._signals: socket.socket | None = None
        self._stack = ExitStack()
        self.page: WrittenPage
        self._memory = self._stacks = -1
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle

    def __enter__(self) -> Guard:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        with ExitStack() as stack:
            self._memory = _shared(stack, b"\0" * Page.BYTES)
            self._stacks = _shared(stack, b"")
            self.page = WrittenPage(self._memory)
            self._turn()
            stack.callback(lambda: self._timer.cancel())
            if self._with_signals:
                self._wire_signals(stack)
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            stack.callback(faulthandler.unregister, STACKS_SIGNAL)
            _pages.append(self.page)
            stack.callback(_pages.remove, self.page)
            self._start()
            stack.callback(self._end)
            pulse = threading.Thread(target=self._pulse, name="troupe-pulse", daemon=True)
            pulse.start()
            stack.callback(pulse.join)
            stack.callback(self._over.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def writes_in(self, folder: Path) -> None:
        """The run folder, where the guardian tells why the run does not answer."""
        self.page.write("folder", str(folder))

    @contextmanager
    def received(self, *numbers: signal.Signals) -> Iterator[MemoryObjectReceiveStream[int]]:
        """The signals that come, instead of what they would do."""
        self._sender, receiver = anyio.create_memory_object_stream[int](64)
        self._numbers = frozenset(numbers)
        before = {number: signal.signal(number, _ignore) for number in numbers}
        for number in numbers:
            signal.siginterrupt(number, False)
        try:
            with self._sender, receiver:
                yield receiver
        finally:
            self._numbers = frozenset()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _wire_signals(self, stack: ExitStack) -> None:
        """Python's own handler of signals, which needs no lock, writes their numbers into a socket; what was not read
        from it is what the guardian looks at."""
        self._signals, wakes = socket.socketpair()
        stack.callback(self._signals.close)
        stack.callback(wakes.close)
        for end in (self._signals, wakes):
            end.setblocking(False)
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, before)
        self._loop.add_reader(self._signals, self._hear)
        stack.callback(self._loop.remove_reader, self._signals)

    def _hear(self) -> None:
        assert self._signals is not None
        with suppress(BlockingIOError):
            for number in self._signals.recv(64):
                self._heeded += number in _WAKES
                if number in self._numbers and self._sender is not None:
                    with suppress(anyio.WouldBlock):
                        self._sender.send_nowait(number)
        self._write()

    def _turn(self) -> None:
        """On the event loop, again and again."""
        self._turned_s = time.monotonic()
        self._write()
        self._timer = self._loop.call_later(self._tick_s, self._turn)

    def _write(self) -> None:
        self.page.tell(self._turned_s, self._pulsed_s, self._thread, self._heeded)

    def _pulse(self) -> None:
        """In a thread: that threads can run, and which there are."""
        written_s = 0.0
        while not self._over.wait(self._tick_s):
            self._pulsed_s = now_s = time.monotonic()
            self._write()
            threads = {thread.ident: thread.native_id for thread in threading.enumerate() if thread.ident}
            self.page.write("threads", json.dumps(threads))
            if now_s - self._turned_s > STACKS_S and self._turned_s > written_s:
                written_s = now_s
                os.ftruncate(self._stacks, 0)
                os.lseek(self._stacks, 0, os.SEEK_SET)
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            if self.child is not None and self.child.poll() is not None:
                self._replace()

    def _start(self) -> None:
        self._starts += 1
        signals = -1 if self._signals is None else self._signals.fileno()
        ends = [end for end in (self._memory, self._stacks, signals) if end >= 0]
        arguments = [os.getpid(), self._memory, self._stacks, signals, self._limit_s]
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, *map(str, arguments)],
                stdin=subprocess.PIPE,  # its end tells the guardian that we are gone
                stdout=subprocess.DEVNULL,
                pass_fds=ends,
            )
        except (OSError, ValueError) as error:
            self.child = None
            self.unavailable = (
                f"there is no guardian beside this run ({error}): a call that holds Python's lock will keep signals "
                "from being heeded"
            )

    def _replace(self) -> None:
        assert self.child is not None
        code = self.child.returncode
        _close(self.child)
        if self._starts <= _RESTARTS:
            self._start()
        else:
            self.child = None
            self.unavailable = (
                f"the guardian beside this run has ended {self._starts} times (exit code {code}) and is not started "
                "again: a call that holds Python's lock will keep signals from being heeded"
            )
        if self.child is None and self._tell is not None:
            self._tell(f"note: {self.unavailable}")

    def _end(self) -> None:
        if self.child is not None:
            _close(self.child)


def _close(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _shared(stack: ExitStack, content: bytes) -> int:
    """The descriptor of a file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("troupe")
        stack.callback(os.close, descriptor)
        os.write(descriptor, content)
        return descriptor
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        descriptor = os.dup(file.fileno())
    stack.callback(os.close, descriptor)
    return descriptor


def _forget_in_child() -> None:
    """A fork has its parent's end of the socket, and would tell it of signals that are its own."""
    if _pages:
        _pages.clear()
        with suppress(ValueError, OSError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


def _ignore(number: int, frame: Any) -> None:
    """A signal that is read from the socket."""
