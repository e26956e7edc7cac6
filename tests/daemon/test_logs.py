"""The daemon's log: where it goes, how long it gets, what it survives."""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import sys
from pathlib import Path

import pytest

from troupe.daemon import logs
from troupe.daemon.logs import LOGGER, logging_into, set_limits
from troupe.records.layout import LOG
from troupe.run.daemon_settings import DaemonConfig


def test_lines_go_into_the_file_and_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = LOGGER.level, LOGGER.propagate, list(LOGGER.handlers)
    with logging_into(tmp_path, DaemonConfig(log_level="warning")):
        LOGGER.info("not worth it")
        LOGGER.warning("a %s", "warning")
    LOGGER.warning("too late")
    text = (tmp_path / LOG).read_text()
    assert text.endswith(" WARNING a warning\n")
    assert text.count("\n") == 1
    assert capsys.readouterr().err.startswith(text)
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before


def test_it_goes_on_where_it_was_and_gives_way_to_a_new_one(tmp_path: Path) -> None:
    config = DaemonConfig(log_bytes=10_000, log_files=2)
    for _ in range(2):
        with logging_into(tmp_path, config):
            for number in range(200):
                LOGGER.info("%0100d", number)
    assert {path.name for path in tmp_path.iterdir()} == {LOG, f"{LOG}.1", f"{LOG}.2"}
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())
    assert (tmp_path / LOG).read_text().rstrip().endswith("0199")


def test_a_full_disk_and_a_closed_terminal_disturb_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)

    def full(self: logging.Handler, record: logging.LogRecord) -> None:
        self.handleError(record)

    with logging_into(tmp_path, DaemonConfig()):
        LOGGER.info("one")
        monkeypatch.setattr(logging.handlers.RotatingFileHandler, "emit", full)
        LOGGER.info("two")
    assert (tmp_path / LOG).read_text().endswith("one\n")


def test_a_stderr_that_nobody_reads_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PATIENCE_S", 0.05)
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with logging_into(tmp_path, DaemonConfig()):
            for number in range(3000):  # more than a pipe holds, and more than may wait
                LOGGER.info("%0100d", number)
        lines = (tmp_path / LOG).read_text().splitlines()
        assert [int(line.split()[-1]) for line in lines] == list(range(3000)), "the file has them all"
        assert os.read(ours, 1000).split(b"\n")[0].decode() == lines[0]
        os.close(ours)  # its writer is let go


def test_a_log_that_cannot_even_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_close = logging.handlers.RotatingFileHandler.close

    def close(handler: logging.handlers.RotatingFileHandler) -> None:
        really_close(handler)
        raise OSError(28, "No space left on device")

    with logging_into(tmp_path, DaemonConfig()):
        LOGGER.info("one")
        monkeypatch.setattr(logging.handlers.RotatingFileHandler, "close", close)
    assert LOGGER.handlers == []


def test_the_last_lines_are_there_when_it_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_into(tmp_path, DaemonConfig()):
        for number in range(500):
            LOGGER.info("line %d", number)
    assert capfd.readouterr().err.count("line ") == 500


def test_a_folder_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_into(tmp_path / "gone", DaemonConfig()):
        LOGGER.info("still told")
    assert "still told" in capsys.readouterr().err


def test_text_that_is_no_utf8_is_told_all_the_same(tmp_path: Path) -> None:
    with logging_into(tmp_path, DaemonConfig()):
        LOGGER.info("into %s", "run-\udcff")
    assert (tmp_path / LOG).read_text(encoding="utf-8").endswith("into run-\\udcff\n")


def test_the_limits_may_change(tmp_path: Path) -> None:
    with logging_into(tmp_path, DaemonConfig()):
        set_limits(DaemonConfig(log_bytes=10_000, log_files=1))
        for number in range(300):
            LOGGER.info("%0100d", number)
    assert {path.name for path in tmp_path.iterdir()} == {LOG, f"{LOG}.1"}
    assert all(path.stat().st_size <= 10_000 for path in tmp_path.iterdir())
