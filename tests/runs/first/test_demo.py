"""What `troupe train` promises to a stranger: the demo learns, from a clone and from a wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


def run_demo(out: Path, *flags: str, **environment: str) -> dict[str, Any]:
    """Run `troupe train -o OUT` in a process of its own, outside the repository; its summary.json."""
    command = [sys.executable, "-m", "troupe", "train", "-o", str(out), *flags]
    env = os.environ | environment
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_the_demo_reaches_ninety_percent_within_two_minutes(tmp_path: Path, seed: int) -> None:
    summary = run_demo(tmp_path / "out", "--seed", str(seed))
    assert 0.2 <= summary["accuracy_before"] <= 0.5
    assert summary["accuracy_after"] >= 0.9
    assert summary["wall_s"] <= 120
    assert summary["closed_groups"] == {"trained": summary["steps"] * batch_size(tmp_path / "out")}


def test_the_same_seed_gives_the_same_weights_in_two_processes(tmp_path: Path) -> None:
    finals = []
    for name in ("one", "two"):
        run_demo(tmp_path / name, "--max-steps", "4")
        finals.append((tmp_path / name / "final" / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]


def test_the_wheel_has_everything_the_demo_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("troupe-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    where = subprocess.run(
        [sys.executable, "-c", "import troupe; print(troupe.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    summary = run_demo(tmp_path / "out", "--max-steps", "2", PYTHONPATH=str(site))
    assert summary["steps"] == 2
    (tmp_path / "broken" / "mlx").mkdir(parents=True)  # as on Linux without a backend
    (tmp_path / "broken" / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: no such file')\n")
    told = subprocess.run(
        [sys.executable, "-m", "troupe", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'broken'}:{site}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "pip install 'mlx[cpu]>=" in told, "not a clone, which a user of the wheel does not have"
    assert "setup.sh" not in told


def batch_size(out: Path) -> int:
    from troupe import load_config

    return load_config(out / "run.toml").learner.batch_size
