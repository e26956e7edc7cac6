"""Short runs that are made sick on purpose, and where they say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fakes import ones, weigh_ids
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


def test_a_rate_far_too_high_loses_entropy_reward_and_reference(ragged_model: Path, tmp_path: Path) -> None:
    settings = {"learner__lr": 0.1, "learner__beta": 0.01, "learner__max_steps": 36, "checkpoint__every": 99}
    result = train(ragged_model, tmp_path, weigh_ids, learner__lr_scheduler="constant", **settings)
    found = {finding.rule for finding in result.findings}
    assert found >= {"kl_explosion", "reward_down", "entropy_collapse", "no_signal"}
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
