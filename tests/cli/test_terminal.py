"""Exit codes and messages that all commands share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from troupe.cli.terminal import report_errors
from troupe.errors import ConfigError, RunError
from troupe.runtime.terminal import tell, tell_json


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (None, 0, ""),
        (ConfigError("no such key"), 2, "troupe: no such key\n"),
        (RunError("it hangs"), 3, "troupe: it hangs\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a bug"), 3, "ZeroDivisionError: a bug\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    fault: BaseException | None, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @report_errors
    def command() -> None:
        if fault is not None:
            raise fault

    ended = 0
    try:
        command()
    except SystemExit as end:
        ended = int(end.code or 0)
    assert ended == code
    assert capsys.readouterr().err.endswith(told)


def test_a_reader_who_has_gone_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    program = "from troupe.runtime.terminal import tell\nfor _ in range(3): tell('x' * 100_000)\n"
    ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_lines_and_beginnings_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a", newline=False)
    tell("b")
    tell("c", error=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("ab\n", "c\n")


def test_what_is_told_does_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a\x1b[2J\x07\nb")
    tell_json('{"name": "\x9b\u202e"}')
    tell("as\x07 it is", as_it_is=True)
    assert capsys.readouterr().out == 'a\\x1b[2J\\x07\nb\n{"name": "\\u009b\\u202e"}\nas\x07 it is\n'

    @report_errors
    def command() -> None:
        raise ConfigError("no key \x1b]0;mine\x07")

    @report_errors
    def broken() -> None:
        raise ZeroDivisionError("a bug \x1b[2J")

    for call in (command, broken):
        with pytest.raises(SystemExit):
            call()
        assert "\x1b" not in capsys.readouterr().err
