"""The product without numpy, which no dependency of its core brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import runpy, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
sys.argv[0] = "troupe"
runpy.run_module("troupe", run_name="__main__")
"""
REWARDS = ("length", "diversity", "exact_answer", "think_format", "format:4", "repetition_penalty", "soft_overlong:9:4")


def troupe(*arguments: str | Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_used_without_numpy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    troupe("train", "-o", out, "--set", "learner.max_steps=1")
    troupe("train", "-o", out, "--resume", "--set", "learner.max_steps=2", "--allow-change", "learner.max_steps")
    assert troupe("generate", "-m", out / "final", "-p", "3+4=", "--max-new-tokens", "5")
    flags = [part for name in REWARDS for part in ("--reward", name)]
    assert "soft_overlong" in troupe("eval", "-m", out / "final", *flags, "--max-new-tokens", "8")
