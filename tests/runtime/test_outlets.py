"""Output that nobody reads holds up nobody."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from troupe.runtime.outlets import Aside, Outlet, finish, of_a_display, outlet_of, unhurried

LINE = b"x" * 1023 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of which both ends are closed in the end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def read_all(end: int) -> bytes:
    data = b""
    while more := os.read(end, 1 << 16):
        data += more
    return data


def test_what_is_read_comes_whole_and_in_order(pipe: tuple[int, int]) -> None:
    read, write = pipe
    outlet = Outlet(write)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(read)))
    reader.start()
    pieces = [b"%d " % number * 50 for number in range(5000)]
    for piece in pieces:
        while outlet._bytes > 500_000:  # faster than it is read: nothing is left out only up to the bound
            time.sleep(0.001)
        outlet.put(piece)
    assert outlet.close()
    os.close(write)
    reader.join()
    assert got == [b"".join(pieces)]


def test_a_reader_who_sleeps_holds_up_nobody_and_finds_the_newest(pipe: tuple[int, int]) -> None:
    read, write = pipe
    outlet = Outlet(write, most_bytes=100 * len(LINE))
    for _ in range(2000):
        outlet.put(LINE)
    outlet.put(b"the last\n")
    assert outlet.left_out > 1500
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(read)))
    reader.start()
    assert outlet.close()
    os.close(write)
    reader.join()
    assert got[0].endswith(LINE + b"the last\n")
    assert b"pieces of output were left out: nobody has read them in time]\n" in got[0]


def test_the_end_waits_for_no_reader_who_takes_nothing(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    for _ in range(200):
        outlet.put(LINE)
    began_s = time.monotonic()
    assert not outlet.close(0.1)
    assert time.monotonic() - began_s < 5.0
    outlet.put(LINE)
    assert not outlet._waiting


def test_a_reader_who_has_gone_changes_nothing(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    outlet = Outlet(pipe[1])
    outlet.put(LINE)
    assert outlet.close()
    outlet.put(LINE)
    assert not outlet._waiting


def test_lines_go_above_a_display_whole_and_each_thread_s_by_itself(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    above: list[str] = []
    outlet.divert(above.append)
    outlet.put_above(b"one ")

    def write() -> None:
        outlet.put_above(b"another")
        outlet.put_above(b" line\n")

    other = threading.Thread(target=write)
    other.start()
    other.join()
    outlet.put_above("half – ".encode())
    outlet.put_above(b"line\nbegun")
    assert above == ["another line", "one half – line"]
    outlet.put(b"drawn ")
    outlet.divert(None)
    outlet.put_above(b" and ended\n")
    assert outlet.close()
    os.close(pipe[1])
    assert read_all(pipe[0]) == b"drawn begun and ended\n"


def test_the_streams_are_exchanged_and_come_back(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdopen(os.dup(pipe[1]), "w", encoding="utf-8", errors="replace")
    stand_in = io.StringIO()
    monkeypatch.setattr(sys, "stdout", real)
    monkeypatch.setattr(sys, "stderr", stand_in)
    with unhurried():
        outlet = outlet_of(sys.stdout)
        assert outlet is not None
        assert sys.stderr is stand_in, "what is no file stays"
        assert sys.stdout.fileno() == real.fileno()
        assert not sys.stdout.isatty()
        assert isinstance(sys.stdout, io.TextIOWrapper)
        print("größer", end=" ")
        sys.stdout.buffer.write(b"bytes\n")
        outlet.divert(lambda line: None)
        drawn = of_a_display(sys.stdout)
        print("above")
        drawn.write("drawn\n")
    assert sys.stdout is real
    real.close()
    os.close(pipe[1])
    assert read_all(pipe[0]).decode() == "größer bytes\ndrawn\n"
    assert of_a_display(stand_in) is stand_in


def test_a_line_that_never_ends_does_not_grow_for_ever(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    above: list[str] = []
    outlet.divert(above.append)
    for number in range(1000):
        outlet.put_above(b"\r%5d of 1000 done" % number + b" " * 80)
    assert above
    assert sum(map(len, outlet._open.values())) < 20_000
    outlet.divert(None)
    os.close(pipe[0])


def test_a_display_may_end_while_others_print(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    lines: list[str] = []
    enders: list[threading.Thread] = []

    def above(line: str) -> None:
        lines.append(line)
        enders.append(threading.Thread(target=outlet.divert, args=(None,)))
        enders[-1].start()
        enders[-1].join(0.2)

    outlet.divert(above)
    outlet.put_above(b"one\ntwo\n")
    for ender in enders:
        ender.join()
    assert lines == ["one", "two"]
    assert outlet.close()


def test_whoever_leaves_at_once_shows_the_cursor(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdopen(os.dup(pipe[1]), "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", real)
    with unhurried():
        outlet = outlet_of(sys.stdout)
        assert outlet is not None
        outlet.divert(lambda line: None)
        finish()
    real.close()
    os.close(pipe[1])
    assert read_all(pipe[0]) == b"\x1b[?25h"


FORKS = """
import multiprocessing, threading
from troupe.runtime.outlets import unhurried

def print_on():
    while not over.is_set():
        print("parent")

def child():
    print("child")

with unhurried():
    over = threading.Event()
    printer = threading.Thread(target=print_on)
    printer.start()
    for _ in range(20):
        forked = multiprocessing.get_context("fork").Process(target=child)
        forked.start()
        forked.join(20)
        assert forked.exitcode == 0, forked.exitcode
    over.set()
    printer.join()
"""


def test_what_is_forked_off_meanwhile_prints_too_and_hangs_at_no_lock() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("child") == 20


def test_nobody_waits_for_a_stderr_that_is_stuck(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            stuck.wait()
            return super().write(text)

    stream = Stuck()
    monkeypatch.setattr(sys, "stderr", stream)
    aside = Aside()
    for number in range(3000):
        aside.write(f"{number}\n")
    assert aside.is_behind
    aside.settle(0.01)
    stuck.set()
    aside.settle(30.0)
    assert aside._waiting.unfinished_tasks == 0
    assert stream.getvalue().startswith("0\n1\n2\n")
