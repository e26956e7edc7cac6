from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from tests.support.fakes import FakeSink
from troupe.records.sinks.base import MetricsConfig, RunInfo, SinkName
from troupe.records.sinks.make import can_draw, make_sinks

RUN = RunInfo(name="run", folder="nowhere", total_steps=4, first_step=0)
ALL: tuple[SinkName, ...] = get_args(SinkName)


def test_every_name_makes_the_sink_of_that_name_and_nothing_is_written(tmp_path: Path) -> None:
    run = RunInfo(name="run", folder=str(tmp_path), total_steps=4, first_step=0)
    made = make_sinks(MetricsConfig(sinks=ALL), run, {"trace": lambda: FakeSink("trace")})
    assert tuple(sink.name for sink in made) == ALL
    assert list(tmp_path.iterdir()) == []
    assert make_sinks(MetricsConfig(sinks=()), run) == []


@pytest.mark.parametrize(
    ("encoding", "kind"), [("utf-8", "ConsoleSink"), ("cp1252", "ConsoleSink"), ("latin-1", "PlainSink")]
)
def test_a_terminal_gets_lines_where_it_lacks_the_letters_of_the_display(encoding: str, kind: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, force_terminal=True, _environ={"TERM": "xterm"})
    assert can_draw(console) == (kind == "ConsoleSink")
    assert not can_draw(Console(file=stream, force_terminal=True, _environ={"TERM": "dumb"}))


@pytest.mark.parametrize(("terminal", "kind"), [(True, "ConsoleSink"), (False, "PlainSink")])
def test_a_terminal_gets_a_display_and_a_pipe_lines(terminal: bool, kind: str) -> None:
    [sink] = make_sinks(MetricsConfig(sinks=("console",)), RUN, terminal=Console(force_terminal=terminal))
    assert type(sink).__name__ == kind
