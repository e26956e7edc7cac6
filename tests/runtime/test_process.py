from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from troupe.runtime.frames import Connection, FrameError
from troupe.runtime.process import ChildEnded, ChildProcess

pytestmark = pytest.mark.anyio
CHILD = "tests.runtime.child_echo"
PATIENCE_S = 60.0


@asynccontextmanager
async def child_doing(what: str, *args: str, **options: object) -> AsyncIterator[ChildProcess]:
    child = await ChildProcess.start(CHILD, what, *args, **options)  # type: ignore[arg-type]
    try:
        with anyio.fail_after(PATIENCE_S):
            yield child
    finally:
        await child.aclose()
    assert child.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)  # not even a zombie


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it was read
        return False
    return state != "Z"


async def until_gone(*pids: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        while any(map(lives, pids)):  # noqa: ASYNC110 - nobody tells us
            await anyio.sleep(0.01)


async def test_frames_of_every_size_come_back_in_order() -> None:
    frames = [b"", b"a", bytes(range(256)) * 5000, b"last"]
    async with child_doing("echo") as child:
        assert "is running" in child.how_it_ended()
        for frame in frames:
            await child.send(frame)
        assert [await child.receive() for _ in frames] == frames
        await child.aclose()
        assert child.returncode == 0
        with pytest.raises(anyio.BrokenResourceError, match="ended with exit code 0; it wrote nothing"):
            await child.send(b"too late")


async def test_receiving_may_be_cancelled_between_the_head_and_the_body() -> None:
    ours, theirs = socket.socketpair()
    connection = await Connection.over(ours)
    theirs.sendall((3).to_bytes(4, "big") + b"ab")
    async with anyio.create_task_group() as group:
        group.start_soon(connection.receive)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    theirs.sendall(b"c")
    assert await connection.receive() == b"abc"
    theirs.close()
    with pytest.raises(anyio.EndOfStream):
        await connection.receive()
    connection.close()


async def test_a_frame_that_is_too_long_is_refused_on_both_sides() -> None:
    async with child_doing("echo", max_frame_bytes=10) as child:
        with pytest.raises(FrameError, match="a frame of 11 bytes is over the limit of 10"):
            await child.send(b"x" * 11)
        await child.send(b"x" * 10)
        assert await child.receive() == b"x" * 10


async def test_garbage_is_named() -> None:
    async with child_doing("garbage") as child:
        with pytest.raises(FrameError, match=r"a frame of 1,214,606,444 bytes was announced, .* no frame"):
            await child.receive()


async def test_half_a_frame_is_an_end() -> None:
    async with child_doing("half") as child:
        with pytest.raises(ChildEnded, match="ended with exit code 0 in the middle of a frame"):
            await child.receive()


async def test_a_fault_is_told_with_its_traceback() -> None:
    async with child_doing("fail") as child:
        await child.send(b"go")
        with pytest.raises(ChildEnded, match=r"(?s)exit code 1; its last lines:.*ValueError: no such luck"):
            await child.receive()


async def test_a_module_that_is_not_there_is_told() -> None:
    child = await ChildProcess.start("tests.runtime.no_such_module")
    with pytest.raises(ChildEnded, match=r"No module named tests\.runtime.no_such_module"):
        await child.receive()
    await child.aclose()


async def test_exit_codes_and_signals_are_told() -> None:
    async with child_doing("quit_with_7") as child:
        with pytest.raises(ChildEnded, match="exit code 7"):
            await child.receive()
        assert child.returncode == 7
    async with child_doing("spin") as child:
        assert int(await child.receive()) == child.pid
        child.kill()
        with pytest.raises(ChildEnded, match="ended by SIGKILL"):
            await child.receive()
        assert await child.wait() == -signal.SIGKILL
        child.kill()  # twice is no error


async def test_prints_go_to_stderr_and_never_into_the_frames(capsys: pytest.CaptureFixture[str]) -> None:
    async with child_doing("talk") as child:
        assert await child.receive() == b"frame"
    assert capsys.readouterr().err == "printed\nwritten to 1\nby a grandchild\n"
    assert child.how_it_ended().endswith("its last lines:\n  printed\n  written to 1\n  by a grandchild")


async def test_the_whole_group_is_killed() -> None:
    async with child_doing("hang") as child:
        grandchild = int(await child.receive())
        assert lives(grandchild)
        child.kill()
        await until_gone(child.pid, grandchild)


async def test_a_child_that_closes_its_side_and_stays_is_killed() -> None:
    async with child_doing("leave", grace_s=0.01) as child:
        with pytest.raises(ChildEnded, match="ended by SIGKILL"):
            await child.receive()


async def test_closing_kills_one_that_does_not_listen() -> None:
    child = await ChildProcess.start(CHILD, "spin")
    await child.receive()
    await child.aclose(grace_s=0.01)
    assert child.returncode == -signal.SIGKILL
    await child.aclose()


async def test_who_is_cancelled_while_a_child_starts_still_gets_it() -> None:
    child: ChildProcess | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        child = await ChildProcess.start(CHILD, "echo")
        await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert child is not None, "nobody could end it"
    await child.aclose()
    assert child.returncode is not None


async def test_the_child_has_our_import_path_and_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    async with child_doing("environment", "one", "two words", env={"GIVEN": "yes"}) as child:
        assert await child.receive() == b"- yes - one two words"
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    async with child_doing("environment") as child:
        assert await child.receive() == b"/somewhere - -"


PARENT = """
import os, signal, sys, anyio
from troupe.runtime.process import ChildProcess

async def main():
    child = await ChildProcess.start("tests.runtime.child_echo", sys.argv[1])
    told = await child.receive()
    print(child.pid, told.decode(), flush=True)
    await anyio.sleep(600)

anyio.run(main)
"""


@pytest.mark.parametrize("what", ["spin", "hang"])
async def test_a_child_does_not_outlive_a_parent_that_is_killed(what: str) -> None:
    command = [sys.executable, "-c", PARENT, what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        child, _ = map(int, parent.stdout.readline().split())
        assert lives(child)
        since = time.perf_counter()
        parent.kill()
        await until_gone(child)
        assert time.perf_counter() - since < 20.0
