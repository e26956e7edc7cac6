from __future__ import annotations

import logging
import os
import re
import sys
import threading
from contextlib import suppress
from io import BytesIO, StringIO, TextIOWrapper

import msgspec
import pytest
from rich.console import Console

from tests.records.sinks.steps import closed, status, update
from troupe.messages import Activity, Evaluated, Finding, GroupClosed, Incident, Slot
from troupe.records.sinks.base import RunInfo
from troupe.records.sinks.console import ConsoleSink, PlainSink, Repeats, _Above
from troupe.runtime.outlets import of_a_display, unhurried

RUN = RunInfo(name="kind-001", folder="runs/kind-001", total_steps=4, first_step=1)


def drawn(run: RunInfo, *messages: object, width: int = 100) -> str:
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
    text = drawn(RUN, *messages).split("kind-001")[-1]
    for part in ("3 of 4", "steps", "0.250", "+0.1250", "one [red] answer", "the judge [/bold] was late"):
        assert part in text, part


def test_the_display_starts_where_a_resume_goes_on() -> None:
    assert "1 of 4" in drawn(RUN)


@pytest.mark.parametrize("name", ["run{1}", "run{task.nothing}", "odd [/bold] name", "[red]"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert name in drawn(RunInfo(name=name, folder=name, total_steps=4, first_step=0), update(1))


def test_closing_without_opening_prints_nothing() -> None:
    stream = StringIO()
    ConsoleSink(RUN, Console(file=stream, force_terminal=True)).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_plain_lines_are_told_in_the_letters_that_there_are(encoding: str) -> None:
    data = BytesIO()
    sink = PlainSink(RunInfo(name="日本\udcff", folder="x", total_steps=4, first_step=0), TextIOWrapper(data, encoding))
    sink.open()
    sink.write(update(1, reward_std_within_groups=0.5))
    text = data.getvalue().decode(encoding)
    assert text.count("\n") == 2
    assert "\\udcff: step 0 of 4" in text
    assert "within group 0.500" in text


def test_plain_lines_for_logs() -> None:
    now = [50.0]
    stream = StringIO()
    sink = PlainSink(RUN, stream, interval_s=10.0, clock=lambda: now[0])
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


def test_plain_lines_say_what_is_done_before_the_first_step_and_after_the_last() -> None:
    """Looked at each second, as in a run: each thing once, and every ten seconds how far it is; amid steps hardly."""
    now = [50.0]
    stream = StringIO()
    sink = PlainSink(
        RunInfo(name="kind-001", folder="runs/kind-001", total_steps=2, first_step=0), stream, clock=lambda: now[0]
    )

    def lasts(seconds: int, what: str) -> None:
        for second in range(seconds):
            sink.write(status(activity=Activity(what=what, detail=f" {second}")))
            now[0] += 1.0

    sink.open()
    sink.write(status("starting"))
    lasts(25, "held-out rows")
    lasts(3, "generating step 1")
    lasts(2, "scoring step 1")
    sink.write(update(1, total_steps=2, reward=0.5))
    lasts(30, "generating step 2")
    lasts(35, "learning step 2")
    sink.write(update(2, total_steps=2, reward=1.0))
    lasts(2, "held-out rows after training")
    sink.close()
    assert stream.getvalue().splitlines() == [
        "kind-001: step 0 of 2, into runs/kind-001",
        "held-out rows 0",
        "held-out rows 10",
        "held-out rows 20",
        "generating step 1 0",
        "scoring step 1 0",
        "step 1/2  reward 0.500",
        "learning step 2 30",
        "step 2/2  reward 1.000",
        "held-out rows after training 0",
    ]


def test_hundreds_of_incidents_are_a_line_and_a_number() -> None:
    now = [50.0]
    stream = StringIO()
    sink = PlainSink(RUN, stream, clock=lambda: now[0])
    for _ in range(400):
        sink.write(Incident(actor="scorer", kind="reward_error", message="refused"))
    now[0] = 60.0
    sink.write(status())
    for _ in range(3):
        sink.write(Incident(actor="scorer", kind="reward_error", message="refused"))
    now[0] = 65.0
    sink.close()
    assert stream.getvalue().splitlines() == [
        "incident in scorer: refused",
        "incidents: 399 more reward_error in scorer within 10 s, the newest: refused",
        "incidents: 3 more reward_error in scorer within 5 s, the newest: refused",
    ]


def test_plain_lines_hold_nothing_that_acts_on_a_terminal() -> None:
    stream = StringIO()
    sink = PlainSink(RunInfo(name="a\x1b[2J", folder="b\x07", total_steps=4, first_step=0), stream)
    sink.open()
    sink.write(Incident(actor="scorer", kind="odd", message="one\nstep 9/9\r\x9b"))
    sink.write(status(activity=Activity(what="waiting for reward \x1b]0;x\x07", waiting=True)))
    assert stream.getvalue().splitlines() == [
        "a\\x1b[2J: step 0 of 4, into b\\x07",
        "incident in scorer: one⏎step 9/9\\r\\x9b",
        "waiting for reward \\x1b]0;x\\x07",
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
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read.decode())
    text = text.replace("\r\n", "\n").replace(
        "\r", "\n"
    )  # where a frame is drawn over, however late the first one came
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


def test_what_comes_while_the_last_lines_are_drawn_is_not_lost() -> None:
    stream = StringIO()
    above = _Above(Console(file=stream))
    above._take("late")
    above.close()
    assert stream.getvalue() == "late\n"


def fault(message: str = "refused", kind: str = "reward_error") -> Incident:
    return Incident(actor="scorer", kind=kind, message=message)


def test_the_first_is_told_at_once_and_four_hundred_as_a_number() -> None:
    repeats = Repeats()
    assert [repeats.is_told_alone(fault(), i / 100) for i in range(400)].count(True) == 1
    assert repeats.counted(9.9) == []
    assert repeats.counted(10.0) == ["399 more reward_error in scorer within 10 s, the newest: refused"]
    assert not repeats.is_told_alone(fault(), 11.0), "the same goes on"
    assert repeats.counted(20.1) == ["1 more reward_error in scorer within 10 s, the newest: refused"]
    assert repeats.counted(40.0) == []
    assert repeats.is_told_alone(fault(), 41.0), "after a while of silence it is new again"


def test_three_different_ones_of_a_kind_are_told_and_other_kinds_are_not_held_up() -> None:
    repeats = Repeats()
    assert [repeats.is_told_alone(fault(f"sample {i}"), 1.0) for i in range(5)] == [True, True, True, False, False]
    assert repeats.is_told_alone(fault(kind="reward_down"), 1.0)
    assert repeats.counted(2.0, all_of_them=True) == ["2 more reward_error in scorer within 1 s, the newest: sample 4"]


def test_plain_lines_tell_of_evaluations_and_of_each_finding_once() -> None:
    stream = StringIO()
    sink = PlainSink(RUN, stream, interval_s=100.0, clock=lambda: 50.0)
    finding = Finding(rule="r", title="nothing to learn", since=2, evidence="all are equal", remedy="--set a.b=1")
    other = msgspec.structs.replace(finding, rule="o", title="other")
    for step, findings in enumerate([(), (finding,), (other, finding), (other,)], 1):
        sink.write(msgspec.structs.replace(update(step, total_steps=9), findings=findings))
    for version, accuracy in ((0, 0.25), (4, 0.5)):
        sink.write(Evaluated(version=version, name="sums", metrics={"eval/sums/accuracy": accuracy}, rows=()))
    assert stream.getvalue().splitlines() == [
        "step 1/9  ",
        "diagnosis: nothing to learn: all are equal (since step 2); try --set a.b=1",
        "diagnosis: other: all are equal (since step 2); try --set a.b=1",
        "evaluated sums: accuracy 25.0% at step 0",
        "evaluated sums: accuracy 25.0% → 50.0% at step 4, its best",
    ]
