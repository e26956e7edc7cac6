from __future__ import annotations

import json
import os
import stat
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.records.sinks.steps import feed, update
from troupe.messages import Incident
from troupe.records.sinks.base import DurableSink
from troupe.records.sinks.jsonl import AppendedFile, JsonlSink, decode_step, steps_between


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
    sink.flush()
    assert lines(path) == [{"step": 1, "version": 1, "loss": 0.5, "reward": None}]
    sink.write(Incident(actor="scorer", kind="odd", message="not for this file"))
    sink.write(update(2, loss=0.25))
    sink.flush()
    sink.close()
    sink.close()
    sink.write(update(3))  # after the end: not written
    sink.flush()
    assert lines(path)[1:] == [{"step": 2, "version": 2, "loss": 0.25}]


def test_metrics_never_stand_in_for_the_step(tmp_path: Path) -> None:
    feed(JsonlSink(tmp_path / "metrics.jsonl"), update(4, {"loss": 1.0, "step": 99.0, "version": 98.0}))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert list(line.items()) == [("step", 4), ("version", 4), ("loss", 1.0)]


def test_a_resume_drops_the_steps_that_will_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "old": True}) + "\n" for step in range(1, 6)))
    feed(JsonlSink(path, first_step=3), update(4))
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
    feed(JsonlSink(path, first_step=8), update(9))
    assert [line["step"] for line in lines(path)] == [1, 2, 9]


def test_a_line_that_lost_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}')
    feed(JsonlSink(path, first_step=2), update(3))
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_disk_that_fails_while_opening_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n')

    def refuse(descriptor: int, length: int) -> None:
        raise OSError("power is gone")

    sink = JsonlSink(path, first_step=1)
    with monkeypatch.context() as failing:
        failing.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="power"):
            sink.open()
        with pytest.raises(OSError, match="power"):
            sink.flush()
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'
    sink.flush()
    sink.close()
    assert path.read_bytes() == b'{"step":1}\n'


@pytest.mark.parametrize("first_step", [0, 1, 700, 1000, 5000])
def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "pad": "x" * (step % 97)}) + "\n" for step in range(1, 1001)))
    size = path.stat().st_size
    read: list[int] = []

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(descriptor, count, offset)

    pread = os.pread
    monkeypatch.setattr(os, "pread", counted)
    feed(JsonlSink(path, first_step=first_step, block_bytes=1000))
    assert [line["step"] for line in lines(path)] == list(range(1, min(first_step, 1000) + 1))
    assert sum(read) <= size - path.stat().st_size + 2000


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40), st.booleans()), max_size=8),
    st.integers(0, 9),
    st.integers(1, 64),
    st.binary(max_size=20),
)
def test_wherever_blocks_end_the_same_lines_are_kept(
    tmp_path_factory: pytest.TempPathFactory,
    told: list[tuple[int, int, bool]],
    first_step: int,
    block_bytes: int,
    cut: bytes,
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    parts = [json.dumps({"step": s, "pad": "x" * n}).encode() if whole else b"{" * n for s, n, whole in sorted(told)]
    path.write_bytes(b"".join(part + b"\n" for part in parts) + cut.replace(b"\n", b"").replace(b"\r", b""))
    last = max((i for i, (s, _, whole) in enumerate(sorted(told)) if whole and s <= first_step), default=-1)
    feed(JsonlSink(path, first_step=first_step, block_bytes=block_bytes))
    assert path.read_bytes() == b"".join(part + b"\n" for part in parts[: last + 1])


def test_an_update_that_is_told_twice_is_one_line(tmp_path: Path) -> None:
    feed(JsonlSink(tmp_path / "metrics.jsonl"), *map(update, (1, 2, 2, 3)))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class SmallDisk(FileIO):
    """A file that takes so many bytes more, and then raises."""

    room = 0
    truncates = True

    def write(self, data: Any, /) -> int:
        if SmallDisk.room <= 0:
            raise OSError(28, "No space left on device")
        written = super().write(bytes(data)[: SmallDisk.room])
        SmallDisk.room -= written
        return written

    def truncate(self, size: int | None = None, /) -> int:
        if not SmallDisk.truncates:
            raise OSError(5, "Input/output error")
        return super().truncate(size)


@pytest.mark.parametrize("truncates", [True, False])
def test_a_line_that_a_full_disk_cut_is_taken_back_and_comes_later(tmp_path: Path, truncates: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, make_file=partial(AppendedFile, kind=SmallDisk))
    assert isinstance(sink, DurableSink)
    sink.open()
    whole = b'{"step":1,"version":1}\n'
    SmallDisk.room, SmallDisk.truncates = len(whole) + 9, True
    sink.write(update(1))
    sink.flush()
    SmallDisk.truncates = truncates
    sink.write(update(2))
    for step in (3, 4):
        with pytest.raises(OSError, match=r"No space|Input/output"):
            sink.flush()
        assert path.read_bytes() == whole if truncates else path.read_bytes().startswith(whole)
        sink.write(update(step))
    SmallDisk.room, SmallDisk.truncates = 10**6, True
    sink.flush()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    sink.close()


def test_what_was_cut_last_is_taken_back_at_the_end(tmp_path: Path) -> None:
    SmallDisk.room, SmallDisk.truncates = 5, True
    sink = JsonlSink(tmp_path / "metrics.jsonl", make_file=partial(AppendedFile, kind=SmallDisk))
    sink.open()
    sink.write(update(1))
    SmallDisk.truncates = False
    with pytest.raises(OSError, match="Input/output"):
        sink.flush()
    SmallDisk.truncates = True
    sink.close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_a_folder_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "mounted" / "metrics.jsonl"
    sink = JsonlSink(path)
    with pytest.raises(FileNotFoundError):
        sink.open()
    sink.write(update(1))
    with pytest.raises(FileNotFoundError):
        sink.flush()
    sink.settle()  # nothing is open: nothing to settle
    path.parent.mkdir()
    sink.flush()
    sink.close()
    assert [line["step"] for line in lines(path)] == [1]


def test_settling_syncs_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("troupe.records.sinks.jsonl.os.fsync", lambda descriptor: synced.append(_is_folder(descriptor)))
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open()
    sink.write(update(1))
    sink.flush()
    sink.settle()
    sink.settle()
    sink.close()
    assert synced == [False, True, False]


def _is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_steps_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert steps_between(path, 0, 9) == []
    feed(JsonlSink(path), *(update(step, loss=step / 8, kl=float("nan")) for step in range(1, 6)))
    with path.open("a") as file:
        file.write('[1]\n{"loss":1}\n{"step":6,"lo')
    assert steps_between(path, 2, 4) == [(3, {"loss": 0.375}), (4, {"loss": 0.5})]
    assert [step for step, _ in steps_between(path, 0, 9)] == [1, 2, 3, 4, 5]
    assert steps_between(path, 4, 4) == []


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (b'{"step": 2, "loss": 1.5, "kl": null, "odd": "oops", "flag": true}', (2, {"loss": 1.5, "kl": None})),
        (b'{"step": 2.0}', (2, {})),
        (b'{"step": true}', None),
        (b'{"step": 2.5}', None),
        (b'{"step": "2"}', None),
    ],
)
def test_a_line_is_a_step_and_numbers(line: bytes, step: tuple[int, dict[str, float | None]] | None) -> None:
    assert decode_step(line) == step
