"""Rewards that other packages decide: math-verify (the extra `math`) and reasoning-gym's verifiers (`reasoning-gym`).

Both read what a policy wrote as mathematics or code-like text and may take for ever over it, so they run in processes
that can be killed unless the configuration says otherwise. The packages are imported there, and not before.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from troupe.errors import RewardError, remedy
from troupe.rewards.builtin import Completion, completion_text

Logger: TypeAlias = Callable[[str, Sequence[Any]], None]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def get_math_verify_reward(column: str = "answer") -> Callable[..., list[float | None]]:
    """A reward for mathematics: 1 where the completion's answer equals that of the row, else 0.

    Compares values, not texts, by math-verify: \\boxed{0.5} and \\boxed{\\frac{1}{2}} are equal. The row's answer, in
    the dataset's `column`, is a number or LaTeX ($x^2+1$); a completion's has to be well-formed LaTeX, in \\boxed{…}
    or behind "the answer is". Where the row's answer cannot be read the score is missing. The same scores as those of
    TRL 1.16's `accuracy_reward`, which reads the column `solution`.

    Raises:
        RewardError: for a name that is no column's, or where math-verify is missing.
    """
    if not column.isidentifier():
        raise RewardError(f"math_verify:{column}: {column!r} cannot be a column here; write math_verify:COLUMN")
    _require("math_verify", "math-verify", "math")

    def math_verify_reward(
        completions: Sequence[Completion], log_extra: Logger | None = None, **columns: Any
    ) -> list[float | None]:
        judged = [
            _judged(completion_text(completion), gold)
            for completion, gold in zip(completions, columns[column], strict=True)
        ]
        if log_extra is not None:
            log_extra("answer_parsed", [read for _, read in judged])
        return [score for score, _ in judged]

    # by its signature the column is known to be there before anything is sampled
    by_keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters = [by_keyword("completions"), by_keyword(column), by_keyword("log_extra", default=None)]
    math_verify_reward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    math_verify_reward.run = "process"  # type: ignore[attr-defined]
    math_verify_reward.get_ready = _silence  # type: ignore[attr-defined]
    return math_verify_reward


def _judged(text: str, gold: Any) -> tuple[float | None, str]:
    """Score of a completion, and what was read as its answer."""
    _silence()
    math, latex = map(importlib.import_module, ("math_verify", "latex2sympy2_extended"))
    right = [] if gold is None else math.parse(str(gold), parsing_timeout=None)
    if not right:
        return None, "(the row's answer cannot be read)"
    answer = math.parse(
        text,
        extraction_config=[
            math.LatexExtractionConfig(
                normalization_config=latex.NormalizationConfig(units=True),
                boxed_match_priority=0,
                try_extract_without_anchor=False,
            )
        ],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return float(math.verify(right, answer, timeout_seconds=None)), str(answer[-1]) if answer else "(none)"


def _silence() -> None:
    """Import math-verify, and have it not warn at every call that its own time limits are off: they need signals."""
    importlib.import_module("math_verify")
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)


def reasoning_gym_reward(
    completions: Sequence[Completion],
    reasoning_gym: Sequence[Mapping[str, Any] | None],
    answer: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """What reasoning-gym's own verifier says, from 0 to 1, for rows of a source `reasoning_gym:TASK`.

    The answer is what stands in the last <answer>…</answer>; without one, what follows the last </think>; without
    that, the whole completion. White space around it does not count. Missing for rows of other sources; 0 where the
    verifier fails over the answer, though not over the right one.

    Raises:
        RewardError: where reasoning-gym makes another entry than the row was made of, as another version may.
    """
    answers = [None] * len(completions) if answer is None else answer
    return [
        None if origin is None else _verified(completion_text(completion), origin, right)
        for completion, origin, right in zip(completions, reasoning_gym, answers, strict=True)
    ]


reasoning_gym_reward.run = "process"  # type: ignore[attr-defined]
reasoning_gym_reward.get_ready = functools.partial(importlib.import_module, "reasoning_gym")  # type: ignore[attr-defined]


def load_reasoning_gym_reward() -> Callable[..., list[float | None]]:
    """`reasoning_gym_reward`. RewardError where reasoning-gym is missing."""
    _require("reasoning_gym", "reasoning-gym", "reasoning-gym")
    return reasoning_gym_reward


def _verified(text: str, origin: Mapping[str, Any], answer: Any) -> float:
    task, options, index = origin["task"], origin["options"], origin["index"]
    entry = _entry(task, json.dumps(options, sort_keys=True), index)
    if answer is not None and answer != str(entry["answer"]):
        raise RewardError(
            f"reasoning_gym: entry {index} of {task} is another one than the row was made of (the answer "
            f"{entry['answer']!r}, not {answer!r}); use the reasoning-gym that made the rows, and run the reward in "
            "processes"
        )
    verifier = _task(task, json.dumps(options, sort_keys=True))
    try:
        return float(verifier.score_answer(_given_answer(text), entry=entry))
    except Exception:  # of some tasks over what they cannot read
        verifier.score_answer(entry["answer"], entry=entry)
        return 0.0


def _given_answer(text: str) -> str:
    tagged = _ANSWER.findall(text)
    return str(tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


@functools.lru_cache(maxsize=64)
def _task(task: str, options: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(task, **json.loads(options))


@functools.lru_cache(maxsize=4096)
def _entry(task: str, options: str, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = _task(task, options)[index]
    return entry


def _require(module: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RewardError(f"reward {module} needs the package {package}, which is missing; {remedy(extra)}")
