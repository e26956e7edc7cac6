"""A run folder is diagnosed from what it has of the steps, and a run that goes on as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from troupe import diagnose
from troupe.cli.compare import show
from troupe.errors import InputError
from troupe.messages import Evaluated, Update
from troupe.records.compare.page import compare_page
from troupe.records.compare.runs import read_runs
from troupe.records.diagnosis import Diagnosis
from troupe.records.diagnosis.past import begin_again
from troupe.records.evaluations import write_evaluations
from troupe.records.sinks.sqlite import SqliteSink

HOT = Path(__file__).parents[2] / "data" / "diagnosis" / "hot.jsonl"
CONFIG = {"learner": {"batch_size": 16}, "generation": {"max_completion_length": 8}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a sick run of 120 steps, the last line cut by a crash."""
    (tmp_path / "run.toml").write_text("[learner]\nbatch_size = 16\n[generation]\nmax_completion_length = 8\n")
    shutil.copy(HOT, tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 121, "rew')
    return tmp_path


def test_lines_and_store_tell_the_same(folder: Path) -> None:
    of_lines = diagnose(folder)
    assert [finding.rule for finding in of_lines] == ["reward_down", "no_signal", "cut", "entropy_explosion"]
    sink = SqliteSink(folder / "run.sqlite")
    sink.open()
    for step, line in enumerate(HOT.read_text().splitlines(), 1):
        sink.write(Update(step=step, version=step, total_steps=120, metrics=json.loads(line)))
    sink.flush()
    sink.close()
    (folder / "metrics.jsonl").unlink()
    assert diagnose(folder) == of_lines


@pytest.mark.parametrize("step", [0, 20, 50, 119])
def test_a_run_that_goes_on_tells_what_it_would_have_told(folder: Path, step: int) -> None:
    diagnosis = begin_again(CONFIG, folder, step)
    for number, line in enumerate(HOT.read_text().splitlines(), 1):
        if number > step:
            diagnosis.add(number, json.loads(line))
    assert diagnosis.all_findings == diagnose(folder)


def test_evaluations_count_from_their_versions_on(folder: Path) -> None:
    lines = [json.dumps({"step": step, "reward": step / 100, "reward_std": 0.4}) for step in range(1, 101)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    values = {20: 0.5, 40: 0.6, 60: 0.3, 80: 0.2}
    told = [
        Evaluated(version=version, name="sums", metrics={"eval/sums/avg@1": value, "eval/sums/avg@1_se": 0.02}, rows=())
        for version, value in values.items()
    ]
    write_evaluations(folder, told)
    (finding,) = diagnose(folder)
    assert (finding.rule, finding.since) == ("held_out_down", 81)
    assert begin_again(CONFIG, folder, 80).all_findings == ()
    assert [one.since for one in begin_again(CONFIG, folder, 85).all_findings] == [81]


def test_without_steps_there_are_no_findings_and_without_a_run_there_is_an_error(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    assert diagnose(folder) == ()
    assert begin_again(CONFIG, folder, 10).all_findings == Diagnosis(CONFIG).all_findings == ()
    with pytest.raises(InputError, match=r"there is no run\.toml"):
        diagnose(folder / "elsewhere")


def test_a_sick_run_is_named_beside_a_good_one(folder: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    shutil.copy(folder / "run.toml", good)
    shutil.copy(HOT.with_name("demo.jsonl"), good / "metrics.jsonl")
    found = read_runs([good, folder], lambda folder: (None, []))
    page = compare_page(found)
    assert page.count('<p class="note warn">') == 1
    assert f"<b>{found.runs[1].name}</b>: the reward falls: from" in page
    (told,) = [line for line in show(found, 100) if "the reward falls" in line]
    assert told.startswith(f"{found.runs[1].name}: the reward falls")
