"""TRL's own reward functions, imported and used as they are; ours of the same meaning give the same scores.

Skipped where TRL (the extra `trl`) is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.extras import extra
from tests.support.fakes import make_group, make_prompt
from troupe.messages import RolloutGroup
from troupe.rewards import (
    RewardManager,
    get_math_verify_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    load_reward,
    think_format_reward,
)

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

ANSWERS = [
    (r"<think>a</think> \boxed{\frac{1}{2}}", "0.5"),
    (r"so \boxed{\frac12}", r"\frac{1}{2}"),
    (r"The final answer is $x^2 + 2x + 1$.", "$(x+1)^2$"),
    (r"first \boxed{3}, no: \boxed{4}", "4"),
    (r"$\frac{2}{4}$", "1/2"),
    (r"<think>a<think>b</think> \boxed{50\%}", "0.5"),
    (r"\boxed{3\text{ cm}}", "3"),
    (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$"),
    (r"\boxed{\frac{1}{", "0.5"),
    ("it is 7", "7"),
    ("", "7"),
    (r"\boxed{7}", "no number"),
    (r"\boxed{7}", ""),
]
IDS = [[1, 2, 3] * n for n in range(len(ANSWERS))]


def rewards_of_trl() -> Any:
    return pytest.importorskip("trl.rewards")


def talk(texts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def group(**columns: Any) -> RolloutGroup:
    """A conversation whose completions are the texts above."""
    made = make_group(make_prompt(0, 0, **columns), size=len(ANSWERS))
    prompt = msgspec.structs.replace(made.prompt, prompt=[{"role": "user", "content": "?"}])
    rollouts = [
        msgspec.structs.replace(rollout, text=text, token_ids=tuple(ids))
        for rollout, (text, _), ids in zip(made.rollouts, ANSWERS, IDS, strict=True)
    ]
    return msgspec.structs.replace(made, prompt=prompt, rollouts=tuple(rollouts))


def test_math_verify_gives_the_scores_of_accuracy_reward() -> None:
    theirs = rewards_of_trl().accuracy_reward
    extra("math_verify")
    texts, gold = [text for text, _ in ANSWERS], [right for _, right in ANSWERS]
    expected = theirs(completions=talk(texts), solution=gold)
    assert {0.0, 1.0, None} <= set(expected)
    assert get_math_verify_reward("solution")(completions=talk(texts), solution=gold) == expected


def test_ours_of_the_same_name_give_the_same_scores() -> None:
    theirs = rewards_of_trl()
    texts = talk([text for text, _ in ANSWERS])
    assert think_format_reward(texts) == theirs.think_format_reward(texts)
    ours, its = get_repetition_penalty_reward(3, -1.0), theirs.get_repetition_penalty_reward(3, -1.0)
    assert ours(completion_ids=IDS) == pytest.approx(its(completion_ids=IDS))
    ours, its = get_soft_overlong_punishment(20, 10), theirs.get_soft_overlong_punishment(20, 10)
    assert ours(completion_ids=IDS) == pytest.approx(its(completion_ids=IDS))


async def test_its_functions_are_rewards_as_they_are(tmp_path: Path) -> None:
    theirs = rewards_of_trl()
    extra("math_verify")
    (tmp_path / "mine.py").write_text(
        "from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment\n"
        "cosine = get_cosine_scaled_reward(max_len=100)\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10)\n"
    )
    names = ["trl.rewards:accuracy_reward", "trl.rewards:think_format_reward"]
    names += [f"{tmp_path}/mine.py:cosine", f"{tmp_path}/mine.py:overlong"]
    async with RewardManager([load_reward(name) for name in names]) as manager:
        manager.check_columns({"solution"})
        [scored] = await manager.score_groups([group(solution="7")])
    texts = talk([text for text, _ in ANSWERS])
    gold = ["7"] * len(ANSWERS)
    assert scored.incidents == ()
    assert {name: list(scores) for name, scores in scored.scores.items()} == {
        "accuracy_reward": theirs.accuracy_reward(completions=texts, solution=gold),
        "think_format_reward": theirs.think_format_reward(completions=texts),
        "cosine_scaled_reward": theirs.get_cosine_scaled_reward(max_len=100)(texts, gold, IDS),
        "soft_overlong_punishment_reward": theirs.get_soft_overlong_punishment(20, 10)(completion_ids=IDS),
    }
    assert set(scored.extra) == {"solution", "gold_parsed", "answer_parsed"}
