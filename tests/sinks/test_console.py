from __future__ import annotations

import logging
import os
import re
import sys
import threading
from contextlib import suppress
from io import BytesIO, StringIO, TextIOWrapper
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.sinks.steps import closed, update
from troupe.messages import GroupClosed, Incident, Slot
from troupe.outlets import of_a_display, unhurried
from troupe.sinks import ConsoleSink, PlainSink, RunInfo

RUN = RunInfo(name="kind-001", folder="runs/kind-001", total_steps=4, first_step=1)


def played(run: RunInfo, *messages: object, width: int = 100) -> str:
    stream = StringIO()
    sink = ConsoleSink(run, Console(file=stream, force_terminal=True, width=width, no_color=True))
    sink.open()
    for message in messages:
        sink.write(message)
    sink.flush()
    sink.close()
    sink.close()
    return stream.getvalue()


def test_the_display_ends_with_the_last_state() -> None:
    incident = Incident(actor="scorer", kind="odd", message="the judge [/bold] was late")
    messages = update(2), incident, closed(1, texts=("one [red] answer",)), update(3, reward=0.25, loss=0.125)
    text = played(RUN, *messages).split("kind-001")[-1]
    for part in ("3 of 4", "steps", "0.250", "+0.1250", "one [red] answer", "the judge [/bold] was late"):
        assert part in text, part


def test_the_display_starts_where_a_resume_goes_on() -> None:
    assert "1 of 4" in played(RUN)


@pytest.mark.parametrize("name", ["run{1}", "run{task.nothing}", "odd [/bold] name", "[red]"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert name in played(RunInfo(name=name, folder=name, total_steps=4, first_step=0), update(1))


def test_closing_without_opening_prints_nothing() -> None:
    stream = StringIO()
    ConsoleSink(RUN, Console(file=stream, force_terminal=True)).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_plain_lines_are_told_in_the_letters_that_there_are(encoding: str) -> None:
    data = BytesIO()
    sink = PlainSink(RunInfo(name="日本\udcff", folder="x", total_steps=4, first_step=0), TextIOWrapper(data, encoding))
    sink.open()
    sink.write(update(1, reward_std=0.5))
    text = data.getvalue().decode(encoding)
    assert text.count("\n") == 2
    assert "\\udcff: step 0 of 4" in text
    assert "within group 0.500" in text


def test_plain_lines_for_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("troupe.sinks.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = StringIO()
    sink = PlainSink(RUN, stream, interval_s=10.0)
    sink.open()
    sink.write(update(2, total_steps=4, reward=0.5))
    now[0] = 59.0
    sink.write(update(3, total_steps=4, reward=0.75))  # too soon
    sink.write(Incident(actor="scorer", kind="odd", message="late"))
    sink.write(update(4, total_steps=4, reward=1.0, loss=-0.5))  # the last one always
    sink.write(GroupClosed(gid=1, slot=Slot(step=0, place=0), state="trained", version=1))
    sink.flush()
    sink.close()
    assert stream.getvalue().splitlines() == [
        "kind-001: step 1 of 4, into runs/kind-001",
        "step 2/4  reward 0.500",
        "incident in scorer: late",
        "step 4/4  reward 1.000  loss -0.5000",
    ]


def test_what_others_print_goes_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = os.openpty()
    real = os.fdopen(os.dup(ours), "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", real)
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(ours), "w", encoding="utf-8"))
    read = b""

    def read_on() -> None:
        nonlocal read
        with suppress(OSError):  # the end of a terminal
            while more := os.read(terminal, 65536):
                read += more

    reader = threading.Thread(target=read_on)
    reader.start()
    with unhurried():
        handler = logging.StreamHandler()  # before the display is there
        console = Console(file=of_a_display(sys.stdout), force_terminal=True, width=60, height=40)
        sink = ConsoleSink(RUN, console)
        sink.open()
        handler.emit(logging.makeLogRecord({"msg": "logged early"}))
        sys.stdout.write("half ")
        sys.stdout.write("a line [red]\n")
        for number in range(900):
            sys.stderr.write(f"line {number}\n")
        sink.write(update(2))
        sink.close()
        print("after")
    for stream in (real, sys.stderr):
        stream.close()
    monkeypatch.undo()
    os.close(ours)
    reader.join()
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read.decode()).replace("\r", "")
    lines = text.splitlines()
    assert "logged early" in lines
    assert "half a line [red]" in lines
    assert "line 899" in lines
    assert not [
        text
        for text in lines
        if "line" in text and not re.fullmatch(r"(line \d+|half a line \[red\]|.*left out.*)", text)
    ]
    assert lines[-1] == "after"
    assert lines.index("line 899") < max(i for i, text in enumerate(lines) if text.startswith("incidents"))
