"""What `setup.sh` says on a Mac, before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = ("sh", "dirname", "basename", "cat", "readlink")


class Mac:
    """A clone on a Mac, whose programs say what they are told to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = folder / "programs"
        self._programs.mkdir()
        shutil.copy(ROOT / "setup.sh", folder)
        for name in REAL:
            found = shutil.which(name)
            assert found is not None
            (self._programs / name).symlink_to(found)
        self.machine("arm64")
        self.release("15.5")
        self.translated(None)

    def program(self, name: str, does: str) -> Path:
        file = self._programs / name
        file.write_text(f"#!/bin/sh\n{does}\n")
        file.chmod(0o755)
        return file

    def machine(self, name: str) -> None:
        self.program("uname", f'if [ "${{1:-}}" = -m ]; then echo {name}; else echo Darwin; fi')

    def release(self, number: str) -> None:
        self.program("sw_vers", f"echo {number}")

    def translated(self, answer: str | None) -> None:
        self.program("sysctl", "exit 1" if answer is None else f"echo {answer}")  # older systems do not know the name

    def python(self, name: str, machine: str) -> None:
        """One that says for which processor it is, and notes what else it is asked to do."""
        self.program(
            name, f'case "$*" in *platform*) echo {machine} ;; *sys.exit*) ;; *) echo "{name} $@" >> called ;; esac'
        )

    def set_up(self, **environment: str) -> tuple[int, str]:
        ended = subprocess.run(
            ["sh", "setup.sh"],
            cwd=self._folder,
            env={"PATH": str(self._programs), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return ended.returncode, ended.stderr

    @property
    def called(self) -> str:
        file = self._folder / "called"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    return Mac(tmp_path)


def test_a_native_python_on_a_new_system_is_used(mac: Mac, tmp_path: Path) -> None:
    mac.python("python3.12", "arm64")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(
        mac.program("in-venv", 'case "$*" in *platform*) echo arm64 ;; *) echo "venv $@" >> called ;; esac'),
        tmp_path / ".venv" / "bin" / "python",
    )
    assert mac.set_up() == (0, "")
    assert mac.called == "venv -m pip install --quiet --disable-pip-version-check -e .\n"


@pytest.mark.parametrize(
    ("release", "fine"), [("13.6.7", False), ("12.0", False), ("14.0", True), ("15.5", True), ("26.1", True)]
)
def test_a_system_that_is_too_old(mac: Mac, release: str, fine: bool) -> None:
    mac.release(release)
    mac.python("python3.12", "arm64")
    _, told = mac.set_up()
    refusal = f"setup.sh: this is macOS {release}, and MLX needs macOS 14 or newer; update the system\n"
    assert (told == refusal) is not fine
    assert mac.called.startswith("python3.12 -m venv" if fine else "")
    assert bool(mac.called) is fine, "where it is too old nothing was begun"


def test_another_processor(mac: Mac) -> None:
    mac.machine("x86_64")
    mac.python("python3.12", "x86_64")
    assert mac.set_up() == (
        1,
        "setup.sh: this Mac's processor is x86_64, and MLX needs Apple silicon (arm64)\n",
    )
    assert mac.called == ""


def test_a_shell_under_rosetta(mac: Mac) -> None:
    mac.machine("x86_64")
    mac.translated("1")
    code, told = mac.set_up()
    assert code == 1
    assert "this shell is translated by Rosetta" in told
    assert "arch -arm64 ./setup.sh" in told


def test_rosetta_s_python(mac: Mac) -> None:
    mac.python("python3.13", "x86_64")
    code, told = mac.set_up()
    assert code == 1
    assert "python3.13 is a Python for Intel Macs (Rosetta), and MLX has no packages for it" in told
    assert mac.called == ""
    mac.python("python3.11", "arm64")
    mac.set_up()
    assert mac.called.startswith("python3.11 -m venv .venv\n"), "a native one further down is found"


def test_an_environment_of_rosetta_s_python(mac: Mac, tmp_path: Path) -> None:
    mac.python("python3.12", "arm64")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(mac.program("in-venv", "echo x86_64"), tmp_path / ".venv" / "bin" / "python")
    code, told = mac.set_up()
    assert code == 1
    assert told.startswith("setup.sh: .venv was made by a Python for Intel Macs (Rosetta); remove it (rm -r .venv)")
    assert mac.called == ""


def test_a_mac_without_a_new_python(mac: Mac) -> None:
    mac.program("python3", "exit 1")
    code, told = mac.set_up()
    assert code == 1
    assert told.startswith("setup.sh: no Python 3.11 or newer found; install one (macOS: brew install python@3.13)")
