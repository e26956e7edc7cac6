"""Unit files, read back as the systems read them."""

from __future__ import annotations

import configparser
import plistlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from troupe.daemon.orders import Order
from troupe.daemon.units import launchd, systemd
from troupe.errors import ConfigError

ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the shell a unit is printed in."""
    monkeypatch.setenv("PATH", "/opt/my $tools:/usr/100%/bin")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)


def test_what_no_unit_can_say_of_the_environment_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/opt\nExecStart=/bin/true")
    assert "Environment" not in systemd(an_order(tmp_path))


def an_order(folder: Path) -> Order:
    """One whose names want every kind of escape."""
    (folder / "my runs").mkdir()
    run_toml = folder / "my runs" / "100%.toml"
    run_toml.write_text("")
    return Order.given(run_toml, str(folder / "my runs" / "out $1"), ['rewards.functions=["a\\"b"]'], ["learner.lr"])


def command(order: Order) -> list[str]:
    return [
        sys.executable,
        "-P",
        "-m",
        "troupe",
        "daemon",
        str(order.run_toml),
        "--output",
        str(order.output),
        "--set",
        'rewards.functions=["a\\"b"]',
        "--allow-change",
        "learner.lr",
    ]


def parsed(text: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


def test_systemds_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    order = an_order(tmp_path)
    unit = parsed(systemd(order))
    service = dict(unit["Service"])
    started = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(service.pop("ExecStart"))]
    assert started == command(order)
    assert service == {
        "Type": "exec",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "WorkingDirectory": str(tmp_path),
        "Environment": '"PATH=/opt/my $tools:/usr/100%%/bin"',
        "KillMode": "mixed",
        "TimeoutStopSec": "3600",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "RestartSec": "30",
    }
    assert dict(unit["Install"]) == {"WantedBy": "default.target"}
    assert "~/.config/systemd/user/troupe-out-1.service" in systemd(order)


@pytest.mark.skipif(ANALYZE is None, reason="there is no systemd here")
def test_systemd_itself_finds_nothing_amiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unit = tmp_path / "troupe-test.service"
    unit.write_text(systemd(an_order(tmp_path)))
    told = subprocess.run([str(ANALYZE), "verify", "--user", unit], capture_output=True, text=True, check=False)
    assert "troupe-test" not in told.stderr, told.stderr


def test_launchds_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    order = an_order(tmp_path)
    agent = plistlib.loads(launchd(order).encode())
    assert agent == {
        "Label": "troupe-out-1",
        "ProgramArguments": command(order),
        "WorkingDirectory": str(tmp_path),
        "EnvironmentVariables": {"PATH": "/opt/my $tools:/usr/100%/bin", "OPENBLAS_CORETYPE": "Haswell"},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": 3600,
        "ProcessType": "Interactive",
        "StandardErrorPath": "/dev/null",
        "StandardOutPath": "/dev/null",
    }


@pytest.mark.parametrize("name", ["two\nExecStart=/bin/true", "bell\a", "no text \udcff", "line goes on\\"], ids=ascii)
@pytest.mark.parametrize("unit", [systemd, launchd])
def test_what_no_unit_can_say(unit: Callable[[Order], str], name: str) -> None:
    with pytest.raises(ConfigError, match="no unit file can name this"):
        unit(Order(run_toml=Path("/home/me/RUN.toml"), output=Path("/home/me") / name))


def test_the_examples_are_what_is_printed() -> None:
    """But for the paths, which are of a machine."""
    folder = Path(__file__).parents[2] / "examples" / "daemon"
    order = Order(run_toml=Path("/home/me/kind/RUN.toml"), output=Path("/home/me/kind/run"))
    shown, printed = parsed((folder / "troupe-run.service").read_text()), parsed(systemd(order))
    started = shlex.split(shown["Service"].pop("ExecStart")), shlex.split(printed["Service"].pop("ExecStart"))
    assert started[0][1:] == started[1][1:]
    assert shown["Service"].pop("WorkingDirectory") == "/home/me/kind"
    printed["Service"].pop("WorkingDirectory")
    assert shown["Service"].pop("Environment") == '"PATH=/home/me/kind/.venv/bin:/usr/local/bin:/usr/bin:/bin"'
    printed["Service"].pop("Environment")
    assert {name: dict(shown[name]) for name in shown} == {name: dict(printed[name]) for name in printed}
    agent = plistlib.loads((folder / "troupe-run.plist").read_bytes())
    expected = plistlib.loads(launchd(order).encode())
    assert agent["ProgramArguments"][1:] == expected["ProgramArguments"][1:]
    for table in (agent, expected):
        del table["ProgramArguments"], table["WorkingDirectory"], table["EnvironmentVariables"]["PATH"]
    assert agent == expected
