"""The built-in rewards, in TRL's signature. Completions are texts, or message lists whose last answer counts.

`think_format_reward`, `get_repetition_penalty_reward` and `get_soft_overlong_punishment` are those that TRL 1.16 has
under these names, with the same scores.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

from troupe.errors import RewardError
from troupe.messages import ChatMessage, PromptText
from troupe.rewards.convention import Unscored
from troupe.rewards.matching import Matching

Completion: TypeAlias = str | Sequence[ChatMessage]
Words: TypeAlias = tuple[str, ...]


def completion_text(completion: Completion) -> str:
    """The text itself, or the content of the last message of the assistant, or else of anybody ("" where it has none).

    What an environment or a tool has said last is no answer.
    """
    if isinstance(completion, str):
        return completion
    own = [message for message in completion if message.get("role") == "assistant"] or completion
    return str(own[-1].get("content") or "") if own else ""


def length_reward(completions: Sequence[Completion], target_length: int = 200, **columns: Any) -> list[float | None]:
    """How near a completion's length is to a target.

    rᵢ = max(0, 1 − |nᵢ − L| / L) with nᵢ = characters of the completion without surrounding white space and
    L = `target_length` ≥ 1: 1 at the target, falling evenly to 0 for an empty text and from twice the target on.

    Raises:
        RewardError: for a target below 1, or one that is no whole number.
    """
    if not isinstance(target_length, int) or target_length < 1:
        raise RewardError(
            f"length_reward: target_length = {target_length!r}, but it counts characters; give a whole number ≥ 1"
        )
    lengths = [len(completion_text(completion).strip()) for completion in completions]
    return [max(0.0, 1.0 - abs(n - target_length) / target_length) for n in lengths]


length_reward.quick = True  # type: ignore[attr-defined]  # text of any length is compared in microseconds


def no_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """0 for every completion: for a run that learns from a teacher alone."""
    return [0.0] * len(completions)


no_reward.quick = True  # type: ignore[attr-defined]


def diversity_reward(
    completions: Sequence[Completion],
    prompts: Sequence[PromptText] | None = None,
    ngram_size: int = 2,
    **columns: Any,
) -> list[float | None]:
    """How little a completion repeats itself and the others of its group.

    rᵢ = ½·|Dᵢ| / |Nᵢ| + ½·|Dᵢ \\ ⋃ⱼ≠ᵢ Dⱼ| / |Dᵢ|, where Nᵢ are the n-grams of the lower-cased words of completion i
    (all its words as one n-gram where it has fewer than n), Dᵢ the distinct ones, and j runs over the completions of
    the same prompt (all, where no prompts are given). A text without words gets 0. The first half is distinct-n (Li
    et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models").

    Raises:
        RewardError: for an n-gram size below 1.
    """
    if not isinstance(ngram_size, int) or ngram_size < 1:
        raise RewardError(f"diversity_reward: ngram_size = {ngram_size!r}; give a whole number of words ≥ 1")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in range(len(completions)):
        groups[repr(prompts[index]) if prompts is not None else None].append(index)
    grams = [_ngrams(completion_text(completion), ngram_size) for completion in completions]
    scores: list[float | None] = [0.0] * len(completions)
    for members in groups.values():
        holders = Counter(gram for index in members for gram in set(grams[index]))
        for index in members:
            distinct = set(grams[index])
            if distinct:
                within = len(distinct) / len(grams[index])
                across = sum(holders[gram] == 1 for gram in distinct) / len(distinct)
                scores[index] = 0.5 * within + 0.5 * across
    return scores


diversity_reward.scope = "group"  # type: ignore[attr-defined]  # a sample alone has nothing to differ from


def _ngrams(text: str, size: int) -> list[Words]:
    words = text.lower().split()
    if len(words) < size:
        return [tuple(words)] if words else []
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def format_reward(pattern: str) -> Callable[..., list[float | None]]:
    """A reward that asks for a form: 1 where the whole completion matches the regular expression, else 0.

    `re.fullmatch` with `re.DOTALL`, so that "." also matches line ends; white space counts. A text with which the
    pattern comes to no end (2 s of processor time, less where there are more than 6 texts) has no score.

    Raises:
        RewardError: for a pattern that does not compile.
    """
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise RewardError(f"format_reward: {pattern!r} is no regular expression: {error}; see Python's `re`") from None

    def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        texts = list(map(completion_text, completions))
        late = Unscored(
            f"the pattern comes to no end within {matching.limit_s(len(texts)):.3g} s; write it so that there is only "
            "one way to match a text, without + or * within + or *"
        )
        return [late if matches is None else float(matches) for matches in matching.full(texts)]

    matching = Matching(pattern)
    return format_reward


def think_format_reward(
    completions: Sequence[Completion], completion_starts: Sequence[str] | None = None, **columns: Any
) -> list[float | None]:
    """Whether a completion thinks first: 1 where it starts with `<think>`, opens that once and closes it, else 0.

    `completion_starts` is what the prompts have opened already, such as `<think>`, which then stands before the
    completions.
    """
    starts = [""] * len(completions) if completion_starts is None else completion_starts
    texts = [start + completion_text(completion) for start, completion in zip(starts, completions, strict=True)]
    return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]


think_format_reward.quick = True  # type: ignore[attr-defined]  # text of any length is compared in microseconds


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float | None]]:
    """A reward against loops: rᵢ = (1 − |Dᵢ| / |Nᵢ|)·p, Nᵢ the n-grams of the token ids, Dᵢ the distinct ones.

    p = `max_penalty` ≤ 0; 0 for a completion of fewer than n = `ngram_size` ≥ 1 tokens (Yeo et al. 2025,
    "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv:2502.03373).

    Raises:
        RewardError: for a size below 1 or a penalty above 0.
    """
    if not isinstance(ngram_size, int) or ngram_size < 1:
        raise RewardError(f"repetition_penalty: ngram_size = {ngram_size!r}; give a whole number of tokens ≥ 1")
    if not -math.inf < max_penalty <= 0:
        raise RewardError(f"repetition_penalty: max_penalty = {max_penalty!r}; give a finite number ≤ 0")

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [_repeated_part(ids, ngram_size) * max_penalty or 0.0 for ids in completion_ids]

    return repetition_penalty_reward


def _repeated_part(ids: Sequence[int], size: int) -> float:
    count = len(ids) - size + 1
    return 1 - len({tuple(ids[start : start + size]) for start in range(count)}) / count if count > 0 else 0.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float | None]]:
    """A reward against length: 0 up to L − C tokens, then falling evenly to −1 at L, and −1 beyond.

    L = `max_completion_len` ≥ 1, usually the length limit of generation; C = `soft_punish_cache`, from 0 (no slope)
    to L (Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 13).

    Raises:
        RewardError: for numbers out of these bounds.
    """
    L, C = max_completion_len, soft_punish_cache
    if not isinstance(L, int) or L < 1:
        raise RewardError(f"soft_overlong: max_completion_len = {L!r}; give a whole number of tokens ≥ 1")
    if not isinstance(C, int) or not 0 <= C <= L:
        raise RewardError(f"soft_overlong: soft_punish_cache = {C!r}; give a whole number of tokens from 0 to {L}")

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        over = [min(len(ids), L + 1) - (L - C) for ids in completion_ids]
        return [0.0 if n <= 0 else -1.0 if n > C else -n / C for n in over]

    return soft_overlong_punishment_reward


def _requires(column: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn the TypeError of a call that lacks a dataset column into a RewardError that says so."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps the signature, by which `check_columns` sees the column
        def call(completions: Sequence[Completion], *positional: Any, **columns: Any) -> Any:
            if not positional and column not in columns:
                raise RewardError(
                    f"{function.__name__} requires the column {column!r}; add it to the dataset or leave the reward out"
                )
            return function(completions, *positional, **columns)

        return call

    return decorate


@_requires("answer")
def exact_answer_reward(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """Whether a completion is the answer: 1 where completion and `answer` are the same text, else 0.

    White space around either does not count. Numbers are compared as Python writes them: 4 is "4" and not "4.0".
    Where the row's answer is null the score is missing.

    Raises:
        RewardError: where there is no column `answer`, or it has another length.
    """
    if len(answer) != len(completions):
        raise RewardError(
            f"exact_answer_reward: {len(answer)} answers for {len(completions)} completions; give one for each"
        )
    return [
        None if expected is None else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer, strict=True)
    ]


exact_answer_reward.quick = True  # type: ignore[attr-defined]  # text of any length is compared in microseconds
