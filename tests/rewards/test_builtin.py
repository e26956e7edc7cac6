"""The built-in rewards against numbers worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from troupe.errors import RewardError
from troupe.rewards import (
    check_columns,
    diversity_reward,
    exact_answer_reward,
    format_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    length_reward,
    think_format_reward,
)
from troupe.rewards.convention import reward_name


def chat(text: str | None) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": text}]


def test_length_is_1_at_the_target_and_falls_evenly_to_0_on_both_sides() -> None:
    texts = ["", "abc", " abcd\n", "abcdef", "abcdefgh", "a" * 99]
    assert length_reward(texts, target_length=4) == [0.0, 0.75, 1.0, 0.5, 0.0, 0.0]
    assert length_reward(prompts=["p"], completions=["a" * 50], answer=["x"]) == [0.25]


def test_message_lists_count_by_their_last_content() -> None:
    talk = [{"role": "assistant", "content": "zz"}, {"role": "assistant", "content": "abcd"}]
    assert length_reward([talk, chat(None), []], target_length=4) == [1.0, 0.0, 0.0]


def test_diversity_counts_repeats_within_and_across_the_group() -> None:
    # "a b a b": bigrams ab ba ab → 2 of 3 distinct; ab and ba are its own.       ½·2/3 + ½·1 = 5/6
    # "c d e" and "C d f": cd is shared, each has 2 distinct of 2, 1 its own.      ½·1 + ½·½ = 3/4
    # "x" is one n-gram of its own; white space has none.
    scores = diversity_reward(["a b a b", "c d e", "C d f", "x", " "])
    assert scores == pytest.approx([5 / 6, 3 / 4, 3 / 4, 1.0, 0.0])


def test_diversity_compares_completions_of_one_prompt_only() -> None:
    completions = ["same words", "same words", "same words"]
    assert diversity_reward(completions) == [0.5, 0.5, 0.5]
    assert diversity_reward(completions, prompts=["p", "q", "q"]) == [1.0, 0.5, 0.5]
    assert diversity_reward(completions, prompts=[chat("p"), chat("q"), chat("p")]) == [0.5, 1.0, 0.5]


def test_diversity_with_single_words() -> None:
    assert diversity_reward(["a a b"], ngram_size=1) == [pytest.approx(0.5 * 2 / 3 + 0.5)]


def test_format_matches_the_whole_text_line_ends_included() -> None:
    reward = format_reward(r"<think>.*</think>\d+")
    texts = ["<think>a\nb</think>12", "<think>a</think>12 ", "x<think></think>1", chat("<think></think>7")]
    assert reward(texts, answer=["1"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert reward.__name__ == "format_reward"


def test_exact_answers_compare_as_text() -> None:
    scores = exact_answer_reward(completions=[" 4\n", "4", "4.0", chat("yes"), "?"], answer=["4", 4, 4, "yes ", None])
    assert scores == [1.0, 1.0, 0.0, 1.0, None]
    assert exact_answer_reward(["a"], ["a"]) == [1.0]


def test_exact_answer_names_the_column_it_misses() -> None:
    with pytest.raises(RewardError, match="requires the column 'answer'"):
        exact_answer_reward(completions=["a"], reply=["a"])
    with pytest.raises(RewardError, match="requires answer, but the dataset's columns are: reply"):
        check_columns(exact_answer_reward, {"reply"})
    with pytest.raises(RewardError, match="2 answers for 1 completions"):
        exact_answer_reward(["a"], ["a", "b"])


def test_thinking_starts_the_text_opens_once_and_ends() -> None:
    texts = ["<think>a\n</think>b", " <think>a</think>", "<think>a", "<think><think></think>"]
    assert think_format_reward(texts, answer=["1"] * 4) == [1.0, 0.0, 0.0, 0.0]
    assert think_format_reward([chat("<think></think>")]) == [1.0]


def test_what_the_prompt_opened_counts_as_thinking() -> None:
    texts = ["a\n</think>b", "a", "<think>a</think>", "</think>"]
    assert think_format_reward(texts, completion_starts=["<think>\n"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert think_format_reward([chat("a</think>")], completion_starts=["<think>"]) == [1.0]
    assert think_format_reward(["a</think>"], completion_starts=[""]) == [0.0]


def test_repetition_is_counted_over_token_ngrams() -> None:
    # bigrams 12 21 12: 2 of 3 distinct; 55 four times: 1 of 4.
    ids = [[1, 2, 1, 2], [5, 5, 5, 5, 5], [1, 2, 3], [1], []]
    reward = get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)
    assert reward(completion_ids=ids, prompts=["p"] * 5) == [pytest.approx(-0.5 / 3), -0.375, 0.0, 0.0, 0.0]
    assert get_repetition_penalty_reward()([[7, 7, 7, 7]]) == [-0.5]
    assert reward_name(reward) == "repetition_penalty_reward"


def test_overlong_completions_are_punished_softly_before_the_limit() -> None:
    reward = get_soft_overlong_punishment(10, 4)
    assert reward([[1] * n for n in (0, 6, 7, 9, 10, 11, 99)]) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0, -1.0]
    assert get_soft_overlong_punishment(10, 0)([[1] * 10, [1] * 11]) == [0.0, -1.0]
    assert reward_name(reward) == "soft_overlong_punishment_reward"


@pytest.mark.parametrize(
    ("make", "cases", "message"),
    [
        (lambda target: length_reward(["a"], target_length=target), [(0,), (-1,), (2.5,), ("4",)], "target_length"),
        (lambda size: diversity_reward(["a"], ngram_size=size), [(0,)], "ngram_size = 0"),
        (format_reward, [("(",), (3,)], "is no regular expression"),
        (
            get_repetition_penalty_reward,
            [(0, -1.0), (2.5, -1.0), (2, 0.5), (2, float("nan")), (2, float("-inf"))],
            "repetition_penalty: ",
        ),
        (get_soft_overlong_punishment, [(0, 0), (10.5, 1), (10, -1), (10, 11), (10, 1.5)], "soft_overlong: "),
    ],
)
def test_arguments_have_bounds(make: Callable[..., Any], cases: list[tuple[Any, ...]], message: str) -> None:
    for arguments in cases:
        with pytest.raises(RewardError, match=message):
            make(*arguments)
