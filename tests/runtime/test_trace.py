from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from troupe.messages import Incident, Span
from troupe.runtime import TraceWriter


def span(actor: str, name: str, start_s: float, end_s: float, **ids: int) -> Span:
    return Span(actor=actor, name=name, start_s=start_s, end_s=end_s, **ids)


SPANS = [
    span("generator", "generate", 1.0, 1.5, step=0),
    span("learner", "learn", 1.25, 2.0, step=0, gid=7),
    span("generator", 'odd "name"\n', 2.0, 2.0),
]
NAMING = [
    {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "troupe"}},
    {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "generator"}},
    {"ph": "M", "pid": 1, "tid": 2, "name": "thread_name", "args": {"name": "learner"}},
]
WORK = [
    {"ph": "X", "pid": 1, "tid": 1, "name": "generate", "ts": 1e6, "dur": 5e5, "args": {"step": 0}},
    {"ph": "X", "pid": 1, "tid": 2, "name": "learn", "ts": 1.25e6, "dur": 7.5e5, "args": {"step": 0, "gid": 7}},
    {"ph": "X", "pid": 1, "tid": 1, "name": 'odd "name"\n', "ts": 2e6, "dur": 0.0, "args": {}},
]
EVENTS: list[dict[str, Any]] = [NAMING[0], NAMING[1], WORK[0], NAMING[2], WORK[1], WORK[2]]


def test_is_json_when_closed(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.json")
    writer.close()  # before it was opened
    writer.open()
    for message in SPANS:
        writer.write(message)
    writer.write(Incident(actor="learner", kind="odd", message="no span"))
    writer.close()
    writer.close()
    assert json.loads((tmp_path / "trace.json").read_text()) == EVENTS


def test_needs_only_a_bracket_at_any_moment_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    writer = TraceWriter(path)
    writer.open()
    counts = [1, 3, 5, 6]
    for count, message in zip(counts, [*SPANS, None], strict=True):
        assert json.loads(path.read_text() + "]") == EVENTS[:count]
        writer.write(message)
    writer.close()


def test_an_empty_run_gives_a_whole_file(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.json")
    writer.open()
    writer.close()
    assert json.loads((tmp_path / "trace.json").read_text()) == EVENTS[:1]


def test_writing_before_opening_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace\.json is not open"):
        TraceWriter(tmp_path / "trace.json").write(SPANS[0])
