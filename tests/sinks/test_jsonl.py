from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from troupe.messages import Incident, Update
from troupe.sinks import JsonlSink


def update(step: int, **metrics: float) -> Update:
    return Update(step=step, version=step, total_steps=9, metrics=metrics)


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_writes_one_line_a_step_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.close()
    sink.open()
    sink.write(update(1, loss=0.5, reward=float("nan")))
    assert lines(path) == [{"step": 1, "version": 1, "loss": 0.5, "reward": None}]
    sink.write(Incident(actor="scorer", kind="odd", message="not for this file"))
    sink.write(update(2, loss=0.25))
    sink.close()
    sink.close()
    sink.write(update(3))  # after the end: not written
    assert lines(path)[1:] == [{"step": 2, "version": 2, "loss": 0.25}]


def test_metrics_never_stand_in_for_the_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open()
    sink.write(Update(step=4, version=4, total_steps=9, metrics={"loss": 1.0, "step": 99.0, "version": 98.0}))
    sink.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert list(line.items()) == [("step", 4), ("version", 4), ("loss", 1.0)]


def test_a_resume_drops_the_steps_that_will_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "old": True}) + "\n" for step in range(1, 6)))
    sink = JsonlSink(path, first_step=3)
    sink.open()
    sink.write(update(4))
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    assert [line.get("old", False) for line in lines(path)] == [True, True, True, False]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "broken",
    [b'{"step":3,"lo', b'{"step":3,"loss":"\xff', b'{"step":"3"}', b"[3]", b'{"loss":1}', b"\x00\x00", b"\xff"],
)
def test_a_line_that_a_crash_has_cut_is_dropped(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n' + broken)
    sink = JsonlSink(path, first_step=8)
    sink.open()
    sink.write(update(9))
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 9]


def test_a_line_that_lost_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}')
    sink = JsonlSink(path, first_step=2)
    sink.open()
    sink.write(update(3))
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_crash_while_opening_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n')

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("power is gone")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="power"):
        JsonlSink(path, first_step=1).open()
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'
