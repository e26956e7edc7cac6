"""Makes the policy and the games of this example: a small network that knows how to call the tool, and plays badly.

    python examples/higher_lower/make_policy.py

It writes `policy/`, `games.jsonl` and `held-out.jsonl` beside this file. The policy is a Qwen3 network of some 500,000
weights with a vocabulary of its own, in which every number up to 99 is one token. It is trained, supervised, on games of
a player who mostly guesses any number of the range, whatever was answered, and now and then one amidst what is left. A
game is a range and a secret number in it; no held-out game is ever played in either training. Takes half a minute on two
CPU cores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
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
from troupe.policy import NetworkConfig, Tokenizer, Weights, hidden_states, init_weights, project, save_model_folder

HERE = Path(__file__).parent
END = "<|end|>"
SPECIAL = ("<|endoftext|>", END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CALL, CLOSE = '<tool_call>\n{"name": "guess", "arguments": {"number": ', "}}\n</tool_call>"
WORDS = (CALL, CLOSE, "guess", "higher", "lower", "right", ": ", " to ", "done")
"""Texts that are one token each, beside the bytes and the numbers."""
LARGEST = 50
WIDTH = 20
"""Numbers in a range."""
TRIES = 5

TEMPLATE = """\
{%- if tools %}<|system|>
{%- for tool in tools %}{{ tool.function.name }}{% if not loop.last %}, {% endif %}{% endfor %}<|end|>
{%- endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""What was said stays as it was, so conversations keep their prefix. Tools are told by name alone, since this policy
knows only one."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on."""

    seed: int = 0
    careful: float = 0.15
    """Part of the guesses that halve what is left; the others try its first number."""
    held_out: int = 100
    steps: int = 400
    batch: int = 32
    lr: float = 4e-3
    hidden: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Game:
    """A range, and the number in it."""

    low: int
    secret: int

    @property
    def high(self) -> int:
        return self.low + WIDTH - 1

    def row(self) -> dict[str, Any]:
        """As the dataset has it."""
        prompt = [{"role": "user", "content": f"{self.low} to {self.high}"}]
        return {"prompt": prompt, "low": self.low, "high": self.high, "secret": self.secret}


def play(game: Game, careful: float, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Guesses and what is answered, until the number is found or the tries are over."""
    low, high = game.low, game.high
    for _ in range(TRIES):
        guess = (low + high) // 2 if rng.random() < careful else low
        if guess == game.secret:
            yield guess, "right"
            return
        word, low, high = ("higher", guess + 1, high) if guess < game.secret else ("lower", low, guess - 1)
        yield guess, f"{word}: {low} to {high}"


def split_games(recipe: Recipe) -> tuple[list[Game], list[Game]]:
    """All games, shuffled → (those that may be played in training, held-out ones)."""
    games = [Game(low, low + n) for low in range(1, LARGEST - WIDTH + 2) for n in range(WIDTH)]
    random.Random(recipe.seed).shuffle(games)
    return games[recipe.held_out :], games[: recipe.held_out]


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


def write_tokenizer(folder: Path) -> int:
    """The tokenizer's files → how many tokens there are."""
    vocab, merges = merged([*map(str, range(10, LARGEST + 1)), *WORDS])
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
            "pad_token": "<|endoftext|>",
            "chat_template": TEMPLATE,
            "model_max_length": 256,
        },
        "generation_config.json": {
            "eos_token_id": added[1]["id"],
            "pad_token_id": added[0]["id"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(vocab) + len(added)


TOOLS = [{"type": "function", "function": {"name": "guess"}}]
"""As far as the template reads it."""


def spoken(tokenizer: Tokenizer, game: Game, recipe: Recipe, rng: random.Random) -> tuple[list[int], list[float]]:
    """Ids of a whole conversation, and 1 for each that the player says."""
    parts = [(tokenizer.apply_chat_template(game.row()["prompt"], tools=TOOLS), False)]
    for guess, answer in play(game, recipe.careful, rng):
        parts += [("<|assistant|>", False), (f"{CALL}{guess}{CLOSE}{END}", True), (f"<|tool|>{answer}{END}", False)]
    parts += [("<|assistant|>", False), (f"done{END}", True)]
    ids, mask = list[int](), list[float]()
    for text, is_said in parts:
        more = tokenizer.encode(text, add_special_tokens=False)
        ids += more
        mask += [float(is_said)] * len(more)
    return ids, mask


def lessons(tokenizer: Tokenizer, games: Sequence[Game], recipe: Recipe) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches for ever: ids (B, T) padded on the right, and float32 (B, T − 1) that is 1 where the player speaks."""
    rng = random.Random(recipe.seed + 1)
    while True:
        rows = [spoken(tokenizer, game, recipe, rng) for game in rng.choices(games, k=recipe.batch)]
        T = max(len(ids) for ids, _ in rows)
        yield (
            mx.array([ids + [0] * (T - len(ids)) for ids, _ in rows]),
            mx.array([mask[1:] + [0.0] * (T - len(mask)) for _, mask in rows]),
        )


def train_supervised(config: NetworkConfig, tokenizer: Tokenizer, games: Sequence[Game], recipe: Recipe) -> Weights:
    """Fit the policy to what the player says: mean cross-entropy of those tokens."""

    def loss_of(weights: dict[str, mx.array], ids: mx.array, mask: mx.array) -> mx.array:
        logits = project(config, weights, hidden_states(config, weights, ids[:, :-1]))
        return -mx.sum(selective_log_softmax(logits, ids[:, 1:]) * mask) / mx.sum(mask)

    gradient = mx.value_and_grad(loss_of)
    weights = init_weights(config, mx.random.key(recipe.seed))
    state = adamw_init(weights)
    schedule = LearnerConfig(lr=recipe.lr, lr_scheduler="cosine", warmup_steps=30)
    for step, (ids, mask) in zip(range(recipe.steps), lessons(tokenizer, games, recipe), strict=False):
        loss, grads = gradient(weights, ids, mask)
        grads, _ = clip_by_global_norm(grads, 1.0)
        lr = learning_rate(step, recipe.steps, schedule)
        weights, state = adamw_update(weights, grads, state, lr=lr, weight_decay=0.01)
        mx.eval(loss, weights, state)
        if (step + 1) % max(1, recipe.steps // 5) == 0:
            print(f"step {step + 1} of {recipe.steps}: loss {float(loss):.4f}", flush=True)
    return weights


def network(tokens: int, recipe: Recipe, end: int) -> NetworkConfig:
    """The shape of the policy."""
    return NetworkConfig(
        vocab_size=tokens,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=(end,),
    )


def make(out: Path, recipe: Recipe) -> None:
    """Write `policy/`, `games.jsonl` and `held-out.jsonl` into the folder `out`."""
    games, held_out = split_games(recipe)
    folder = out / "policy"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    config = network(tokens, recipe, tokenizer.encode(END)[0])
    save_model_folder(folder, config, train_supervised(config, tokenizer, games, recipe))
    for name, rows in (("games.jsonl", games), ("held-out.jsonl", held_out)):
        (out / name).write_text("".join(f"{json.dumps(game.row())}\n" for game in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the policy and the games of this example.")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="default: beside this file")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    make(options.out, Recipe(seed=options.seed))
