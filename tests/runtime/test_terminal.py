"""What acts on a terminal is told as an escape, whichever way it goes there."""

from __future__ import annotations

import json

import pytest

from troupe.runtime.terminal import harmless, narrowed, one_line, safe_json

ACTING = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u061c\u200e\u202e\u2066\u2069\u2028\u2029", "\ud800"]


def test_text_on_one_line() -> None:
    assert one_line("a\nb\tc\x1b[0m\u202ed\ud800e") == "a⏎b\\tc\\x1b[0m\\u202ed\\ud800e"
    assert one_line("a\n→", "ascii") == "a\\u23ce\\u2192"
    assert one_line("plain 漢字 é") == "plain 漢字 é"


def test_text_of_several_lines_keeps_lines_tabs_and_what_only_joins_letters() -> None:
    assert harmless("a\tb\nc\x1b[2J\x07\r\x9b") == "a\tb\nc\\x1b[2J\\x07\\r\\x9b"
    assert harmless("👩\u200d🚀 é") == "👩\u200d🚀 é"


@pytest.mark.parametrize("char", ACTING, ids=lambda char: f"U+{ord(char):04X}")
def test_nothing_that_acts_comes_through(char: str) -> None:
    text = f"a{char}b"
    assert char not in one_line(text)
    assert char in "\n\t" or char not in harmless(text)
    if char != "\ud800":  # which is not in JSON either
        told = safe_json(json.dumps(text, ensure_ascii=False))
        assert char not in told
        assert json.loads(told) == text


def test_rows_that_are_too_long_go_on_below_their_text() -> None:
    rows = "\n".join(
        [
            "runs/a: running, step 3 of 10",
            "  now           generating step 58, learning step 57",
            "                and more of it all, too",
            "plain words",
        ]
    )
    assert narrowed(rows, 80) == rows
    assert narrowed(rows, 32).splitlines() == [
        "runs/a: running, step 3 of 10",
        "  now           generating step",
        "                58, learning",
        "                step 57",
        "                and more of it",
        "                all, too",
        "plain words",
    ]
    assert narrowed("Python  /a/path/that/is/longer/than/it (x)", 20).splitlines() == [
        "Python",
        "        /a/path/that/is/longer/than/it",
        "        (x)",
    ]
    assert narrowed("one two three four", 8).splitlines() == ["one two", "    three", "    four"]
