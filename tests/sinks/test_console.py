from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from troupe.messages import GroupClosed, Incident, Slot, Update
from troupe.sinks import ConsoleSink, PlainSink, RunInfo
from troupe.sinks.console import queue_depths, shown_metrics

RUN = RunInfo(name="kind-001", folder="runs/kind-001", total_steps=4, first_step=1)
METRICS = {
    "step_time": 1.5,
    "reward": 0.25,
    "loss": 0.125,
    "clip_ratio/region_mean": 0.05,
    "learning_rate": 1e-6,
    "tokens_per_second": 1234.5,
    "unheard/of": 1.0,
    "queue/scored/depth": 3.0,
    "queue/scored/wait_s": 9.0,
}


def update(step: int, metrics: dict[str, float] | None = None) -> Update:
    return Update(step=step, version=step, total_steps=4, metrics=METRICS if metrics is None else metrics)


def test_shows_what_is_there_in_a_fixed_order() -> None:
    assert shown_metrics(METRICS) == [
        ("reward", "0.250"),
        ("loss", "+0.1250"),
        ("clipped", "5.0%"),
        ("learning rate", "1.00e-06"),
        ("tokens/s", "1,234"),
        ("seconds a step", "1.50"),
    ]
    assert shown_metrics({"reward": float("nan")}) == [("reward", "nan")]
    assert queue_depths(METRICS) == [("scored", 3)]


def played(run: RunInfo, *messages: object, width: int = 100) -> str:
    stream = StringIO()
    sink = ConsoleSink(run, Console(file=stream, force_terminal=True, width=width, no_color=True))
    sink.open()
    for message in messages:
        sink.write(message)
    sink.close()
    sink.close()
    return stream.getvalue()


def test_the_display_ends_with_the_last_state() -> None:
    incident = Incident(actor="scorer", kind="odd", message="the judge [/bold] was late")
    closed = GroupClosed(gid=1, slot=Slot(step=0, place=0), state="trained", version=1)
    text = played(RUN, update(2, {}), incident, closed, update(3)).split("kind-001")[-1]
    for part in ("3/4", "steps", "0.250", "+0.1250", "1,234", "scored 3", "1 incidents", "the judge [/bold] was late"):
        assert part in text, part
    assert "unheard" not in text


@pytest.mark.parametrize(("width", "rows"), [(100, 2), (70, 3), (44, 6)])
def test_a_narrow_terminal_gets_fewer_figures_in_a_row(width: int, rows: int) -> None:
    figures = {key: value for key, value in METRICS.items() if not key.startswith("queue/")}
    last = played(RUN, update(3, figures), width=width).split("3/4")[-1].splitlines()[1:]
    assert len([line for line in last if line.strip(" \x1b[?25h")]) == rows


def test_the_display_starts_where_a_resume_goes_on() -> None:
    assert "1/4" in played(RUN)


@pytest.mark.parametrize("name", ["run{1}", "run{task.nothing}", "odd [/bold] name", "[red]"])
def test_a_folder_may_have_any_name(name: str) -> None:
    assert name in played(RunInfo(name=name, folder=name, total_steps=4, first_step=0), update(1))


def test_closing_without_opening_prints_nothing() -> None:
    stream = StringIO()
    ConsoleSink(RUN, Console(file=stream, force_terminal=True)).close()
    assert stream.getvalue() == ""


def test_plain_lines_for_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("troupe.sinks.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = StringIO()
    sink = PlainSink(RUN, stream, interval_s=10.0)
    sink.open()
    sink.write(update(2, {"reward": 0.5}))
    now[0] = 59.0
    sink.write(update(3, {"reward": 0.75}))  # too soon
    sink.write(Incident(actor="scorer", kind="odd", message="late"))
    sink.write(update(4, {"reward": 1.0, "loss": -0.5}))  # the last one always
    sink.write(GroupClosed(gid=1, slot=Slot(step=0, place=0), state="trained", version=1))
    sink.close()
    assert stream.getvalue().splitlines() == [
        "kind-001: step 1 of 4, into runs/kind-001",
        "step 2/4  reward 0.500",
        "incident in scorer: late",
        "step 4/4  reward 1.000  loss -0.5000",
    ]
