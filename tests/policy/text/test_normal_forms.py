"""Normal forms against Hugging Face's tokenizers, for every character, alone and among marks."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import get_args

import pytest

from tests.support.extras import extra
from troupe.policy.text import normal_forms
from troupe.policy.text.normal_forms import NormalForm, normalize

FORMS = get_args(NormalForm)
ABOVE, OVERLAY, IOTA = "\u0301", "\u0334", "\u0345"
"""Marks of the classes 230, 1 and 240: whatever has a class between is sorted past one of the last two."""


@cache
def everything() -> list[str]:
    """All code points but the surrogates."""
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@cache
def shaped() -> list[str]:
    """What has a class or parts here, or is left alone because some version of Unicode gave it one."""
    later = normal_forms._CUT.match
    return [c for c in everything() if unicodedata.combining(c) or unicodedata.decomposition(c) or later(c)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "characters", [pytest.param(shaped, id="shaped"), pytest.param(everything, id="all", marks=pytest.mark.slow)]
)
def test_every_character_is_treated_as_tokenizers_does(form: NormalForm, characters: Callable[[], list[str]]) -> None:
    theirs = getattr(extra("tokenizers").normalizers, form)()
    for before, after in (("", "\n"), ("a", OVERLAY + "b"), ("a" + IOTA, "b"), ("a", ABOVE)):
        text = "".join(f"{before}{character}{after}" for character in characters())
        if normalize(form, text) != theirs.normalize_str(text):
            wrong = [
                f"{ord(character):X}"
                for character in characters()
                if normalize(form, before + character + after) != theirs.normalize_str(before + character + after)
            ]
            pytest.fail(f"{form} between {before!r} and {after!r} of {' '.join(wrong[:50])}")


@pytest.mark.parametrize("form", FORMS)
def test_every_pair_that_composes_and_texts_of_marks(form: NormalForm) -> None:
    theirs = getattr(extra("tokenizers").normalizers, form)()
    parts = [unicodedata.decomposition(character).split() for character in shaped()]
    pairs = ["".join(chr(int(part, 16)) for part in pair) for pair in parts if pair and not pair[0].startswith("<")]
    assert len(pairs) > 1000
    text = "".join(f"{pair}\n" for pair in pairs)
    assert normalize(form, text) == theirs.normalize_str(text)
    dice = random.Random(0)
    marks = [character for character in shaped() if unicodedata.combining(character)]
    drawn = "".join(
        dice.choice((*"aäé\u1100\u1161\u11a8\U00011935\U000105d2", dice.choice(marks), dice.choice(marks)))
        for _ in range(20_000)
    )
    assert normalize(form, drawn) == theirs.normalize_str(drawn)


def test_marks_that_came_after_unicode_9_are_left_where_they_stand() -> None:
    assert normalize("NFC", "a\u0c3c\u0301") == "a\u0c3c\u0301"
    assert normalize("NFD", "é\u08d3\u0334") == "e\u0301\u08d3\u0334"
    assert normalize("NFC", "\U000105d2\u0307e\u0301") == "\U000105d2\u0307é"  # composes from Unicode 16 on
    assert normalize("NFKC", "\u32ff①") == "\u32ff1"
