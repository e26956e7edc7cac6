"""ChildProcess: a Python module run in a process of its own, spoken to in frames of bytes.

The child is spawned (`python -m MODULE`),
so it inherits no thread, no lock and no memory; it leads a process group of its own, which is killed with it. It cannot
outlive its parent: it holds one end of a pipe that nobody ever writes to, a thread of it waits for the end of that
pipe, which comes when the parent is gone however it went, and on Linux the kernel kills the child as well, should all
its threads hang. What is printed in the child goes to its stderr, which the parent passes on and remembers the end of.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import NoReturn

import anyio

from troupe.runtime.frames import MAX_FRAME_BYTES, Connection, Wire
from troupe.runtime.outlets import Aside

GRACE_S = 5.0
"""That a child which has closed its side, or whose connection is closed, may take to end by itself."""
_BUFFER_BYTES = 1024 * 1024
_LAST_LINES = 40
_LINE_BYTES = 4096
_ENDS_WIRES = "TROUPE_CHILD_WIRES"
_ENDS_PATH = "TROUPE_CHILD_PYTHONPATH"
_PR_SET_PDEATHSIG = 1
_WRITTEN_S = 0.2
_ASIDE = Aside()


class ChildEnded(anyio.EndOfStream):
    """The child is gone: how it ended, and what it wrote last."""


class ChildProcess:
    """One running child; made by `start`."""

    def __init__(
        self,
        module: str,
        process: subprocess.Popen[bytes],
        connection: Connection,
        lifeline: int,
        tell: Callable[[str], None] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.module = module
        self._process = process
        self._connection = connection
        self._lifeline: int | None = lifeline
        self._grace_s = grace_s
        self._stderr = _LastLines(tell)
        self._ended = anyio.Event()
        self._reaping = threading.Lock()

    @classmethod
    async def start(
        cls,
        module: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        tell: Callable[[str], None] | None = None,
        grace_s: float = GRACE_S,
    ) -> ChildProcess:
        """Run `python -m MODULE ARGS`, which is to call `serve`, with the import path of this process.

        `env` is added to this process's environment. `tell` is given every line that the child prints, which otherwise
        goes on to this process's stderr. Returns when the process is there, not when it is ready: where it
        cannot even import, the first `receive` says so.
        """
        ours, theirs = socket.socketpair()
        read_end, lifeline = os.pipe()
        said, says = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's own does the same, and reaps too early for us
                [sys.executable, "-P", "-m", module, *args],
                stdin=subprocess.DEVNULL,
                stdout=says,
                stderr=says,
                pass_fds=(theirs.fileno(), read_end),
                env=_environment(env or {}, theirs.fileno(), read_end),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(said)
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(read_end)
            os.close(says)
        loop = asyncio.get_running_loop()
        with anyio.CancelScope(shield=True):  # short, and who is cancelled here would leave a child behind
            child = cls(module, process, await Connection.over(ours, max_frame_bytes), lifeline, tell, grace_s)
            threading.Thread(target=child._reap, args=(loop,), name=f"troupe-wait-{process.pid}", daemon=True).start()
            await loop.connect_read_pipe(lambda: child._stderr, os.fdopen(said, "rb", buffering=0))
        return child

    @property
    def pid(self) -> int:
        """The process's number, which is its group's too."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit code, or minus the signal that ended it."""
        return self._process.returncode if self._ended.is_set() else None

    async def send(self, frame: bytes) -> None:
        """Send one frame. FrameError where it is too long; BrokenResourceError, which tells how the child ended."""
        try:
            await self._connection.send(frame)
        except anyio.BrokenResourceError:
            await self._until_ended()
            raise anyio.BrokenResourceError(self.how_it_ended()) from None

    async def receive(self) -> bytes:
        """The child's next frame; ChildEnded where none will come, FrameError where what comes is no frame."""
        try:
            return await self._connection.receive()
        except anyio.EndOfStream as error:
            await self._until_ended()
            raise ChildEnded(self.how_it_ended(str(error))) from None

    def kill(self) -> None:
        """Kill the child and all processes of its group, whatever they are doing. Returns at once."""
        with self._reaping:
            if self._process.returncode is None:
                self._kill_group()

    async def wait(self) -> int:
        """Wait until the child has ended → its return code."""
        await self._ended.wait()
        return self._process.returncode

    async def aclose(self, grace_s: float | None = None) -> None:
        """Close the connection, which the child takes for the end; kill it where it has not ended within the grace.

        Not cancelled. Nothing of the child is left afterwards. Safe to call twice.
        """
        self._connection.close()
        with anyio.CancelScope(shield=True):
            await self._until_ended(grace_s)
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        self._stderr.close()
        if _ASIDE.is_behind:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_ASIDE.settle, _WRITTEN_S)

    def how_it_ended(self, where: str = "") -> str:
        """How the child ended and what it wrote last, for an error message."""
        code = self.returncode
        if code is None:
            return f"the process {self.module} (pid {self.pid}) is running"
        how = f"with exit code {code}" if code >= 0 else f"by {_signal_name(-code)}"
        lines = self._stderr.lines
        last = "; its last lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else "; it wrote nothing"
        return f"the process {self.module} (pid {self.pid}) ended {how}{where and ' ' + where}{last}"

    async def _until_ended(self, grace_s: float | None = None) -> None:
        """Wait until the child, which has closed its side or is to end, has ended; kill it where it lingers."""
        with anyio.move_on_after(self._grace_s if grace_s is None else grace_s):
            await self._ended.wait()
        self.kill()
        await self._ended.wait()
        with anyio.move_on_after(1.0):  # a process that left the group may hold the pipe open
            await self._stderr.ended.wait()

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait, in a thread, for the end of the child, and take what is left of its group with it."""
        if sys.platform == "linux":  # not yet buried, so that nobody else gets its number
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        with self._reaping:
            self._kill_group()
            self._process.wait()
        with suppress(RuntimeError):  # the event loop has ended before
            loop.call_soon_threadsafe(self._ended.set)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # a Mac refuses where only the dead are left
            os.killpg(self._process.pid, signal.SIGKILL)


def serve(handler: Callable[[Connection], Awaitable[None]]) -> NoReturn:
    """In the child: run `handler` to its end, then end the process, with exit code 1 where it raised.

    To be called before anything that could take long: from here on the child ends with its parent. When `receive`
    raises EndOfStream the parent wants no more: `handler` may let it pass. Threads that still run are not waited for.
    """
    serve_plainly(lambda wire: wire.run(handler))


def serve_plainly(handler: Callable[[Wire], None]) -> NoReturn:
    """The same for a handler that is no coroutine: it has the main thread, in which no event loop runs."""
    end, lifeline = map(int, os.environ.pop(_ENDS_WIRES).split(","))
    path = os.environ.pop(_ENDS_PATH, None)
    os.environ.pop("PYTHONPATH", None)
    if path is not None:
        os.environ["PYTHONPATH"] = path
    for each in (end, lifeline):
        os.set_inheritable(each, False)
    end_with_parent(lifeline)
    os.register_at_fork(after_in_child=lambda: _tie_to_parent(lifeline))  # what it forks ends too
    code = 0
    try:
        handler(Wire(socket.socket(fileno=end)))
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_parent(lifeline: int) -> None:
    """Have this process end, whatever it does, when its parent has closed the other end of a pipe, or is gone."""
    _tie_to_parent(lifeline)
    if sys.platform == "linux":  # should the thread not get a turn
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tie_to_parent(lifeline: int) -> None:
    def watch() -> None:
        os.read(lifeline, 1)  # nobody writes: it returns when the parent's end is closed
        os._exit(1)

    threading.Thread(target=watch, name="troupe-lifeline", daemon=True).start()


def _environment(more: Mapping[str, str], *wires: int) -> dict[str, str]:
    """This process's environment and import path, and where the child finds its wires; `serve` takes them out again."""
    environment = {**os.environ, **more}
    if "PYTHONPATH" in environment:
        environment[_ENDS_PATH] = environment["PYTHONPATH"]
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100 - "" is the working directory
    return environment | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",  # what was printed before a crash is there
        _ENDS_WIRES: ",".join(map(str, wires)),
    }


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _LastLines(asyncio.Protocol):
    """Passes on what a child writes, and remembers the last lines of it."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.ended = anyio.Event()
        self._tell = tell
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._open = self._unsaid = b""
        self._transport: asyncio.BaseTransport | None = None

    @property
    def lines(self) -> list[str]:
        """The last lines, the newest last; one that is not ended yet counts."""
        rest = [self._open.decode(errors="replace")] if self._open else []
        return [*self._lines, *rest][-_LAST_LINES:]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *whole, rest = (self._open + data).split(b"\n")
        lines = [line[-_LINE_BYTES:].decode(errors="replace") for line in whole]
        self._lines.extend(lines)
        self._open = rest[-_LINE_BYTES:]
        if self._tell is not None:
            for line in lines:
                self._tell(line)
            return
        said, end, self._unsaid = (self._unsaid + data).rpartition(b"\n")  # several children write
        if len(self._unsaid) > _BUFFER_BYTES:
            said, self._unsaid = said + end + self._unsaid, b""
        if said or end:
            _ASIDE.write((said + end).decode(errors="replace"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._tell is not None and self._open:
            self._tell(self._open.decode(errors="replace"))
        if self._unsaid:
            _ASIDE.write(self._unsaid.decode(errors="replace"))
        self.ended.set()
