"""Unit files that have the system keep a daemon alive: systemd's and launchd's. Text only; installs nothing."""

import os
import plistlib
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from troupe.daemon.orders import Order
from troupe.errors import ConfigError

_STOP_S = 3600
"""That a stop may take: the steps in hand are finished, and a checkpoint is written."""
_PAUSE_S = 30


def systemd(order: Order) -> str:
    """A service of the user's (or the system's) systemd that runs this order. ConfigError where no unit can say it."""
    _check(order)
    return "\n".join(
        [
            f"# Store this as ~/.config/systemd/user/{_name(order)}.service, then: systemctl --user enable --now",
            f"# {_name(order)}. To keep it running when you log out: loginctl enable-linger",
            "[Unit]",
            f"Description={_escaped(f'Troupe trains in {order.output}')}",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(map(_quoted, _command(order)))}",
            "ExecReload=/bin/kill -HUP $MAINPID",
            f"WorkingDirectory={_escaped(str(Path.cwd()))}",
            *(f'Environment="{_in_quotes(f"{name}={value}")}"' for name, value in _environment().items()),
            "# SIGTERM goes to the daemon alone, which finishes the steps in hand and saves",
            "KillMode=mixed",
            f"TimeoutStopSec={_STOP_S}",
            "# 2: the configuration or its inputs cannot be used, which no restart mends",
            "Restart=on-failure",
            "RestartPreventExitStatus=2",
            f"RestartSec={_PAUSE_S}",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def launchd(order: Order) -> str:
    """A launch agent that runs this order. ConfigError where no unit can say it."""
    _check(order)
    return plistlib.dumps(
        {
            "Label": _name(order),
            "ProgramArguments": list(_command(order)),
            "WorkingDirectory": str(Path.cwd()),
            **({"EnvironmentVariables": found} if (found := _environment()) else {}),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _PAUSE_S,
            "ExitTimeOut": _STOP_S,
            "ProcessType": "Interactive",  # a background one is slowed down
            "StandardErrorPath": "/dev/null",  # it is all in daemon.log, which does not grow without end
            "StandardOutPath": "/dev/null",
        },
        sort_keys=False,
    ).decode()


def _check(order: Order) -> None:
    """A line break would begin another line of the unit, and a backslash before one joins two."""
    for text in map(str, (order.run_toml, order.output, Path.cwd())):
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in text) or text.endswith("\\"):
            raise ConfigError(f"{text!r}: no unit file can name this; give it a name of printable characters")


def _environment() -> dict[str, str]:
    """What of this shell decides what is computed: where programs are found, the compiler among them, and which kernels
    OpenBLAS takes."""
    found = {name: os.environ[name] for name in ("PATH", "OPENBLAS_CORETYPE") if os.environ.get(name)}
    return {
        name: value
        for name, value in found.items()
        if not any(unicodedata.category(char) in ("Cc", "Cs") for char in value)
    }


def _command(order: Order) -> Sequence[str]:
    settings = [part for setting in order.settings for part in ("--set", setting)]
    allowed = [part for key in order.allow_changes for part in ("--allow-change", key)]
    daemon = (sys.executable, "-P", "-m", "troupe", "daemon", str(order.run_toml), "--output", str(order.output))
    return (*daemon, *settings, *allowed)


def _name(order: Order) -> str:
    return "troupe-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", order.output.name).strip("-") or "run")


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _in_quotes(text: str) -> str:
    return _escaped(text).replace("\\", "\\\\").replace('"', '\\"')


def _quoted(argument: str) -> str:
    """One argument of ExecStart."""
    escaped = _in_quotes(argument).replace("$", "$$").replace("\n", "\\n")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./-]", escaped) or not escaped else escaped
