"""The program: which command loads what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from troupe import __main__ as program
from troupe.cli.control import control
from troupe.cli.main import main

LOOK = (
    "import atexit, runpy, sys; sys.argv = ['troupe', *sys.argv[1:]]; "
    "names = ('mlx.core', 'numpy', 'troupe.run.config', 'rich'); "
    "atexit.register(lambda: print(*(m for m in names if m in sys.modules))); "
    "runpy.run_module('troupe', run_name='__main__')"
)


def called(*arguments: str) -> tuple[int, str, str]:
    ended = subprocess.run([sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_who_speaks_with_a_run_loads_no_mlx(tmp_path: Path) -> None:
    code, out, err = called("status", str(tmp_path))
    assert (code, out) == (2, "\n")
    assert "no run.toml" in err
    (tmp_path / "RUN.toml").write_text("")
    code, out, _ = called("daemon", str(tmp_path / "RUN.toml"), "-o", str(tmp_path / "o"), "--print-unit", "systemd")
    assert code == 0
    assert out.endswith("WantedBy=default.target\n\n")


def test_every_command_is_listed_once() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in control.commands:
        assert main.get_command(click.Context(main), name) is control.commands[name]
        assert result.stdout.count(f"\n  {name} ") == 1


def test_any_other_command_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["troupe", "--version"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("troupe, version ")


def test_a_command_for_a_run_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["troupe", "pause", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2
    assert "no run is live" in capsys.readouterr().err
