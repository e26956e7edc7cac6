"""Does the cost of generation grow as the work does: with rows, with context, with the model?

    python -m benchmarks.bench_scaling [--models Qwen3-0.6B Qwen3-1.7B Qwen3-4B --dtype bfloat16] [--parts rows context]

Rows: 1 … 256 of a prompt of 128 tokens each eight, `--new-tokens` new ones. Context: prompts of 128 … 4,096 tokens, 32
rows. Prints one JSON line a shape, as `bench_generation.py` does.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.bench_generation import arguments, measure, policy_of

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = (128, 256, 512, 1024, 2048, 4096)


def shapes(part: str) -> list[dict[str, int]]:
    """What differs from one measurement to the next."""
    if part == "rows":
        return [{"prompts": max(1, rows // 8), "group": min(rows, 8), "prompt_tokens": 128} for rows in ROWS]
    return [{"prompts": 4, "group": 8, "prompt_tokens": tokens} for tokens in CONTEXT]


def main() -> None:
    """Measure every shape of every model."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["Qwen3-0.6B"])
    parser.add_argument("--parts", nargs="+", choices=["rows", "context"], default=["rows", "context"])
    asked = parser.parse_args()
    for model in asked.models:
        fixed = {key: value for key, value in vars(asked).items() if key not in ("models", "parts", "model")}
        policy = policy_of(argparse.Namespace(**fixed, model=model))
        for part in asked.parts:
            for shape in shapes(part):
                line = measure(policy, argparse.Namespace(**fixed | {"model": model} | shape))
                print(json.dumps({**line, "benchmark": "scaling", "part": part}), flush=True)


if __name__ == "__main__":
    main()
