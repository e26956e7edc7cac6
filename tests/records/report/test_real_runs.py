"""Reports of runs that were made: one that ends as it should, and one that is killed and gone on with."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

import troupe
from tests.records.report.pages import Page
from tests.support.kills import Trainer, newest_step, write_run
from troupe.cli.report import report
from troupe.records.report.picture import read_run


def lines_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def page_of(out: Path) -> Page:
    result = CliRunner().invoke(report, [str(out)])
    assert result.exit_code == 0, result.output
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_a_run_from_its_beginning_to_its_end(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('[{"prompt": "Hello, w"}, {"prompt": "12+34="}]')
    out = tmp_path / "out"
    table = {
        "model": {"path": str(tiny_model)},
        "data": {"path": str(tmp_path / "prompts.json")},
        "generation": {"max_completion_length": 6, "num_generations": 2},
        "rewards": {"functions": ["diversity"]},
        "learner": {"lr": 1e-3, "max_steps": 3, "batch_size": 2},
        "metrics": {"sinks": ["jsonl", "sqlite"]},
        "output": str(out),
    }
    result = troupe.train(troupe.load_config(None, [table]))
    run = read_run(out)
    assert (run.state, run.step, run.total_steps, run.notes) == ("finished", 3, 3, ())
    lines = lines_of(out)
    assert run.metrics.steps == (1, 2, 3)
    for name in ("reward", "loss", "entropy", "grad_norm", "completions/mean_length", "step_time", "num_tokens"):
        assert run.metrics.curves[name].mean == tuple(line[name] for line in lines)
    assert run.metrics.sums.seconds == pytest.approx(sum(line["step_time"] for line in lines))
    assert set(run.metrics.sums.shares) >= {"generator/busy", "learner/busy", "scorer/idle"}
    assert run.stored.overview is not None
    assert run.stored.overview.groups == result.closed_groups == {"trained": 6}
    assert [samples.step for samples in run.stored.samples] == [1, 3]
    assert "processors" in run.stored.machines[1]
    page = page_of(out)
    assert "finished" in page.within("span")
    [loss] = [chart for chart in page.data["charts"] if chart["title"] == "Loss"]
    assert loss["series"][0]["y"] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert {path.name for path in out.glob("run.sqlite*")} == {"run.sqlite"}


@pytest.mark.slow
def test_a_run_that_is_watched_killed_and_gone_on_with(tmp_path: Path) -> None:
    steps = 20_000  # far more than it comes to
    config, out = write_run(tmp_path, learner__max_steps=steps), tmp_path / "out"
    trainer = Trainer(config, out)
    assert trainer.wait_until(lambda: newest_step(out) >= 4)
    page = page_of(out)
    assert "running" in page.within("span")
    assert max(page.data["axes"][0]["step"]) >= 4
    trainer.kill()
    left = {path.name for path in out.iterdir()}
    run = read_run(out)
    assert (run.state, run.total_steps) == ("crashed", steps)
    assert run.step >= 4
    assert page_of(out).data["axes"][0]["step"] == list(range(1, run.step + 1))
    assert {path.name for path in out.iterdir()} == left
    trainer = Trainer(config, out)
    assert trainer.wait_until(lambda: newest_step(out) >= run.step + 2)
    trainer.process.send_signal(signal.SIGINT)
    assert trainer.wait() == 130
    run = read_run(out)
    assert (run.state, len(run.stored.starts), len(run.stored.machines)) == ("stopped", 2, 2)
    [mark] = page_of(out).data["marks"]
    assert mark["step"] == run.stored.starts[1].first_step >= 4
