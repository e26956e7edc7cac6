"""Each rule fires on a run that is sick in its way, is over when the run is well again, and is silent on good runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from troupe.messages import Finding
from troupe.records.diagnosis import Diagnosis, in_a_line, in_full
from troupe.records.diagnosis.history import EARLY, WINDOW
from troupe.records.diagnosis.rules import RULES
from troupe.records.diagnosis.watch import RELEASE

DATA = Path(__file__).parents[2] / "data" / "diagnosis"
CONFIG: dict[str, Any] = {
    "generation": {"num_generations": 8, "max_completion_length": 512},
    "learner": {"batch_size": 16, "lr": 1e-6, "beta": 0.01, "num_iterations": 1},
    "schedule": {"max_staleness": 0},
}
Figures: TypeAlias = Callable[[float], dict[str, float]]
"""From how far the sickness has come, 0 to 1, to what it makes of a step's figures."""


def well(step: int) -> dict[str, float]:
    """A run that goes well, and goes on to: the reward rises."""
    return {
        "reward": 0.3 + step * 1e-2,
        "reward_std": 0.4,
        "frac_reward_zero_std": 0.3,
        "entropy": 0.4,
        "kl": 0.05,
        "learning_rate": 1e-6,
        "nonfinite": 0.0,
        "weights/moved": 2e-3,
        "clip_ratio/region_mean": 0.01,
        "completions/mean_length": 200.0,
        "completions/clipped_ratio": 0.2,
        "epoch": step * 16 / 5000,
        "step_time": 20.0,
        "time/reward/exposed_s": 0.2,
    }


RESAMPLED = {"dynamic_sampling": True}
STILL = {"reward": 0.3}
SICK: dict[str, tuple[Figures, str, str]] = {
    "nonfinite": (lambda ill: {"nonfinite": float(ill > 0)}, "of the last 20 updates", "learner.lr=5e-07"),
    "entropy_explosion": (lambda ill: STILL | {"entropy": 0.4 + 2 * ill}, "rose from 0.4", "learner.lr=5e-07"),
    "kl_explosion": (lambda ill: {"kl": 0.05 + 6 * ill}, "nats a token", "--set learner.beta=0.04"),
    "reward_down": (lambda ill: {"reward": 0.6 - 0.5 * ill}, "from 0.4", "learner.lr=1e-07"),
    "entropy_collapse": (lambda ill: STILL | {"entropy": 0.4 - 0.395 * ill}, "fell from 0.4", "entropy_coef=0.001"),
    "no_signal": (lambda ill: STILL | {"frac_reward_zero_std": 0.3 + 0.65 * ill}, "95%", "dynamic_sampling=true"),
    "cut": (lambda ill: STILL | {"completions/clipped_ratio": 0.2 + 0.8 * ill}, "cut at 512", "length=1024"),
    "clipped": (lambda ill: {"clip_ratio/region_mean": 0.5 * ill}, "of the tokens", "learner.lr=5e-07"),
    "unmoved": (lambda ill: {"weights/moved": 2e-3 * (1 - ill)}, "16-bit weights", "learner.lr=0.0001"),
    "lengths": (lambda ill: STILL | {"completions/mean_length": 200 + 700 * ill}, "to 900", "loss_type=dr_grpo"),
    "few_rows": (lambda ill: {"epoch": 100.0 * ill}, "has been prompted", "data.path"),
    "reward_time": (lambda ill: {"time/reward/exposed_s": 12 * ill}, "waits 12.0 s", "schedule.max_staleness=1"),
}
"""Rule → what makes a run sick, what the evidence says, what the remedy is."""


def watched(*figures: Mapping[str, float], config: Mapping[str, Any] = CONFIG) -> Diagnosis:
    diagnosis = Diagnosis(config)
    for step, metrics in enumerate(figures, 1):
        diagnosis.add(step, metrics)
    return diagnosis


def falling_ill(make: Figures, steps: int = 100, onset: int = 30, full: int = 60) -> list[dict[str, float]]:
    parts = [min(1.0, max(0.0, (step - onset) / (full - onset))) for step in range(1, steps + 1)]
    return [well(step) | (make(ill) if ill else STILL) for step, ill in enumerate(parts, 1)]


def recorded(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def by_rule(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {finding.rule: finding for finding in diagnosis.all_findings}


@pytest.mark.parametrize("rule", sorted(SICK))
def test_a_rule_fires_with_its_evidence_and_a_remedy_and_alone(rule: str) -> None:
    make, evidence, remedy = SICK[rule]
    diagnosis = watched(*falling_ill(make))
    assert set(by_rule(diagnosis)) == {rule}
    finding = by_rule(diagnosis)[rule]
    assert finding.until is None
    assert finding.since > 30, "not before it began"
    assert evidence in finding.evidence
    assert remedy in finding.remedy
    assert diagnosis.metrics[f"diagnosis/{rule}"] == 1.0


def test_a_reward_that_fell_back_not_below_its_beginning_asks_for_half_the_rate() -> None:
    rewards = [0.2] * 8 + [0.9] * 40 + [0.4] * 40
    told = by_rule(watched(*(well(step) | {"reward": reward} for step, reward in enumerate(rewards, 1))))
    assert told["reward_down"].remedy == "--set learner.lr=5e-07"


def test_every_rule_has_a_sick_run() -> None:
    assert {rule.name for rule in RULES} == {*SICK, "held_out_down"}


@pytest.mark.parametrize("name", ["demo", "higher-lower"])
def test_recorded_runs_that_learned_are_silent(name: str) -> None:
    assert watched(*recorded(name)).all_findings == ()


def test_a_recorded_run_whose_rate_was_far_too_high_is_told_of_at_once() -> None:
    config = {"generation": {"max_completion_length": 8}, "learner": {"batch_size": 16, "lr": 5e-3}}
    figures = recorded("hot")
    early = watched(*figures[: EARLY + WINDOW + 5], config=config)
    assert early.findings[0].rule == "reward_down"
    whole = watched(*figures, config=config)
    assert set(by_rule(whole)) == {"reward_down", "no_signal", "cut", "entropy_explosion"}
    told = "the reward falls: from 0.071 at best to 0.000 (since step 28); try "
    assert in_a_line(whole.findings) == told + "--set learner.lr=0.0005 (+2 more)"
    assert in_a_line(whole.findings, "a run") == told + "troupe set 'a run' learner.lr=0.0005 (+2 more)"


def test_a_run_that_has_learned_everything_is_not_sick() -> None:
    """All groups alike, nothing left to try: yet the reward is at its top."""
    learned = [
        well(step)
        | {"reward": min(1.0, 0.3 + step / 50), "reward_std": max(0.05, 0.45 - step / 80)}
        | {"frac_reward_zero_std": min(0.97, step / 40), "entropy": max(0.004, 0.4 - step / 60)}
        for step in range(1, 200)
    ]
    assert watched(*learned).all_findings == ()


def test_the_first_steps_are_never_sick() -> None:
    worst = {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "completions/clipped_ratio": 1.0}
    assert watched(*[well(step) | worst for step in range(1, EARLY + WINDOW)]).all_findings == ()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"learner": RESAMPLED}, "--set curriculum.enabled=true"),
        ({"learner": RESAMPLED, "curriculum": {"enabled": True}}, "--set generation.num_generations=16"),
    ],
)
def test_what_is_on_already_is_no_remedy(changes: dict[str, dict[str, Any]], remedy: str) -> None:
    config = {**CONFIG, **{section: CONFIG.get(section, {}) | table for section, table in changes.items()}}
    (finding,) = watched(*falling_ill(SICK["no_signal"][0]), config=config).findings
    assert finding.remedy == remedy


@pytest.mark.parametrize(("coef", "found"), [(1.0, []), (0.0, ["no_signal"])])
def test_groups_of_equal_rewards_have_signal_where_a_teacher_is_learned_from(coef: float, found: list[str]) -> None:
    config = CONFIG | {"teacher": {"path": "teacher", "coef": coef}}
    findings = watched(*falling_ill(SICK["no_signal"][0]), config=config).all_findings
    assert [finding.rule for finding in findings] == found


@pytest.mark.parametrize(("coef", "found"), [(1.0, ["reward_down"]), (0.0, [])])
def test_a_reward_that_is_not_learned_from_may_fall(coef: float, found: list[str]) -> None:
    config = CONFIG | {"teacher": {"path": "teacher", "reward_coef": coef}}
    findings = watched(*falling_ill(SICK["reward_down"][0]), config=config).all_findings
    assert [finding.rule for finding in findings] == found


@pytest.mark.parametrize("rule", ["reward_down", "lengths", "entropy_explosion"])
def test_rows_that_get_harder_are_no_sickness(rule: str) -> None:
    harder = falling_ill(SICK[rule][0])
    assert watched(*harder, config=CONFIG | {"curriculum": {"enabled": True}}).all_findings == ()


def test_what_lies_about_a_bound_does_not_come_and_go() -> None:
    figures = [well(step) | STILL | {"frac_reward_zero_std": 0.8 + 0.3 * (-1) ** (step // 7)} for step in range(1, 300)]
    diagnosis = watched(*figures)
    (finding,) = diagnosis.all_findings
    assert finding.until is None


def test_a_finding_is_over_when_it_has_not_held_for_long_and_may_come_again() -> None:
    make = SICK["reward_time"][0]
    ill, healed = falling_ill(make), [well(step) for step in range(101, 101 + 3 * WINDOW)]
    diagnosis = watched(*ill, *healed)
    (finding,) = diagnosis.all_findings
    assert finding.until is not None
    assert 100 + RELEASE < finding.until < 100 + WINDOW + RELEASE + 1
    assert f"(steps {finding.since} to {finding.until})" in in_full(finding)
    assert diagnosis.findings == ()
    assert diagnosis.metrics == {"diagnosis/reward_time": 0.0}
    again = watched(*ill, *healed, *(well(step) | make(1.0) for step in range(161, 200)))
    assert [finding.until is None for finding in again.all_findings] == [True, False]


def test_steps_told_again_and_figures_that_are_none_change_nothing() -> None:
    figures = falling_ill(SICK["cut"][0])
    diagnosis = watched(*figures)
    before = diagnosis.all_findings
    diagnosis.add(50, {"completions/clipped_ratio": 0.0})
    assert diagnosis.all_findings == before
    odd: dict[str, Any] = {"reward": None, "entropy": float("nan"), "kl": "much", "epoch": float("inf")}
    assert watched(*[odd for _ in range(60)], config={"learner": 3}).all_findings == ()


@pytest.mark.parametrize("error", [0.01, None])
def test_the_held_out_figure_falls_while_the_reward_rises(error: float | None) -> None:
    def evaluated(*values: float) -> Diagnosis:
        diagnosis = Diagnosis(CONFIG)
        for step in range(1, 101):
            if step % 20 == 1 and (step // 20) < len(values):
                told = {"eval/sums/avg@4": values[step // 20], "eval/sums/length": 9.0}
                told |= {} if error is None else {"eval/sums/avg@4_se": error}
                diagnosis.add_evaluation(step - 1, told)
            diagnosis.add(step, well(step))
        return diagnosis

    assert evaluated(0.3, 0.5, 0.6, 0.59, 0.61).all_findings == ()
    assert evaluated(0.3, 0.5, 0.6, 0.3, 0.61).all_findings == (), "one alone may be noise"
    (finding,) = evaluated(0.3, 0.5, 0.6, 0.4, 0.3).findings
    assert finding.rule == "held_out_down"
    assert "eval/sums/avg@4 fell from 0.600 (step 40) to 0.300 (step 80)" in finding.evidence
    assert finding.remedy == "--set evaluation.patience=3"


def test_thoughts_that_outlast_the_limit_are_named_and_get_more_room() -> None:
    make = SICK["cut"][0]
    thinking = [step | {"completions/clipped_in_thoughts": 0.9} for step in falling_ill(make)]
    (finding,) = watched(*thinking).findings
    assert finding.evidence.endswith("90% before </think>")
    assert finding.remedy == "--set generation.max_completion_length=2048"


def test_the_docs_have_every_rule_in_order() -> None:
    page = (DATA.parents[2] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [rule.name for rule in RULES]
