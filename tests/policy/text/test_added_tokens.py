"""Added tokens of several files: values that transformers 5.24 gives, and transformers itself where it is installed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.policy.text.test_tokenizer import BYTE_LEVEL, byte_tokenizer
from tests.support.extras import extra
from troupe.errors import ModelError
from troupe.policy.text.tokenizer import Tokenizer

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
"""256 to 260; the first three are special."""
TEXT = "a <|x|> b<think> <|y|>"
OTHER_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def token(content: str, **flags: Any) -> dict[str, Any]:
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"content": content, **plain, "special": True, **flags}


def typed(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


HELD = [token(name, special=place < 3) for place, name in enumerate(NAMES)]
DECODER = {str(256 + place): held for place, held in enumerate(HELD)}
CONFIG = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}


def folder_of(
    folder: Path, config: dict[str, Any], held: list[dict[str, Any]] = HELD, files: dict[str, Any] | None = None
) -> Path:
    tokens = [{**one, "id": 256 + place} for place, one in enumerate(held)]
    written = {
        "config.json": {"model_type": "qwen3"},
        "tokenizer.json": byte_tokenizer(added_tokens=tokens, normalizer={"type": "NFC"}, decoder=BYTE_LEVEL),
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", **CONFIG, **config},
        **(files or {}),
    }
    folder.mkdir(exist_ok=True)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_decoder_of_the_config_adds_tokens_and_decides_flags(tmp_path: Path) -> None:
    decoder = {**DECODER, "259": token("<think>"), "261": token("<|x|>", lstrip=True, special=False)}
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {"added_tokens_decoder": decoder}))
    ids = tokenizer.encode(TEXT)
    assert ids == [97, 261, 32, 98, 259, 32, *b"<|y|>"]
    assert tokenizer.decode(ids) == "a<|x|> b <|y|>"
    assert tokenizer.vocab_size == 262


def test_of_another_class_a_token_stays_special(tmp_path: Path) -> None:
    config = {**OTHER_CLASS, "added_tokens_decoder": DECODER}
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, config, [token(name) for name in NAMES]))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == "a <|x|> b <|y|>"


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({"additional_special_tokens": ["<|x|>", "<think>"]}, "extra"),
        ({"extra_special_tokens": ["<|x|>", "<think>"], "additional_special_tokens": ["<|y|>"]}, "extra"),
        ({"extra_special_tokens": {"image_token": "<|x|>", "t": "<think>"}}, ""),
        ({"image_token": "<|x|>", "thought_token": "<think>"}, ""),
        ({"sep_token": "<|x|>", "cls_token": typed("<think>", lstrip=True)}, ""),
    ],
)
def test_tokens_that_a_config_names_or_lists(tmp_path: Path, config: dict[str, Any], left: str, other: bool) -> None:
    """One that is listed, not named, becomes special in Qwen's class only, unless it is new."""
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {**config, **(OTHER_CLASS if other else {})}))
    ids = tokenizer.encode(TEXT)
    assert ids == [97, 32, 261, 32, 98, 259, 32, *b"<|y|>"]
    thought = "<think>" if left and other else ""
    assert tokenizer.decode(ids) == f"a  b{thought} <|y|>"


def test_new_tokens_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    config = {"eos_token": "<e>", "pad_token": "<p>", "bos_token": typed("<b>"), "sep_token": "<s>"}
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {"extra_special_tokens": ["<x>"], **config}))
    assert tokenizer.encode("<b><e><s><p><x>") == [261, 262, 263, 264, 265]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (261, 262, 264)


def test_named_tokens_lose_their_flags_in_qwens_class_alone(tmp_path: Path) -> None:
    decoder = {**DECODER, "259": token("<think>", special=False, lstrip=True, rstrip=True)}
    config = {"eos_token": "<think>", "added_tokens_decoder": decoder}
    assert Tokenizer.from_pretrained(folder_of(tmp_path, config)).encode("a <think> b") == [97, 32, 259, 32, 98]
    config |= OTHER_CLASS
    assert Tokenizer.from_pretrained(folder_of(tmp_path, config)).encode("a <think> b") == [97, 259, 98]


def test_qwens_class_has_default_tokens(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / "tokenizer_config.json").write_text('{"pad_token": null}')
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(OTHER_CLASS))
    assert Tokenizer.from_pretrained(folder).eos_token_id is None


def test_the_older_files_count_where_the_config_has_no_decoder(tmp_path: Path) -> None:
    files = {
        "special_tokens_map.json": {"eos_token": token("<think>"), "additional_special_tokens": ["<|x|>"]},
        "added_tokens.json": {"<|x|>": 261, "<|y|>": 262},
    }
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {}, files=files))
    ids = tokenizer.encode(TEXT)
    assert ids == [97, 32, 261, 32, 98, 259, 32, 262]
    assert (tokenizer.eos_token_id, tokenizer.decode(ids)) == (259, "a  b <|y|>")
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {"added_tokens_decoder": DECODER}, files=files))
    assert (tokenizer.encode(TEXT), tokenizer.eos_token_id) == ([97, 32, *b"<|x|> b", 259, 32, *b"<|y|>"], 258)


def test_named_tokens_of_every_kind_are_variables_of_the_template(tmp_path: Path) -> None:
    config = {"chat_template": "{{ eos_token }}{{ image_token }}{{ sep_token is defined }}", "image_token": "<|x|>"}
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, config))
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "<|im_end|><|x|>False"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": 3}, r"tokenizer_config\.json: key eos_token is '3'"),
        ({"extra_special_tokens": "<x>"}, "key extra_special_tokens is '<x>'"),
        ({"additional_special_tokens": [3]}, "key extra_special_tokens is '3'"),
        ({"added_tokens_decoder": {"259": "<x>"}}, "key added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": token("<x>")}}, "key added_tokens_decoder"),
        ({"added_tokens_decoder": {"259": token("<x>")}}, "'<think>' and '<x>' both have the id 259"),
        ({"added_tokens_decoder": {"97": token("<x>")}}, "'a' and '<x>' both have the id 97"),
        ({"added_tokens_decoder": {"-1": token("<x>")}}, "ids count from 0"),
    ],
)
def test_what_is_no_token_is_refused_by_key(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_pretrained(folder_of(tmp_path, config))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_folders_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    transformers = extra("transformers")
    text = "a <|x|> b<think> <|y|>\n<|im_end|> z_<|x|>_ </think><|e|> "
    for seed in range(300):
        folder = folder_of(tmp_path / str(seed), *drawn(random.Random(seed)))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer.from_pretrained(folder)
        where = (folder / "tokenizer_config.json").read_text()
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, where
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), where
        named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == named, where
        assert ours.vocab_size == len(theirs), where


def drawn(dice: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """A config, the tokens of `tokenizer.json`, and older files: some flags here, some tokens there."""

    def flagged(content: str, **flags: Any) -> dict[str, Any]:
        loose = {flag: dice.random() < 0.2 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        return token(content, **{**loose, **flags})

    def some() -> Any:
        content = dice.choice(["<|x|>", "<|y|>", "<think>", "b", "<|e|>"])
        return dice.choice([content, typed(content), typed(content, lstrip=True)])

    config: dict[str, Any] = {} if dice.random() < 0.7 else dict(OTHER_CLASS)
    held = [flagged(name) for name in NAMES]
    files: dict[str, Any] = {}
    if dice.random() < 0.5:
        decoder = [flagged(name) for name in NAMES] + [flagged("<|x|>")] * dice.randrange(2)
        config["added_tokens_decoder"] = {str(256 + place): one for place, one in enumerate(decoder)}
    elif dice.random() < 0.5:
        files["added_tokens.json"] = {"<|x|>": 261}
    for name in ("eos_token", "pad_token", "bos_token", "sep_token", "image_token"):
        if dice.random() < 0.3:
            config[name] = some()
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if dice.random() < 0.3:
            config[name] = [some() for _ in range(dice.randrange(3))]
    if dice.random() < 0.1:
        config["extra_special_tokens"] = {"one": "<|y|>"}
    if dice.random() < 0.3:
        files["special_tokens_map.json"] = {"eos_token": "<|y|>", "additional_special_tokens": ["<|e|>"]}
    return config, held, files


def test_special_tokens_are_split_like_text_where_the_config_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path, {"split_special_tokens": True}))
    assert tokenizer.encode("<|im_end|><think>") == [*b"<|im_end|>", 259]
    assert tokenizer.eos_token_id == 258
    assert tokenizer.decode([97, 258]) == "a"


def test_a_space_before_every_text_is_refused_and_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="add_prefix_space: true is not supported"):
        Tokenizer.from_pretrained(folder_of(tmp_path, {"add_prefix_space": True}))


def test_tokens_of_a_models_own_are_named_under_either_key(tmp_path: Path) -> None:
    for place, key in enumerate(["extra_special_tokens", "model_specific_special_tokens"]):
        tokenizer = Tokenizer.from_pretrained(folder_of(tmp_path / str(place), {key: {"x_token": "<|x|>"}}))
        assert tokenizer.encode("a<|x|>") == [97, 261]
        assert tokenizer.decode([97, 261]) == "a"
