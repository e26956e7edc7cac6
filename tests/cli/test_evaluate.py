"""`troupe eval` with several samples and several models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.records.sinks.steps import evaluated
from tests.support.fakes import write_ragged_model
from tests.support.runs import call, done
from troupe.cli.checkpoints import checkpoint_named
from troupe.cli.evaluation_lines import Evaluated, comparison_lines, figures_shown, lines_of_many, rows_that_differ
from troupe.errors import InputError
from troupe.messages import EvaluatedRow, EvaluatedSample
from troupe.records.evaluations import write_evaluations
from troupe.rewards.estimates import figures
from troupe.run.evaluate import Evaluation

SCORE = (
    "def f(completions, n, **columns):\n    return [float(len(text) % 2 == i % 2) for text, i in zip(completions, n)]\n"
)


def of_scores(name: str, scores: list[list[float | None]]) -> Evaluated:
    rows = tuple(
        EvaluatedRow(
            row=row,
            prompt=f"{row}+1=\n" + "x" * 99,
            columns={},
            samples=tuple(
                EvaluatedSample(text="1", tokens=1, finish_reason="stop", score=score, scores={"right": score})
                for score in of_row
            ),
        )
        for row, of_row in enumerate(scores)
    )
    return Evaluated(name, Evaluation(table=rows, figures=figures(rows)), 1.0)


FIRST = of_scores("a", [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [None, None]])
SECOND = of_scores("b", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])


def test_models_are_lines_of_a_table_and_compared_with_the_first() -> None:
    shown = figures_shown(SECOND.found, asked=False)
    assert shown == ["avg@2", "pass@1", "pass@2", "length", "clipped"]
    assert "missing" in figures_shown(FIRST.found, asked=False)
    text = list(lines_of_many([FIRST, SECOND], shown, 200))
    titles = "model  avg@2  pass@1  pass@2  tokens a completion  cut at the limit  seconds"
    assert re.split(r" {2,}", text[0]) == titles.split("  ")
    assert text[1].split()[:4] == ["a", "0.5000", "±", "0.2887"]
    assert text[3:] == [
        "",
        "b against a: mean score +0.0000 (95 % between -1.2421 and +1.2421)",
        "  1 row better, 1 worse, 1 equal, 1 left out (no score)",
        "  this may be noise: p = 1, exact sign test over 3 rows",
    ]
    assert list(rows_that_differ(FIRST, SECOND)) == [
        "  better row 0: 0 → 0.5  0+1= " + "x" * 54 + "…",
        "  worse row 2: 0.5 → 0  2+1= " + "x" * 54 + "…",
    ]
    narrow = list(lines_of_many([FIRST, SECOND], shown, 30))
    assert max(map(len, narrow[:3])) <= 30


def test_what_is_beyond_noise_is_said_and_what_cannot_be_compared() -> None:
    good, bad = (of_scores(name, [[value]] * 20) for name, value in (("good", 1.0), ("bad", 0.0)))
    assert "  more than noise: p = 1.9e-06, exact sign test over 20 rows" in list(comparison_lines(bad, good))
    none = of_scores("none", [[None]] * 20)
    assert list(comparison_lines(bad, none)) == ["none: no row has a score of both it and bad"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, rows and a reward, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_ragged_model(tmp_path / "models" / "a")
    write_ragged_model(tmp_path / "models" / "b")
    Path("r.py").write_text(SCORE)
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": text, "n": n}) + "\n" for n, text in enumerate("abcdef")))
    return tmp_path


def test_two_models_in_one_object_and_a_file_that_is_gone_on_with(desk: Path) -> None:
    flags = ["eval", "-m", "models/a", "-m", "models/b", "-d", "p.jsonl", "--reward", "r.py:f", "-n", "4"]
    flags += ["--limit", "5", "--pass-at", "1,3", "--max-new-tokens", "4", "--jsonl", "all.jsonl", "--rows", "--json"]
    told: dict[str, Any] = json.loads(done(*flags))
    assert [one["model"] for one in told["models"]] == ["a", "b"]
    assert {name for name in told["models"][0]["figures"] if "pass@" in name} >= {"pass@1", "pass@3"}
    [comparison] = told["comparisons"]
    assert comparison["better"] + comparison["worse"] + comparison["equal"] == comparison["rows"] == 5
    assert len(comparison["rows_better"]) == comparison["better"]
    again = call(*flags)
    assert "note: all.jsonl has 5 of 5 rows of b already" in again.stderr
    figures_again = [one["figures"] for one in json.loads(again.stdout)["models"]]
    assert figures_again == [one["figures"] for one in told["models"]]
    text = done(*flags[:-2]).splitlines()
    assert text[0].endswith("4 samples a row at temperature 1")
    assert text[1].startswith("model")


def test_a_prompt_that_is_too_long_for_the_second_model_is_told_before_the_first_is_asked(desk: Path) -> None:
    config = desk / "models" / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 9}))
    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * 9, "n": 1}) + "\n")
    result = call("eval", "-m", "models/a", "-m", "models/b", "-d", "long.jsonl", "--reward", "r.py:f", "--jsonl", "c")
    assert result.exit_code == 2
    assert "has 9 tokens, at most 8" in result.stderr
    assert not Path("c").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-m", "models/a", "-m", "gone"), "gone: no such model folder"),
        (("-m", "models/a", "-m", "models/a"), "-m names the same model twice"),
        (("-m", "models/a", "-m", "models/b", "--adapter", "x"), "--adapter belongs to one model"),
        (("-m", "models/a", "-n", "2", "--temperature", "0"), "2 samples a row at temperature 0 are all alike"),
        (("-m", "models/a", "-n", "2", "--pass-at", "4"), "--pass-at 4 needs at least 4 samples a row; give -n 4"),
        (("-m", "models/a", "--pass-at", "0"), "is no list of whole numbers"),
        (("-m", "models/a", "--jsonl", "gone/x.jsonl"), "gone/x.jsonl: cannot be written"),
        (("-m", "models/a", "--set", "generation.temperature=1"), "this has a flag of its own here: --temperature"),
        (("-m", "models/a", "--passes-from", "nan"), "--passes-from nan is no finite number"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(desk: Path, flags: tuple[str, ...], said: str) -> None:
    result = call("eval", "-d", "p.jsonl", "--reward", "r.py:f", *flags)
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_a_checkpoint_is_named_by_its_run_and_step_or_as_its_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (4, 8, 12):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()
        (folder / "state.json").write_text(json.dumps({"metrics": {"reward": float(step == 8)}}))
    (run / "run.toml").write_text('[model]\npath = "m"\n[data]\npath = "d.json"\n')
    assert checkpoint_named(f"{run}@12") == run / "checkpoints" / "step-00000012"
    assert checkpoint_named(f"{run}@best") == run / "checkpoints" / "step-00000008"
    with (run / "run.toml").open("a") as file:
        file.write('[checkpoint]\nmetric_for_best = "eval/held_out/avg@1"\n')
    write_evaluations(run, [evaluated(4, 0.75), evaluated(8, 0.5)])
    assert checkpoint_named(f"{run}@best") == run / "checkpoints" / "step-00000004"
    for name in (f"{run}@7", f"{run}@last"):
        with pytest.raises(InputError, match=r"there is no such checkpoint; .*run has 4, 8, 12, or write @best"):
            checkpoint_named(name)
    assert checkpoint_named(str(run)) is None
    assert checkpoint_named("someone@home/model") is None
