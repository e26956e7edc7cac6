"""Logs of the form that wandb writes, made by hand; those of the real wandb are in `runs/records/test_tracked.py`."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from troupe.records.sinks.wandb_files import newest_offline_step, records

BLOCK = 32768


class Record(SimpleNamespace):
    """In the place of wandb's message: `step:padding`, or anything else."""

    @classmethod
    def FromString(cls, data: bytes) -> Record:  # noqa: N802
        step = data.partition(b":")[0]
        return cls(data=data, history=SimpleNamespace(step=SimpleNamespace(num=int(step) if step.isdigit() else -1)))

    def WhichOneof(self, name: str) -> str:  # noqa: N802
        return "history" if self.history.step.num >= 0 else "summary"


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in {"wandb": {}, "wandb.proto": {}, "wandb.proto.wandb_internal_pb2": {"Record": Record}}.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**module))


def log_of(*told: bytes) -> bytes:
    log = b":W&B\xe1\xbe\x00"
    for data in told:
        first = True
        while True:
            left = BLOCK - len(log) % BLOCK
            if left < 7:
                log += b"\0" * left
                continue
            piece, data = data[: left - 7], data[left - 7 :]
            kind = (1 if first else 4) if not data else (2 if first else 3)
            log += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
            if not data:
                break
    return log


def write(folder: Path, start: int, log: bytes) -> Path:
    path = folder / "wandb" / f"offline-run-2026_{start}-abc" / "run-abc.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(log)
    return path


@pytest.mark.parametrize("padding", [0, 5, 1000, BLOCK - 7 - 7 - 2, BLOCK - 7 - 7 - 3, 100_000])
def test_records_are_read_wherever_blocks_end(tmp_path: Path, padding: int) -> None:
    told = [f"{step}:".encode() + b"x" * padding for step in range(10)]
    path = write(tmp_path, 1, log_of(*told))
    assert [record.data for record in records(path)] == told
    later = [record.data for record in records(path, 1)]
    assert later == told[len(told) - len(later) :]


def test_the_newest_step_is_found_from_the_end_of_the_newest_log(tmp_path: Path) -> None:
    assert newest_offline_step(tmp_path, "abc") is None
    write(tmp_path, 0, log_of(b"header"))
    assert newest_offline_step(tmp_path, "abc") == 0
    write(tmp_path, 1, log_of(b"header", *(f"{step}:".encode() + b"x" * 9000 for step in range(1, 400))))
    assert newest_offline_step(tmp_path, "abc") == 399
    assert newest_offline_step(tmp_path, "other") is None
    write(tmp_path, 2, log_of(b"header", b"exit", b"summary" * BLOCK * 40))
    assert newest_offline_step(tmp_path, "abc") == 399
    write(tmp_path, 3, log_of(b"400:", b"401:")[:-1])  # the end was cut
    assert newest_offline_step(tmp_path, "abc") == 400
    write(tmp_path, 4, b"")
    assert newest_offline_step(tmp_path, "abc") == 400


def test_a_log_that_cannot_be_read_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes) -> Any:
        raise ValueError("another format")

    monkeypatch.setattr(Record, "FromString", refuse)
    write(tmp_path, 1, log_of(b"1:"))
    assert newest_offline_step(tmp_path, "abc") is None
