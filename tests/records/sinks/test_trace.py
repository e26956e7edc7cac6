from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trace_events import Trace, read_trace
from troupe.messages import GroupClosed, Incident, Slot, Span
from troupe.records.sinks.trace import TraceWriter


def span(actor: str, name: str, start_s: float, end_s: float, **fields: Any) -> Span:
    return Span(actor=actor, name=name, start_s=start_s, end_s=end_s, **fields)


SPANS = [
    span("generator", "decode", 1.0, 1.5, step=0),
    span("learner", "idle", 1.25, 2.0, kind="wait"),
    span("generator", 'odd "name"\n', 2.0, 2.0, gids=(4, 5)),
]


def meta(track: int, name: str, order: int) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": name}},
        {"ph": "M", "pid": 1, "tid": track, "name": "thread_sort_index", "args": {"sort_index": order}},
    ]


WORK = [
    {"ph": "X", "pid": 1, "tid": 1, "name": "decode", "cat": "work", "ts": 1e6, "dur": 5e5, "args": {"step": 0}},
    {"ph": "X", "pid": 1, "tid": 2, "name": "idle", "cat": "wait", "ts": 1.25e6, "dur": 7.5e5, "args": {}},
    {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "name": 'odd "name"\n',
        "cat": "work",
        "ts": 2e6,
        "dur": 0.125,
        "args": {"gids": [4, 5]},
    },
]
EVENTS: list[dict[str, Any]] = [
    {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "troupe"}},
    *meta(1, "generator", 0),
    WORK[0],
    *meta(2, "learner", 1000),
    WORK[1],
    WORK[2],
]


def traced(folder: Path, *messages: object, **limits: int) -> list[dict[str, Any]]:
    writer = TraceWriter(folder / "trace.json", **limits)
    writer.open()
    for message in messages:
        writer.write(message)
    writer.close()
    events: list[dict[str, Any]] = json.loads((folder / "trace.json").read_text())
    return events


def arrows(trace: Trace) -> set[tuple[str, str, str]]:
    return {(name, start.name, end.name) for name, start, end in trace.arrows}


def test_is_json_when_closed(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "trace.json").close()  # before it was opened
    events = traced(tmp_path, *SPANS, Incident(actor="learner", kind="odd", message="no span"))
    assert events == EVENTS
    read_trace(events)


def test_needs_only_a_bracket_at_any_moment_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    writer = TraceWriter(path)
    writer.open()
    for count, message in zip([1, 4, 7, 8], [*SPANS, None], strict=True):
        assert json.loads(path.read_text() + "]") == EVENTS[:count]
        writer.write(message)
        assert json.loads(path.read_text() + "]") == EVENTS[:count]  # not a part of an event before the flush
        writer.flush()
    writer.close()
    writer.close()


def test_what_a_full_disk_left_out_is_written_when_there_is_room(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.json")
    writer.open()
    disk, room = writer._file, iter([3, None, 5, 10**6, 10**6])

    class FullDisk:
        def write(self, data: bytearray) -> int:
            assert disk is not None
            if (size := next(room)) is None:
                raise OSError("disk full")
            return disk.write(data[:size])

        def close(self) -> None:
            assert disk is not None
            disk.close()

    writer._file = FullDisk()  # type: ignore[assignment]
    for message in SPANS:
        writer.write(message)
    with pytest.raises(OSError, match="disk full"):
        writer.flush()
    writer.flush()
    writer.close()
    assert json.loads((tmp_path / "trace.json").read_text()) == EVENTS


def test_a_large_file_gives_way_to_a_new_one_and_the_newest_part_is_kept(tmp_path: Path) -> None:
    path, before = tmp_path / "trace.json", tmp_path / "trace.before.json"
    before.write_text("of an earlier start")
    writer = TraceWriter(path, most_bytes=5000)
    writer.open()
    assert not before.exists()
    names = [f"work {number}" for number in range(100)]
    for number, name in enumerate(names):
        writer.write(span("generator", name, number, number + 1.0, gid=0))
        writer.flush()
        assert json.loads(path.read_text() + "]")[0]["name"] == "process_name"
        assert path.stat().st_size < 5000
    writer.close()
    assert 5000 <= before.stat().st_size < 6000
    old, new = json.loads(before.read_text() + "]"), json.loads(path.read_text())
    shown = [piece.name for events in (old, new) for piece in read_trace(events).slices]
    assert len(shown) > 20
    assert shown == names[-len(shown) :]


def test_an_empty_run_gives_a_whole_file(tmp_path: Path) -> None:
    assert traced(tmp_path) == EVENTS[:1]


def test_writing_before_opening_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace\.json is not open"):
        TraceWriter(tmp_path / "trace.json").write(SPANS[0])


def test_arrows_follow_a_group_part_where_rewards_run_at_once_and_meet_again(tmp_path: Path) -> None:
    trace = read_trace(
        traced(
            tmp_path,
            span("prompter", "issue", 1.0, 1.1, gid=7),
            span("prompter", "issue", 1.2, 1.3, gid=8),
            span("generator", "hand over", 4.0, 4.1, gid=7),
            span("scorer", "score quick", 4.2, 5.0, gid=7, lane=1),
            span("scorer", "score slow", 4.2, 6.0, gid=7, lane=2),
            span("generator", "hand over", 6.5, 6.6, gid=8),
            span("generator", "decode", 2.0, 7.0, step=0),
            span("scorer", "score quick", 6.7, 7.1, gid=8, lane=1),
            span("learner", "learn", 8.0, 9.0, gids=(7, 8)),
            span("learner", "closed", 9.5, 9.5, gid=7),
            GroupClosed(gid=7, slot=Slot(step=0, place=0), state="trained", version=1),
            span("learner", "closed", 9.6, 9.6, gid=8),
            span("scorer", "late", 10.0, 10.1, gid=7),
            span("scorer", "late", 10.0, 10.1, gid=8, lane=1),
        )
    )
    assert arrows(trace) == {
        ("group 7", "issue", "hand over"),
        ("group 7", "hand over", "score quick"),
        ("group 7", "hand over", "score slow"),
        ("group 7", "score quick", "learn"),
        ("group 7", "score slow", "learn"),
        ("group 7", "learn", "closed"),
        ("group 8", "issue", "hand over"),
        ("group 8", "hand over", "score quick"),
        ("group 8", "score quick", "learn"),
        ("group 8", "learn", "closed"),
        ("group 8", "closed", "late"),  # it was not told that 8 is closed; of 7 it was
    }
    assert list(trace.tracks.values()) == ["prompter", "generator", "scorer 2", "scorer 3", "learner", "scorer"]


def test_child_processes_are_processes_of_their_own(tmp_path: Path) -> None:
    trace = read_trace(
        traced(
            tmp_path,
            span("prompter", "issue", 1.0, 1.1, gid=7),
            span("generator", "hand over", 2.0, 2.1, gid=7, process=4321),
            span("generator", "hand over", 2.0, 2.1, gid=8, process=4322),
        )
    )
    assert [(piece.process, trace.track_of(piece)) for piece in trace.slices] == [
        (1, "prompter"),
        (4321, "generator"),
        (4322, "generator"),
    ]
    assert arrows(trace) == {("group 7", "issue", "hand over")}


def test_groups_that_never_end_do_not_pile_up(tmp_path: Path) -> None:
    spans = [span("prompter", "issue", float(gid), gid + 0.5, gid=gid) for gid in range(5)]
    learn = span("learner", "learn", 9.0, 10.0, gids=(4, 3, 0, 1))
    trace = read_trace(traced(tmp_path, *spans, learn, most_groups=2))
    assert arrows(trace) == {(f"group {gid}", "issue", "learn") for gid in (3, 4)}


@given(seed=st.integers(0, 2**32), groups=st.integers(1, 6))
def test_every_group_can_be_followed_from_its_first_span_to_its_last(
    tmp_path_factory: pytest.TempPathFactory, seed: int, groups: int
) -> None:
    """Arrows join spans that follow each other, without any way around: the transitive reduction of 'ended before'."""
    dice = random.Random(seed)
    spans = []
    for number in range(dice.randrange(2, 12)):
        start = dice.randrange(20)
        gid = dice.randrange(groups)
        spans.append(span("a", f"s{number}", float(start), float(start + dice.randrange(1, 6)), gid=gid, lane=number))
    spans.sort(key=lambda span: span.end_s)
    trace = read_trace(traced(tmp_path_factory.mktemp("trace"), *spans))
    pairs = {(a.name, b.name) for a in spans for b in spans if a.gid == b.gid and a.end_s <= b.start_s}
    ways_around = {(a, c) for a, b in pairs for b_, c in pairs if b == b_}
    assert {(start.name, end.name) for _, start, end in trace.arrows} == pairs - ways_around


def test_a_member_keeps_its_tracks_under_its_name_whatever_its_pid_and_whoever_else_has_it(tmp_path: Path) -> None:
    spans = [
        span("generator", "decode", 1.0, 1.5, process=77, member="laptop"),
        span("generator", "decode", 1.0, 1.5, process=77, member="studio"),
        span("generator", "decode", 1.0, 1.5, process=77),
        span("generator", "decode", 2.0, 2.5, process=78, member="laptop"),
    ]
    events = traced(tmp_path, *spans)
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    drawn = [names[piece.process] for piece in read_trace(events).slices]
    assert drawn == ["laptop", "studio", "troupe generator", "laptop"]
