"""A small real model folder, made in milliseconds: Qwen3 architecture, random weights, byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from troupe.policy import NetworkConfig, random_policy

END, PAD = "<|endoftext|>", "<|pad|>"
CONFIG = NetworkConfig(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    eos_token_id=(256,),
    initializer_range=0.2,
)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE files write for each byte (GPT-2, Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_tiny_model(folder: Path, config: NetworkConfig = CONFIG, seed: int = 0) -> Path:
    """Write the folder and return it. `seed` changes the weights."""
    random_policy(config, seed).save(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write one of 258 ids beside a model: a byte each, and two special tokens."""
    tokens = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    added = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, text in enumerate((END, PAD))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "pad_token": PAD, "chat_template": TEMPLATE}), encoding="utf-8"
    )


def small_network(**changes: Any) -> NetworkConfig:
    """A network without a folder, whose random weights tell tokens apart; `changes`: keys of its config."""
    standard: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    return NetworkConfig(**standard | changes)
