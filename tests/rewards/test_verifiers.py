"""Rewards that math-verify and reasoning-gym decide: real verdicts, what is missing, and processes unasked."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest

from tests.support.extras import extra
from troupe.dataset import PromptDataset
from troupe.errors import RewardError
from troupe.rewards import (
    Reward,
    RewardManager,
    RewardsConfig,
    check_columns,
    default_reward,
    get_math_verify_reward,
    load_reward,
    reasoning_gym_reward,
)
from troupe.rewards.settings import checked_run

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so it is \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"so it is \boxed{0.5}", "$1/2$", 1.0),
        (r"The final answer is $x^2 + 2x + 1$.", "$(x+1)^2$", 1.0),
        (r"\boxed{1000}", "1,000", 1.0),
        (r"\boxed{7}", 7, 1.0),
        (r"\boxed{8}", 7, 0.0),
        ("it is 7", 7, 0.0),
        ("", 7, 0.0),
        (r"\boxed{\frac{1}{", "0.5", 0.0),
        (r"\boxed{7}", "no number", None),
        (r"\boxed{7}", "", None),
        (r"\boxed{7}", None, None),
    ],
)
def test_mathematics_is_compared_by_value(completion: str, gold: Any, score: float | None) -> None:
    extra("math_verify")
    reward = get_math_verify_reward()
    assert reward(completions=[completion], answer=[gold]) == [score]
    assert reward(completions=[[{"role": "assistant", "content": completion}]], answer=[gold]) == [score]


def test_math_verify_logs_what_it_read_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    extra("math_verify")
    logged: dict[str, Any] = {}
    caplog.set_level(logging.WARNING)
    reward: Any = load_reward("math_verify:solution")
    scores = reward(
        completions=[r"\boxed{3}", "three", r"\boxed{3}"],
        solution=["3", "3", "?"],
        log_extra=lambda column, values: logged.update({column: list(values)}),
    )
    assert scores == [1.0, 0.0, None]
    assert logged == {"answer_parsed": ["3", "(none)", "(the row's answer cannot be read)"]}
    assert caplog.records == []


def test_the_column_of_the_right_answers_has_to_be_there_before_anything_is_sampled() -> None:
    extra("math_verify")
    check_columns(load_reward("math_verify"), {"answer"})
    check_columns(load_reward("math_verify:solution"), {"solution"})
    with pytest.raises(
        RewardError, match=r"math_verify_reward requires answer, but .* are: solution; .* data\.answer_column$"
    ):
        check_columns(load_reward("math_verify"), {"solution"})
    with pytest.raises(RewardError, match="'final answer' cannot be a column here"):
        load_reward("math_verify:final answer")


@pytest.mark.parametrize(("spec", "extra_name"), [("math_verify", "math"), ("reasoning_gym", "reasoning-gym")])
def test_a_missing_package_is_named_before_anything_is_sampled(
    monkeypatch: pytest.MonkeyPatch, spec: str, extra_name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=rf"^reward {spec} needs .*: pip install -e '\.\[{extra_name}\]'$"):
        load_reward(spec)


def test_the_reward_of_rows_that_say_what_is_right() -> None:
    assert default_reward({"reasoning_gym", "answer", "task"}, "d") == "reasoning_gym"
    assert default_reward({"answer"}, "d") == "exact_answer"
    with pytest.raises(RewardError, match=r"^d: the rows have no `answer` column .*data\.answer_column=NAME$"):
        default_reward({"solution"}, "d")


def test_functions_may_say_that_they_run_in_processes() -> None:
    def plain(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    class Runs:
        def run(self) -> None:
            """Not what is meant."""

        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

    rewards: list[Reward] = [plain, reasoning_gym_reward, Runs()]
    names = ["plain", "gym", "runs"]
    assert checked_run(None, names, rewards) == ["auto", "process", "auto"]
    assert checked_run(["auto"] * 3, names, rewards) == ["auto"] * 3


class Adder:
    """A task whose verifier takes numbers only."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": "?", "answer": str(index + self.offset)}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if int(answer) == int(entry["answer"]) else 0.25


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("reasoning_gym")
    package.create_dataset = lambda name, **options: Adder(options["offset"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)


def origin(task: str, index: int) -> dict[str, Any]:
    return {"task": task, "options": {"offset": 40}, "index": index}


@pytest.mark.usefixtures("gym")
def test_the_answer_is_what_is_tagged_or_behind_the_thoughts_or_all() -> None:
    texts = [
        "42",
        " 42\n",
        "<answer>1</answer> no: <answer>\n42 </answer>.",
        "<think>41?</think>\n42",
        "<think>a <answer>42</answer>",
        "41",
        "so 42",
        "",
    ]
    scores = reasoning_gym_reward(texts, reasoning_gym=[origin("add", 2)] * 8, answer=["42"] * 8)
    assert scores == [1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.0, 0.0]


@pytest.mark.usefixtures("gym")
def test_rows_of_other_sources_have_no_verifier_and_another_entry_is_an_error() -> None:
    assert reasoning_gym_reward(["40", "x"], reasoning_gym=[origin("sum", 0), None]) == [1.0, None]
    with pytest.raises(
        RewardError, match=r"entry 1 of sum is another one than the row was made of .the answer '41', not"
    ):
        reasoning_gym_reward(["41"], reasoning_gym=[origin("sum", 1)], answer=["7"])


@pytest.mark.usefixtures("gym")
def test_a_verifier_that_fails_over_the_right_answer_too_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Adder, answer: str, entry: dict[str, Any]) -> float:
        raise OSError("no word list")

    monkeypatch.setattr(Adder, "score_answer", broken)
    with pytest.raises(OSError, match="no word list"):
        reasoning_gym_reward(["43"], reasoning_gym=[origin("add", 3)])


@pytest.mark.slow
async def test_both_score_in_processes_where_entries_are_those_that_the_rows_were_made_of() -> None:
    extra("math_verify")
    extra("reasoning_gym")
    [row] = PromptDataset.load("reasoning_gym:word_ladder?size=1&seed=3")
    config = RewardsConfig(processes=1, retries=0)
    async with RewardManager(["math_verify:gold", "reasoning_gym"], config=config) as manager:
        manager.check_columns({"gold", *row.columns})
        texts = [r"\boxed{2}", f"<answer>{row.columns['answer']}</answer>", "?"]
        columns = {name: [value] * 3 for name, value in row.columns.items()}
        scored = await manager.compute_rewards(["?"] * 3, texts, gold=["2"] * 3, **columns)
    assert scored.scores["reasoning_gym_reward"] == (0.0, 1.0, 0.0)
    assert scored.scores["math_verify_reward"] == (1.0, 0.0, 0.0)
