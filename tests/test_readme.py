"""The README's commands, read out of the README itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from tests.tiny import CONFIG, write_tiny_model
from troupe.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("troupe ")]
TOGETHER = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
"""Those that speak with each other, from several terminals."""


def test_the_set_up_commands_call_what_is_there() -> None:
    setup = [text for kind, text in BLOCKS if kind == "bash" and "./setup.sh" in text]
    assert len(setup) == 2
    assert os.access(ROOT / "setup.sh", os.X_OK)
    assert subprocess.run(["sh", "-n", ROOT / "setup.sh"], check=False).returncode == 0


def test_continuous_integration_runs_exactly_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    shown = subprocess.run(
        ["bash", "-c", f'{extract}\nprintf %s "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "./setup.sh test && .venv/bin/pytest"


@pytest.mark.parametrize("command", [*COMMANDS, *TOGETHER])
def test_every_command_shown_has_these_options(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    subcommand = main.get_command(click.Context(main), name)
    assert subcommand is not None
    subcommand.make_context(name, list(arguments))


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
