"""Prompts that all runs were asked."""

from __future__ import annotations

from pathlib import Path

from tests.records.compare.runs import evaluated, make_run, nobody
from troupe.records.compare.prompts import shared_held_out, shared_in_training
from troupe.records.compare.runs import read_runs


def test_of_training_the_first_and_the_last_answers(tmp_path: Path) -> None:
    long, short = make_run(tmp_path / "long", [0.1, 0.2, 0.3]), make_run(tmp_path / "short", [0.5])
    found = shared_in_training([long, short])
    assert found
    for one in found:
        (first, last), (only, same) = one.answers
        assert first.step == 1
        assert last.step >= first.step
        assert only == same
        assert [sample.reward for sample in only.samples] == [1.0, 0.5]
    (long / "run.sqlite").unlink()
    assert shared_in_training([long, short]) == []


def test_of_held_out_rows_those_that_they_disagree_about(tmp_path: Path) -> None:
    asked = {
        "x": ({"a": 0.5, "b": 0.0}, {"a": 0.5, "b": 0.0}),
        "y": ({"b": 0.0, "a": 0.0}, {"b": 1.0, "a": 0.5}),
    }
    folders = []
    for name, versions in asked.items():
        told = [
            evaluated(version, {prompt: (score,) for prompt, score in {**scores, f"only {name}": 1.0}.items()})
            for version, scores in enumerate(versions)
        ]
        folders.append(make_run(tmp_path / name, [0.1], evaluations=told))
    b, a = shared_held_out([run.held_out for run in read_runs(folders, nobody).runs])
    assert (b.source, b.prompt, a.prompt) == ("sums", "b", "a")
    (before, after), _ = b.answers
    assert [(one.step, one.samples[0].text) for one in (before, after)] == [(0, "b 0 0"), (1, "b 1 0")]
