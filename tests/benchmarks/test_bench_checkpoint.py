"""The checkpoint benchmark says what it measured; its figures are for a quiet machine, and are not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import bench_checkpoint as bench
from tests.tiny import CONFIG


def figures(every: int, learn_s: float, wait_s: float, peak_gb: float) -> dict[str, Any]:
    both_s = learn_s + wait_s
    return {"every": every, "learn_s": learn_s, "both_s": both_s, "step_s": 2 * both_s, "peak_gb": peak_gb}


def test_the_best_runs_are_compared_and_waiting_counts() -> None:
    runs = [figures(10_000, 1.0, 0.0, 3.0), figures(1, 1.01, 0.05, 4.5), figures(1, 1.3, 0.0, 4.0)]
    found = bench.compared(runs)
    assert (found["learn_cost"], found["cost"], found["step_cost"]) == pytest.approx((0.01, 0.06, 0.06))
    assert (found["beside_gb"], found["ok"]) == (1.5, False)
    assert bench.compared([*runs, figures(1, 1.015, 0.0, 4.0)])["ok"]


def test_a_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "POLICY", msgspec.structs.replace(CONFIG, max_position_embeddings=64))
    shape = ["--steps", "1", "--prompts", "2", "--group", "2", "--new-tokens", "4", "--generator", "thread"]
    bench.write_inputs(tmp_path, 2)
    found = bench.play(tmp_path, 1, bench.parse(shape))
    assert found["every"] == 1
    assert 0 < found["learn_s"] <= found["both_s"] == pytest.approx(found["learn_s"] + found["wait_s"], abs=2e-4)
    assert found["write_s"] is not None
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert found["checkpoint_gb"] == round(sum(file.stat().st_size for file in newest.iterdir()) / 1e9, 3)
