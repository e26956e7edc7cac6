"""The checkpoint benchmark says what it measured; its figures are for a quiet machine, and are not a test."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks import bench_checkpoint as bench
from tests.support.tiny import CONFIG


def test_a_step_is_compared_with_those_around_it() -> None:
    learned = [(0.0, 9.0), (10.0, 20.0), (20.0, 30.0), (30.0, 42.0), (42.0, 56.0), (60.0, 72.0), (72.0, 82.0)]
    spans = {"learn": learned, "checkpoint": [(9.0, 15.0), (30.0, 40.0), (60.0, 75.0), (82.0, 90.0)]}
    found = bench.compared(spans)
    # the first is of a step that warms up; beside the second lie 10 and 14, beside the third 14 and 10
    assert found["measured"] == 2
    assert found["cost"] == pytest.approx(((12 / 12 - 1) + (15 / 12 - 1)) / 2)
    assert found["spilled"] == 0.3
    assert (found["beside_s"], found["without_s"], found["write_s"], found["ok"]) == (12.0, 12.0, 10.0, False)
    assert bench.compared({"learn": learned, "checkpoint": [(30.0, 40.0), (82.0, 90.0)]})["ok"]
    with pytest.raises(SystemExit, match="no write went on beside a step"):
        bench.compared({"learn": learned, "checkpoint": [(9.0, 15.0), (82.0, 90.0)]})


@pytest.mark.slow
def test_a_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "POLICY", msgspec.structs.replace(CONFIG, max_position_embeddings=64))
    shape = ["--pairs", "4", "--prompts", "2", "--group", "2", "--new-tokens", "4", "--generator", "thread"]
    bench.write_inputs(tmp_path, 2)
    found = bench.run(tmp_path, bench.parse(shape))
    assert found["measured"] >= 1
    assert found["cost"] > -1 < found["beside_s"]
    assert found["write_s"] > 0
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert found["checkpoint_gb"] == round(sum(file.stat().st_size for file in newest.iterdir()) / 1e9, 3)
