"""What does reading a long prompt cost, in pieces and whole, and beside mlx-lm where it is installed?

    python benchmarks/bench_long_prompt.py [--lengths 2000 4000 8000 16000 --rounds 3 --whole-up-to 8000]

Two layers with random weights, one prompt, one new token. Ways take turns within a round. Prints one JSON line: for
each length and way the median seconds, and the largest peak of MLX's memory beside the weights, in GB.
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
from typing import Any

import troupe  # noqa: F401 - first: it loads OpenBLAS before MLX
from troupe.policy import GenerationConfig, NetworkConfig, RolloutEngine, RolloutRequest, random_policy
from troupe.policy.decode import cache

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


def measured(read: Callable[[Sequence[int]], None], prompt: Sequence[int]) -> tuple[float, float]:
    """Seconds, and GB at the peak beside what was held before."""
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start_s = time.perf_counter()
    read(prompt)
    return time.perf_counter() - start_s, (mx.get_peak_memory() - held) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000, 16000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole-up-to", type=int, default=8000, help="longer prompts are not read whole")
    args = parser.parse_args()
    policy = random_policy(CONFIG)
    engine = RolloutEngine(CONFIG, GenerationConfig(num_generations=1, max_completion_length=1), stop_ids=frozenset())
    engine.load(policy.weights, 0)
    engine.current_weights()
    ways = {"pieces": ours(engine, cache.WHOLE_PROMPT), "whole": ours(engine, NEVER)}
    dice = random.Random(0)
    line: dict[str, Any] = {"machine": platform.platform(), "mlx": version("mlx")}
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        with suppress(ImportError):
            ways["mlx-lm"] = mlx_lm(Path(folder))
        for n in args.lengths:
            found: dict[str, list[tuple[float, float]]] = {}
            for _ in range(args.rounds):
                prompt = [dice.randrange(CONFIG.vocab_size) for _ in range(n)]
                for way, read in ways.items():
                    if way != "whole" or n <= args.whole_up_to:
                        found.setdefault(way, []).append(measured(read, prompt))
            line[str(n)] = {
                way: {
                    "seconds": round(statistics.median(s for s, _ in rounds), 3),
                    "peak_gb": round(max(gb for _, gb in rounds), 3),
                }
                for way, rounds in found.items()
            }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
