"""Stop ids, stop strings and the repetition cut-off against the definition, checked over every prefix."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tests.support.tiny import write_tiny_model
from troupe.policy.decode.stopping import StopRules, StopWatch
from troupe.policy.text.tokenizer import Tokenizer

END = 256  # the tiny model's special token, "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("model")))


def text_rules(tokenizer: Tokenizer, *strings: str) -> StopRules:
    return StopRules(frozenset(), strings, lambda: tokenizer.decode_stream(skip_special_tokens=False))


def ends(rules: StopRules, ids: Sequence[int]) -> tuple[int, str] | None:
    """How many tokens are taken until the completion ends, and why."""
    watch = StopWatch(rules)
    for count, id_ in enumerate(ids, 1):
        if reason := watch.push(id_):
            return count, reason
    return None


def test_a_stop_id_ends_with_itself() -> None:
    assert ends(StopRules(frozenset({7, 9})), [1, 2, 9, 7]) == (3, "stop")
    assert ends(StopRules(frozenset()), [1, 2, 9, 7]) is None


@pytest.mark.parametrize(
    ("text", "strings", "count"),
    [
        ("the end. More", ("end",), 7),
        ("aab", ("ab",), 3),
        ("abababc", ("ababc",), 7),
        ("one\ntwo\n\nthree", ("\n\n", "three"), 9),
        ("Straße", ("ß",), 6),  # two bytes, so two tokens of this tokenizer
        ("日本語", ("本",), 6),
        ("e", ("ee",), None),
        ("é", ("\xc3",), None),  # half a character is no character
    ],
)
def test_stop_strings_end_with_the_token_that_completes_them(
    tokenizer: Tokenizer, text: str, strings: tuple[str, ...], count: int | None
) -> None:
    expected = None if count is None else (count, "stop")
    assert ends(text_rules(tokenizer, *strings), tokenizer.encode(text)) == expected


def test_stop_strings_are_found_where_the_whole_text_has_them(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    for _ in range(300):
        ids = [draw.choice([97, 98, 0xC3, 0xA9]) for _ in range(12)]
        strings = ["".join(draw.choices("abé", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 2))]
        texts = [tokenizer.decode(ids[:n]) for n in range(1, 13)]
        first = next((n for n, text in enumerate(texts, 1) if any(s in text for s in strings)), None)
        assert ends(text_rules(tokenizer, *strings), ids) == (None if first is None else (first, "stop"))


def test_tokens_of_several_characters_are_searched_whole() -> None:
    class Words:
        def push(self, token_id: int) -> str:
            return ["Hello ", "wor", "ld! And", " more"][token_id]

    assert ends(StopRules(frozenset(), ["!"], Words), [0, 1, 2, 3]) == (3, "stop")
    assert ends(StopRules(frozenset(), ["o wo"], Words), [0, 1, 2, 3]) == (2, "stop")
    assert ends(StopRules(frozenset(), ["Hello world! And more"], Words), [0, 1, 2, 3]) == (4, "stop")


def test_special_tokens_count_with_their_text_and_ids_without_text_do_not(tokenizer: Tokenizer) -> None:
    rules = text_rules(tokenizer, "<|endoftext|>", "ab")
    assert ends(rules, [99, END]) == (2, "stop")
    assert ends(text_rules(tokenizer, "ab"), [97, END, 98]) is None
    assert ends(rules, [97, 259, 98]) == (3, "stop")  # 259 is padding of the model's vocabulary


def test_every_completion_has_a_memory_of_its_own(tokenizer: Tokenizer) -> None:
    rules = text_rules(tokenizer, "ab")
    assert ends(rules, [97]) is None
    assert ends(rules, [98]) is None


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"stop is \['x'\], but there is no tokenizer"):
        StopRules(frozenset(), ["x"])


def is_repeated(ids: Sequence[int], cutoff: int, longest: int) -> bool:
    """The definition: the last p · cutoff tokens are the last p, `cutoff` times over, for some p ≤ longest."""
    return any(
        len(ids) >= p * cutoff and list(ids[-p * cutoff :]) == list(ids[-p:]) * cutoff for p in range(1, longest + 1)
    )


@pytest.mark.parametrize(
    ("ids", "cutoff", "longest", "count"),
    [
        ([1, 1, 1, 1], 3, 1, 3),
        ([1, 2, 1, 2, 1, 2], 3, 2, 6),
        ([1, 2, 1, 2, 1, 2], 3, 1, None),
        ([5, 1, 2, 3, 1, 2, 3, 1], 2, 3, 7),
        ([1, 1, 2, 1, 1, 2], 2, 8, 2),
        ([1, 2, 3, 4, 5], 2, 8, None),
    ],
)
def test_repetition_by_hand(ids: list[int], cutoff: int, longest: int, count: int | None) -> None:
    rules = StopRules(frozenset(), cutoff=cutoff, longest_pattern=longest)
    assert ends(rules, ids) == (None if count is None else (count, "repetition"))


@pytest.mark.parametrize("make", [lambda draw: draw.randrange(2), lambda draw: draw.randrange(3)])
def test_repetition_is_its_definition(make: Callable[[random.Random], int]) -> None:
    draw = random.Random(11)
    found = set()
    for _ in range(400):
        cutoff, longest = draw.randint(2, 4), draw.randint(1, 6)
        ids = [make(draw) for _ in range(30)]
        first = next((n for n in range(1, 31) if is_repeated(ids[:n], cutoff, longest)), None)
        rules = StopRules(frozenset(), cutoff=cutoff, longest_pattern=longest)
        assert ends(rules, ids) == (None if first is None else (first, "repetition"))
        found.add(first is None)
    assert found == {True, False}


def test_a_stop_counts_before_a_repetition() -> None:
    assert ends(StopRules(frozenset({4}), cutoff=2), [3, 4, 4]) == (2, "stop")
    assert ends(StopRules(frozenset({4}), cutoff=2), [3, 3, 4]) == (2, "repetition")
