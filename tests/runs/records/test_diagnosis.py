"""Short runs that are made sick on purpose, and where they say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fakes import ones, weigh_ids, write_prompts
from tests.support.runs import column, done, lines, summary, train
from troupe import diagnose

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dull(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """All rewards are equal, completions are cut at two tokens, and there are five rows."""
    settings = {"generation__max_completion_length": 2, "learner__max_steps": 55, "checkpoint__every": 99}
    return Path(train(ragged_model, tmp_path_factory.mktemp("dull"), ones, **settings).folder)


def test_one_list_of_findings_is_told_everywhere(dull: Path) -> None:
    result = summary(dull)
    assert [finding.rule for finding in result.findings] == ["no_signal", "cut", "few_rows"]
    assert result.incidents == {}
    assert diagnose(dull) == result.findings
    told = lines(dull)
    assert "diagnosis/no_signal" not in told[27]
    assert told[-1]["diagnosis/no_signal"] == told[-1]["diagnosis/few_rows"] == 1.0
    status = done("status", dull)
    page = Path(done("report", dull).strip()).read_text(encoding="utf-8")
    for finding in result.findings:
        assert finding.evidence in status
        assert finding.evidence in page
        assert finding.remedy in page
    assert page.index("(+2 more)") < page.index("<h2")


def test_a_rate_far_too_high_loses_entropy_and_reference(ragged_model: Path, tmp_path: Path) -> None:
    settings = {"learner__lr": 0.1, "learner__beta": 0.01, "learner__max_steps": 36, "checkpoint__every": 99}
    result = train(ragged_model, tmp_path, weigh_ids, learner__lr_scheduler="constant", **settings)
    found = {finding.rule for finding in result.findings}
    assert found >= {"kl_explosion", "entropy_collapse", "no_signal"}  # what is left of the reward hangs on rounding
    assert result.findings[0].rule == "kl_explosion"
    assert result.findings[0].remedy == "--set learner.beta=0.04"


@pytest.mark.parametrize(("rate", "found"), [(1e-9, ["unmoved"]), (1e-3, [])])
def test_a_rate_far_too_low_moves_no_16_bit_weight(
    ragged_model: Path, tmp_path: Path, rate: float, found: list[str]
) -> None:
    settings = {"model__dtype": "bfloat16", "learner__lr": rate, "learner__lr_scheduler": "constant"}
    result = train(ragged_model, tmp_path, weigh_ids, learner__max_steps=25, checkpoint__every=99, **settings)
    assert [finding.rule for finding in result.findings] == found
    moved = column(result.folder, "weights/moved")
    assert max(moved) < 1e-4 if found else min(moved) > 0.01


def test_several_passes_of_large_steps_are_clipped(ragged_model: Path, tmp_path: Path) -> None:
    settings = {"learner__num_iterations": 3, "learner__epsilon": 0.05, "learner__lr": 3e-3}
    result = train(ragged_model, tmp_path, weigh_ids, learner__max_steps=25, checkpoint__every=99, **settings)
    (finding,) = result.findings
    assert (finding.rule, finding.remedy) == ("clipped", "--set learner.num_iterations=1")


def test_what_is_asked_elsewhere_gets_worse(ragged_model: Path, tmp_path: Path) -> None:
    """Training wants low ids, the evaluation high ones."""
    code = tmp_path / "ids.py"
    code.write_text(
        "def low(completion_ids, **_):\n    return [sum(i < 128 for i in ids) / len(ids) for ids in completion_ids]\n"
        "def high(completion_ids, **_):\n    return [1.0 - score for score in low(completion_ids)]\n"
    )
    asked = {"name": "high", "path": str(write_prompts(tmp_path / "asked.json")), "rewards": [f"{code}:high"]}
    settings = {"evaluation__every": 10, "evaluation__sets": [asked | {"num_samples": 8, "temperature": 1.0}]}
    settings |= {"rewards__functions": [f"{code}:low"], "learner__max_steps": 36, "checkpoint__every": 99}
    result = train(ragged_model, tmp_path, **settings)
    (finding,) = result.findings
    assert finding.rule == "held_out_down"
    assert finding.evidence.startswith("eval/high/avg@8 fell from 0.")
    assert diagnose(result.folder) == (finding,)
