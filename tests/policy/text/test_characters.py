"""BPE of characters with fallback to bytes, worked by hand: merges, bytes, decoding all at once and one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.policy.text.test_tokenizer import added, write
from troupe.errors import ModelError
from troupe.policy.decode.stopping import StopRules, StopWatch
from troupe.policy.text.tokenizer import Tokenizer

SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
VOCAB = {"<eos>": 0, "<unk>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
VOCAB |= {token: 300 + place for place, token in enumerate(["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "é", "▁▁"])}
MERGES = ["b c", "a b", "ab c", "▁ a", "▁ ▁"]


def content(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json; "model__x" in `changes` replaces a key of the model."""
    made: dict[str, Any] = {
        "added_tokens": [added("<eos>", 0), added("<unk>", 1)],
        "normalizer": SPACE,
        "pre_tokenizer": SPLIT,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [BACK, FALLBACK, FUSE]},
        "model": {
            "type": "BPE",
            "vocab": VOCAB,
            "merges": MERGES,
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
    for name, value in changes.items():
        of_model = name.startswith("model__")
        (made["model"] if of_model else made)[name.removeprefix("model__")] = value
    return made


def load(folder: Path, **changes: Any) -> Tokenizer:
    return Tokenizer.from_pretrained(write(folder, content(**changes), {"tokenizer_class": "PreTrainedTokenizerFast"}))


def bytes_of(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


def test_the_first_merge_of_the_list_comes_first_and_of_equal_ones_the_leftmost(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.encode("abc") == [301, 305], "b c is merged before a b, and a bc is no merge"
    assert tokenizer.encode("ab c a") == [304, 300, 303, 307]
    assert tokenizer.encode("   ") == [309, 300]


def test_what_is_no_token_is_its_bytes(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.encode("aé東b") == [301, 308, *bytes_of("東"), 302]
    assert tokenizer.encode("a\ud800") == [301, *bytes_of("\ufffd")], "half of a surrogate pair"
    assert tokenizer.decode(tokenizer.encode(" a東▁\n")) == " a東 \n"


def test_unknown_characters_without_bytes(tmp_path: Path) -> None:
    few = {token: id_ for token, id_ in VOCAB.items() if not token.startswith("<0xE")}
    assert load(tmp_path, model__vocab=few).encode("a東京!b") == [301, 2 + ord("!"), 1, 302], (
        "as the library orders them"
    )
    assert load(tmp_path, model__vocab=few, model__fuse_unk=False).encode("a東京b") == [301, 1, 1, 302]
    assert load(tmp_path, model__vocab=few, model__unk_token=None).encode("a東b") == [304], "dropped"


def test_bytes_in_a_row_are_text_as_a_whole_or_one_replacement_each(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.decode([*bytes_of("東京"), 301]) == "東京a"
    assert tokenizer.decode([*bytes_of("東"), 2 + 0xFF, 301]) == "\ufffd" * 4 + "a"
    assert tokenizer.decode([*bytes_of("東")[:2], 0, bytes_of("東")[2]]) == "東", "around a special token left out"


def test_a_stream_waits_for_the_end_of_bytes(tmp_path: Path) -> None:
    stream = load(tmp_path).decode_stream()
    assert [stream.push(id_) for id_ in [307, *bytes_of("é"), 0, 302]] == [" a", "", "", "", "éb"]
    assert [stream.push(bytes_of("é")[0]), stream.finish(), stream.finish()] == ["", "\ufffd", ""]


def test_a_stop_string_of_bytes_is_found_at_the_token_behind_them(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    watch = StopWatch(StopRules(frozenset(), ["東"], lambda: tokenizer.decode_stream(skip_special_tokens=False)))
    assert [watch.push(id_) for id_ in [*bytes_of("東"), 301]] == [None, None, None, "stop"]


def test_mistral_puts_a_space_before_a_text_and_takes_it_away(tmp_path: Path) -> None:
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACE]}
    decoder = {"type": "Sequence", "decoders": [BACK, FALLBACK, FUSE, STRIP]}
    tokenizer = load(tmp_path, normalizer=before, decoder=decoder, pre_tokenizer=None)
    assert tokenizer.encode("a b") == [307, 300, 302]
    assert tokenizer.encode("a<eos>a") == [307, 0, 307], "before every piece"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([307, 300, 302]) == "a b"
    assert tokenizer.decode([309, 301]) == " a"
    stream = tokenizer.decode_stream()
    assert [stream.push(id_) for id_ in [300, 307]] == ["", " a"]


def test_added_tokens_of_white_space_and_thousands_of_others(tmp_path: Path) -> None:
    many = [added(f"<unused{n}>", 1000 + n, special=False) for n in range(3000)]
    blank = [added("\n\n", 500, special=False), added("▁▁▁", 501, special=False), added("\n" * 60, 502, special=False)]
    tokenizer = load(tmp_path, added_tokens=[added("<eos>", 0), *blank, *many])
    assert tokenizer.encode("<unused10><unused1000><unused7") == [1010, 2000, *bytes_of("<unused7")]
    assert tokenizer.encode("a\n\n\na") == [301, 500, 2 + 10, 301]
    assert tokenizer.encode("\n" * 61) == [502, 2 + 10]
    assert tokenizer.encode("▁▁▁   ") == [501, 309, 300]
    assert tokenizer.decode([501, 301]) == "   a"


def test_what_is_remembered_is_bounded_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("troupe.policy.text.character_pairs._MOST_REMEMBERED", 2)
    tokenizer = load(tmp_path)
    text = "ab abc  a b ca ab"
    assert tokenizer.encode(text) == tokenizer.encode(text) == load(tmp_path).encode(text)
    assert len(tokenizer._pairs._remembered) <= 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__byte_fallback": False}, "pre_tokenizer has no 'ByteLevel' part and model.byte_fallback is false"),
        ({"model__dropout": 0.1}, "model.dropout is 0.1"),
        ({"model__wishes": [3]}, r"model.wishes is \[3\], which is not known; known are byte_fallback, "),
        ({"model__unk_token": "<none>"}, "model.unk_token '<none>' is not in the vocabulary"),
        ({"model__vocab": {**VOCAB, "d": 301}}, "269 tokens have only 268 different ids"),
        ({"model__merges": ["a c"]}, "merge 1, 'a c', does not make a token"),
        (
            {"model__vocab": {**VOCAB, "xy": 400}, "model__merges": ["x y"]},
            "the merge of 'x' and 'y' joins what is not",
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}},
            "'Replace' is not supported, .*Regex",
        ),
        (
            {"normalizer": {"type": "Strip", "strip_left": True}},
            "normalizer 'Strip' is not supported, only NFC.*strip_left",
        ),
        ({"normalizer": None}, "pre_tokenizer part .*MergedWithPrevious.* is not supported; supported are none"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, "part .*Metaspace.* is not supported"),
        ({"decoder": None}, "decoder is null"),
        ({"decoder": {"type": "Metaspace"}}, "decoder 'Metaspace' is not supported here"),
        (
            {"decoder": {"type": "Sequence", "decoders": [FALLBACK, BACK, FUSE]}},
            "decoder 'Replace' is not supported here",
        ),
        ({"decoder": {"type": "Sequence", "decoders": [BACK, STRIP, FUSE]}}, "decoder 'Strip' is not supported here"),
        ({"decoder": {"type": "Sequence", "decoders": [FUSE, {**STRIP, "stop": 1}]}}, "decoder 'Strip'"),
    ],
)
def test_unsupported_parts_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"tokenizer\.json: .*{message}"):
        load(tmp_path, **changes)


def test_options_that_say_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    made = content(model__wishes=None, truncation=None, padding=None, version="1.0")
    assert Tokenizer.from_pretrained(write(tmp_path, json.loads(json.dumps(made)))).encode("a") == [301]
