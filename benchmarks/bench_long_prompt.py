"""What does reading a long prompt cost, in pieces and whole, and beside mlx-lm where it is installed?

    python benchmarks/bench_long_prompt.py [--lengths 2000 4000 8000 16000 --rounds 3 --whole-up-to 8000] [--learner]

Two layers with random weights, one prompt, one new token. Ways take turns within a round. With `--learner` instead what
learning takes of such a prompt and two completions of 64 tokens: the gradient, and log-probabilities alone. Prints one
JSON line: for each length and way the median seconds, those that processors worked, and the largest peak of MLX's
memory beside the weights, in GB.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import troupe  # noqa: F401 - first: it loads OpenBLAS before MLX
from troupe.policy import GenerationConfig, NetworkConfig, RolloutEngine, RolloutRequest, random_policy
from troupe.policy.decode import cache
from troupe.policy.gradient.backward import completion_gradients, completion_statistics, side_by_side
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.tensors import Weights

import mlx.core as mx  # isort: skip

CONFIG = NetworkConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=65536,
    tie_word_embeddings=True,
)
NEVER = sys.maxsize


def ours(engine: RolloutEngine, whole_prompt: int) -> Callable[[Sequence[int]], None]:
    """Decode one token after the prompt, which goes in pieces where it is longer than `whole_prompt`."""

    def read(prompt: Sequence[int]) -> None:
        before, cache.WHOLE_PROMPT = cache.WHOLE_PROMPT, whole_prompt
        try:
            list(engine.decode([RolloutRequest(prompt_ids=tuple(prompt), key=(0,))]))
        finally:
            cache.WHOLE_PROMPT = before

    return read


def mlx_lm(folder: Path) -> Callable[[Sequence[int]], None]:
    """The same by mlx-lm's `generate_step`, with its own size of pieces; raises ImportError where it is missing."""
    generate, utils = importlib.import_module("mlx_lm.generate"), importlib.import_module("mlx_lm.utils")
    model, _ = utils.load_model(folder)

    def read(prompt: Sequence[int]) -> None:
        next(iter(generate.generate_step(mx.array(list(prompt)), model, max_tokens=1)))

    return read


def gradient(weights: Weights) -> Callable[[Sequence[int]], None]:
    """Learn from two completions of a prompt; of the gradients each is given away as it comes."""

    def loss(statistics: TokenStatistics) -> tuple[mx.array, None]:
        return -mx.sum(statistics.log_probs), None

    def learn(prompt: Sequence[int]) -> None:
        for portion in side_by_side([completion_gradients(CONFIG, weights, *rows(prompt), loss)], (), []):
            mx.eval(portion)

    return learn


def log_probs(weights: Weights) -> Callable[[Sequence[int]], None]:
    """How likely two completions of a prompt are, without a gradient."""

    def tell(prompt: Sequence[int]) -> None:
        mx.eval(completion_statistics(CONFIG, weights, *rows(prompt)))

    return tell


def rows(prompt: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """A prompt twice, and a completion of 64 tokens of each."""
    dice = random.Random(0)
    return [list(prompt)] * 2, [[dice.randrange(CONFIG.vocab_size) for _ in range(64)] for _ in range(2)]


class Measured(NamedTuple):
    """One reading of a prompt."""

    seconds: float
    processor_s: float
    """What all threads worked."""
    peak_gb: float
    """Beside what was held before."""


def measured(read: Callable[[Sequence[int]], None], prompt: Sequence[int]) -> Measured:
    """Time it once."""
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start_s, worked_s = time.perf_counter(), time.process_time()
    read(prompt)
    seconds, processor_s = time.perf_counter() - start_s, time.process_time() - worked_s
    return Measured(seconds, processor_s, (mx.get_peak_memory() - held) / 1e9)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000, 16000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole-up-to", type=int, default=8000, help="longer prompts are not read whole")
    parser.add_argument("--learner", action="store_true", help="learn, instead of decoding")
    args = parser.parse_args()
    policy = random_policy(CONFIG)
    engine = RolloutEngine(CONFIG, GenerationConfig(num_generations=1, max_completion_length=1), stop_ids=frozenset())
    engine.load(policy.weights, 0)
    engine.current_weights()
    ways = {"pieces": ours(engine, cache.WHOLE_PROMPT), "whole": ours(engine, NEVER)}
    if args.learner:
        ways = {"gradient": gradient(policy.weights), "log-probs": log_probs(policy.weights)}
    dice = random.Random(0)
    line: dict[str, Any] = {"machine": platform.platform(), "mlx": version("mlx")}
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        with suppress(ImportError):
            if not args.learner:
                ways["mlx-lm"] = mlx_lm(Path(folder))
        for n in args.lengths:
            found: dict[str, list[Measured]] = {}
            for _ in range(args.rounds):
                prompt = [dice.randrange(CONFIG.vocab_size) for _ in range(n)]
                for way, read in ways.items():
                    if way != "whole" or n <= args.whole_up_to:
                        found.setdefault(way, []).append(measured(read, prompt))
            line[str(n)] = {
                way: {
                    "seconds": round(statistics.median(one.seconds for one in rounds), 3),
                    "processor_s": round(statistics.median(one.processor_s for one in rounds), 3),
                    "peak_gb": round(max(one.peak_gb for one in rounds), 3),
                }
                for way, rounds in found.items()
            }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
