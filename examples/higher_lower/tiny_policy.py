"""Small policies for the examples that act: a vocabulary in which given texts are one token each, and a network that is
taught conversations.

Their chat template tells each message by its role, and nothing else: what was said stays as it was, so conversations
keep their prefix. Tools are told by name alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import troupe  # noqa: F401 - before MLX, so that OpenBLAS is loaded first

# isort: split
import mlx.core as mx

from troupe.grpo import (
    LearnerConfig,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    learning_rate,
    selective_log_softmax,
)
from troupe.policy import NetworkConfig, Tokenizer, hidden_states, init_weights, project, save_model_folder

END = "<|end|>"
SPECIAL = ("<|endoftext|>", END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = """\
{%- if tools %}<|system|>
{%- for tool in tools %}{{ tool.function.name }}{% if not loop.last %}, {% endif %}{% endfor %}<|end|>
{%- endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

Part = tuple[str, bool]
"""A piece of a conversation as the template writes it, and whether the policy is to learn to say it."""


@dataclass(frozen=True)
class Shape:
    """Of a network, and of its training."""

    steps: int
    batch: int = 32
    lr: float = 1e-2
    hidden: int = 64
    layers: int = 2


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2's table), by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def merged(texts: Sequence[str]) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges in which each text, spelt from its left, becomes one token."""
    symbols = byte_symbols()
    vocab = {symbol: byte for byte, symbol in enumerate(symbols)}
    merges = []
    for text in texts:
        spelt = [symbols[byte] for byte in text.encode()]
        for length in range(2, len(spelt) + 1):
            whole = "".join(spelt[:length])
            if whole not in vocab:
                vocab[whole] = len(vocab)
                merges.append([whole[:-1], whole[-1]])
    return vocab, merges


def write_tokenizer(folder: Path, words: Sequence[str]) -> Tokenizer:
    """Write a tokenizer's files. Numbers are cut from what stands beside them; each of `words` is one token."""
    vocab, merges = merged(words)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = [{"id": len(vocab) + n, "content": text, "special": True, **plain} for n, text in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    numbers = {"type": "Split", "pattern": {"Regex": r"\p{N}+|[^\p{N}]+"}, "behavior": "Isolated", "invert": False}
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [numbers, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "pad_token": SPECIAL[0],
            "chat_template": TEMPLATE,
            "model_max_length": 256,
        },
        "generation_config.json": {"eos_token_id": added[1]["id"], "pad_token_id": added[0]["id"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def make_policy(
    folder: Path, words: Sequence[str], conversation: Callable[[], Sequence[Part]], shape: Shape, seed: int
) -> None:
    """Write the folder of a policy that was taught what `conversation` gives, another one each time."""
    tokenizer = write_tokenizer(folder, words)
    config = NetworkConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=100.0,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=(tokenizer.encode(END)[0],),
    )
    save_model_folder(folder, config, _taught(config, tokenizer, conversation, shape, seed))


def _taught(
    config: NetworkConfig, tokenizer: Tokenizer, conversation: Callable[[], Sequence[Part]], shape: Shape, seed: int
) -> dict[str, mx.array]:
    """Weights of the least mean cross-entropy of what the policy is to say."""

    def loss_of(weights: dict[str, mx.array], ids: mx.array, mask: mx.array) -> mx.array:
        logits = project(config, weights, hidden_states(config, weights, ids[:, :-1]))
        return -mx.sum(selective_log_softmax(logits, ids[:, 1:]) * mask) / mx.sum(mask)

    gradient = mx.value_and_grad(loss_of)
    weights = init_weights(config, mx.random.key(seed))
    state = adamw_init(weights)
    schedule = LearnerConfig(lr=shape.lr, lr_scheduler="cosine", warmup_steps=20)
    for step, (ids, mask) in zip(range(shape.steps), _lessons(tokenizer, conversation, shape.batch), strict=False):
        loss, grads = gradient(weights, ids, mask)
        grads, _ = clip_by_global_norm(grads, 1.0)
        lr = learning_rate(step, shape.steps, schedule)
        weights, state = adamw_update(weights, grads, state, lr=lr, weight_decay=0.01)
        mx.eval(loss, weights, state)
        if (step + 1) % max(1, shape.steps // 5) == 0:
            print(f"step {step + 1} of {shape.steps}: loss {float(loss):.3f}", flush=True)
    return weights


def _lessons(
    tokenizer: Tokenizer, conversation: Callable[[], Sequence[Part]], batch: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches for ever: ids (B, T) padded on the right, and float32 (B, T − 1) that is 1 where the policy speaks."""
    while True:
        rows = [_encoded(tokenizer, conversation()) for _ in range(batch)]
        T = max(len(ids) for ids, _ in rows)
        yield (
            mx.array([ids + [0] * (T - len(ids)) for ids, _ in rows]),
            mx.array([mask[1:] + [0.0] * (T - len(mask)) for _, mask in rows]),
        )


def _encoded(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[float]]:
    ids, mask = list[int](), list[float]()
    for text, is_said in parts:
        more = tokenizer.encode(text, add_special_tokens=False)
        ids += more
        mask += [float(is_said)] * len(more)
    return ids, mask
