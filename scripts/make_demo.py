"""Makes the demo that ships: a small policy that adds sloppily, and sums to teach it on.

    python scripts/make_demo.py [--out troupe/cli/demo]

The policy is a Qwen3 network of some 350,000 weights over single bytes. It is trained, supervised, on sums of two
numbers below 100 whose answers mostly forget to carry: 27+58 is usually 75 and only sometimes 85. So its most likely
answer to a sum with a carry is wrong, while among a few samples there is a right one, which is what GRPO needs.

Held-out sums are kept out of both trainings in either order: neither 27+58 nor 58+27 is ever seen. Knows nothing of
GRPO; `demo.toml`, which stands beside the files written here, is kept by hand. Takes some minutes on two CPU cores.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import troupe  # noqa: F401 - before MLX, so that OpenBLAS is loaded first

# isort: split
import click
import mlx.core as mx
import msgspec

from troupe.grpo import (
    LearnerConfig,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    learning_rate,
    selective_log_softmax,
)
from troupe.policy import (
    GenerationConfig,
    NetworkConfig,
    Policy,
    RolloutEngine,
    RolloutRequest,
    Weights,
    hidden_states,
    init_weights,
    load_policy,
    parameter_count,
    project,
    save_model_folder,
)

END_OF_TEXT = "<|endoftext|>"
END_ID = 256
DIGIT_PATTERN = r"\p{N}|[^\p{N}]+"
"""How the tokenizer cuts text before it looks for merges, of which there are none."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the result depends on."""

    seed: int = 0
    largest: int = 99
    """Operands are 0 … `largest`."""
    careful: float = 0.35
    """Part of the supervised answers that carry."""
    held_out: int = 400
    """Rows of the held-out file."""
    train: int = 4000
    """Rows of the training file."""
    steps: int = 1500
    """Supervised updates."""
    batch: int = 256
    lr: float = 3e-3
    warmup_steps: int = 50
    lr_scheduler: Literal["linear", "constant", "cosine"] = "cosine"
    weight_decay: float = 0.01
    hidden: int = 96
    layers: int = 3


class Sum(msgspec.Struct, frozen=True):
    """A problem: a + b."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def sloppy_answer(self) -> str:
        """Every column added on its own, what should be carried forgotten: 27+58 → 75, 64+52 → 16."""
        width = max(len(str(self.a)), len(str(self.b)))
        columns = zip(str(self.a).zfill(width), str(self.b).zfill(width), strict=True)
        return str(int("".join(str((int(x) + int(y)) % 10) for x, y in columns)))


def split_sums(recipe: Recipe) -> tuple[list[Sum], list[Sum]]:
    """All sums, shuffled → (those that may be trained on, held-out ones); a + b and b + a go together."""
    n = recipe.largest + 1
    rng = random.Random(recipe.seed)
    pairs = [(a, b) for a in range(n) for b in range(a, n)]
    rng.shuffle(pairs)
    held_out = [Sum(*rng.sample(pair, 2)) for pair in pairs[: recipe.held_out]]
    known = [Sum(*order) for a, b in pairs[recipe.held_out :] for order in sorted({(a, b), (b, a)})]
    rng.shuffle(known)
    return known, held_out


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2's table), by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def write_tokenizer(folder: Path) -> None:
    """The tokenizer's files: token id = byte, and <|endoftext|> as the end of a text and as padding."""
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    digits = {"type": "Split", "pattern": {"Regex": DIGIT_PATTERN}, "behavior": "Isolated", "invert": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {symbol: byte for byte, symbol in enumerate(byte_symbols())},
        "merges": [],
    }
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": END_ID, "special": True, **special}],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": model,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "added_tokens_decoder": {str(END_ID): {"special": True, **special}},
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": 64,
        },
        "generation_config.json": {"eos_token_id": END_ID, "pad_token_id": END_ID, "max_new_tokens": 8},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def network(recipe: Recipe) -> NetworkConfig:
    """The shape of the policy."""
    return NetworkConfig(
        vocab_size=END_ID + 1,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=(END_ID,),
    )


def lessons(known: Sequence[Sum], recipe: Recipe) -> Iterator[tuple[mx.array, mx.array]]:
    """Batches for ever: ids (B, T) padded on the right, and float32 (B, T − 1) that is 1 where an answer is foretold.

    Whether an answer carries is drawn anew each time, so that the policy learns a probability and no list of rows.
    """
    rng = random.Random(recipe.seed + 1)
    while True:
        rows, masks = [], []
        for problem in rng.choices(known, k=recipe.batch):
            answer = problem.answer if rng.random() < recipe.careful else problem.sloppy_answer
            prompt, completion = list(problem.prompt.encode()), [*answer.encode(), END_ID]
            rows.append(prompt + completion)
            masks.append([0.0] * (len(prompt) - 1) + [1.0] * len(completion))
        T = max(map(len, rows))
        yield (
            mx.array([row + [END_ID] * (T - len(row)) for row in rows]),
            mx.array([mask + [0.0] * (T - 1 - len(mask)) for mask in masks]),
        )


def train_supervised(config: NetworkConfig, known: Sequence[Sum], recipe: Recipe) -> Weights:
    """Fit the policy to sloppy answers: mean cross-entropy of the answers' tokens."""

    def loss_of(weights: dict[str, mx.array], ids: mx.array, mask: mx.array) -> mx.array:
        logits = project(config, weights, hidden_states(config, weights, ids[:, :-1]))
        return -mx.sum(selective_log_softmax(logits, ids[:, 1:]) * mask) / mx.sum(mask)

    gradient = mx.value_and_grad(loss_of)
    weights = init_weights(config, mx.random.key(recipe.seed))
    state = adamw_init(weights)
    schedule = LearnerConfig(lr=recipe.lr, lr_scheduler=recipe.lr_scheduler, warmup_steps=recipe.warmup_steps)
    for step, (ids, mask) in zip(range(recipe.steps), lessons(known, recipe), strict=False):
        loss, grads = gradient(weights, ids, mask)
        grads, _ = clip_by_global_norm(grads, 1.0)
        lr = learning_rate(step, recipe.steps, schedule)
        weights, state = adamw_update(weights, grads, state, lr=lr, weight_decay=recipe.weight_decay)
        mx.eval(loss, weights, state)
        if (step + 1) % max(1, recipe.steps // 10) == 0:
            click.echo(f"step {step + 1} of {recipe.steps}: loss {float(loss):.4f}")
    return weights


def right_answers(policy: Policy, problems: Sequence[Sum], *, samples: int, temperature: float) -> list[int]:
    """How many of `samples` completions of each problem are right."""
    generation = GenerationConfig(num_generations=samples, temperature=temperature, max_completion_length=8)
    engine = RolloutEngine(policy.config, generation, stop_ids=policy.eos_ids)
    engine.load(policy.weights, 0)
    requests = [
        RolloutRequest(prompt_ids=tuple(policy.tokenizer.encode(problem.prompt)), key=(0, place))
        for place, problem in enumerate(problems)
    ]
    counts = [0] * len(problems)
    for group in engine.decode(requests):
        texts = [policy.tokenizer.decode(completion.token_ids) for completion in group.completions]
        counts[group.index] = texts.count(problems[group.index].answer)
    return counts


def report(policy: Policy, held_out: Sequence[Sum]) -> None:
    """Print what the policy can do on sums that it has never seen."""
    greedy = right_answers(policy, held_out, samples=1, temperature=0.0)
    sampled = right_answers(policy, held_out, samples=8, temperature=1.0)
    carries = [n for n, problem in zip(sampled, held_out, strict=True) if problem.sloppy_answer != problem.answer]
    click.echo(f"held-out greedy accuracy      {sum(greedy) / len(greedy):.1%} of {len(greedy)}")
    click.echo(f"sampled pass rate             {sum(sampled) / len(sampled) / 8:.1%}")
    click.echo(f"  of problems with a carry    {sum(carries) / max(1, len(carries)) / 8:.1%}")
    click.echo(f"solved in 8 samples           {sum(n > 0 for n in sampled) / len(sampled):.1%}")
    click.echo(f"  of problems with a carry    {sum(n > 0 for n in carries) / max(1, len(carries)):.1%}")


def write_rows(file: Path, problems: Sequence[Sum]) -> None:
    """A JSON dataset, one row a line."""
    rows = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
    file.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def make_demo(out: Path, recipe: Recipe) -> None:
    """Write `policy/`, `arithmetic.json` and `arithmetic-held-out.json` into the folder `out`."""
    known, held_out = split_sums(recipe)
    config = network(recipe)
    click.echo(f"{parameter_count(config):,} weights, {len(known):,} sums to train on, {len(held_out)} held out")
    weights = train_supervised(config, known, recipe)
    folder = out / "policy"
    save_model_folder(folder, config, weights)
    write_tokenizer(folder)
    write_rows(out / "arithmetic.json", known[: recipe.train])
    write_rows(out / "arithmetic-held-out.json", held_out)
    report(load_policy(folder), held_out)


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path("troupe/cli/demo"), help="Folder to write to.")
@click.option("--seed", default=Recipe().seed)
@click.option("--steps", type=click.IntRange(1), default=Recipe().steps, help="Supervised updates.")
def main(out: Path, seed: int, steps: int) -> None:
    """Make the demo's policy and data."""
    make_demo(out, Recipe(seed=seed, steps=steps))


if __name__ == "__main__":
    main()
