"""Examples as their head comments say: in processes of their own, in a folder that is not the repository."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 240.0


def imported(file: str) -> ModuleType:
    """An example as a module of its own."""
    path = EXAMPLES / file
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(line: str) -> list[str]:
    """A command line of an example, whose programs are ours."""
    program, *arguments = shlex.split(line, comments=True)
    words = [word.replace("examples/", f"{EXAMPLES}/") for word in arguments]
    own = {"python": [sys.executable], "troupe": [sys.executable, "-m", "troupe"]}
    return [*own.get(program, [program]), *words]


def run_command(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in `folder`, and wait for its end."""
    return subprocess.run(
        command(line),
        cwd=folder,
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
