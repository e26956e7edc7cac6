"""Tokens, chat templates and prompts: the cases of `tests/data/cases` that are about text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cases.cases import CASES, expected_of
from tests.policy.tokenizer_vectors import DATA, qwen_rank_file
from troupe.policy import Tokenizer


@pytest.mark.parametrize("case", ["tokens_decoder_only", "tokens_special_flag"])
def test_tokens_of_the_config_beside_tokenizer_json(case: str) -> None:
    expected = expected_of(case)
    tokenizer = Tokenizer.from_pretrained(CASES / case / "model")
    assert tokenizer.encode(expected["text"]) == expected["ids"]
    assert tokenizer.decode(expected["ids"]) == expected["decoded_without_special"]


def test_nfc_newer_marks(tmp_path: Path) -> None:
    shutil.copy(qwen_rank_file(), tmp_path / "qwen.tiktoken")
    shutil.copy(DATA / "tokenizer_config.json", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    rows: list[dict[str, Any]] = expected_of("nfc_newer_marks")["rows"]
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
