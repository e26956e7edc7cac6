"""The example that kills itself and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import run_command


@pytest.mark.slow
def test_the_killed_run_becomes_the_same(tmp_path: Path) -> None:
    done = run_command("python examples/resume_after_kill.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended with SIGKILL, and left step-00000005" in done.stdout
    assert done.stdout.count("begins with step 1\n") == 2
    assert done.stdout.count("begins with step 6\n") == 1
    for what in ("weights", "rewards of every step", "completions"):
        assert f"{what}: the same (" in done.stdout
    assert list(tmp_path.iterdir()) == []
