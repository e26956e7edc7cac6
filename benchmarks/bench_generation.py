r"""How many tokens a second does the engine decode, and how much memory does it take beside the weights?

    python benchmarks/bench_generation.py [--model tiny --prompts 4 --group 8 --prompt-tokens 64 --new-tokens 128]
    python benchmarks/bench_generation.py --model Qwen3-0.6B --dtype bfloat16 --prompts 32 \
        --prompt-tokens 128 --new-tokens 256 [--lora 16]

Random weights, with `--lora RANK` an adapter of all linear layers beside them, after a line without it; `tiny` has 8.9
million parameters. `--stop-ids K` makes K ids of the vocabulary end a completion, which gives ragged lengths; 0 lets
every one run to its limit. Prints one JSON line: medians of `--steps` warm rounds, and what
`RolloutEngine.memory_bytes` said before, with the weights that are laid out for decoding.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from importlib.metadata import version
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from troupe.policy import (
    DTYPES,
    PRESETS,
    AdapterConfig,
    Base,
    GenerationConfig,
    Policy,
    RolloutEngine,
    RolloutRequest,
    fused_copy_bytes,
    parameter_count,
    random_policy,
)
from troupe.policy.adapter.modules import init_adapter, resolve_adapter
from troupe.policy.decode.memory import decoding_adapter_bytes
from troupe.run.measure.work import SMALL

import mlx.core as mx  # isort: skip

TINY = SMALL.policy


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of the engine has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *PRESETS], default="tiny")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--stop-ids", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: no adapter")
    return parser


def measure(policy: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Decode `--steps` + 1 rounds of other prompts and noise; the first compiles and is not counted."""
    config = policy.config
    dice = random.Random(0)
    generation = GenerationConfig(num_generations=args.group, max_completion_length=args.new_tokens)
    stop_ids = frozenset(range(1000, 1000 + args.stop_ids))
    engine = RolloutEngine(config, generation, stop_ids=stop_ids, base=policy.base)
    engine.load(policy.weights, 0)
    held = mx.get_active_memory()
    predicted = engine.memory_bytes([args.prompt_tokens] * args.prompts)
    if (adapter := policy.base.adapter) is None:
        predicted += fused_copy_bytes(config, DTYPES[args.dtype])
    else:
        predicted += decoding_adapter_bytes(config, adapter, DTYPES[args.dtype])
    seconds, rates, tokens, peak = [], [], 0, 0
    for step in range(args.steps + 1):
        requests = [
            RolloutRequest(
                prompt_ids=tuple(dice.randrange(config.vocab_size) for _ in range(args.prompt_tokens)),
                key=(0, step, place),
            )
            for place in range(args.prompts)
        ]
        mx.reset_peak_memory()
        start_s = time.perf_counter()
        groups = list(engine.decode(requests))
        took_s = time.perf_counter() - start_s
        tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        peak = max(peak, mx.get_peak_memory())
        if step:
            seconds.append(took_s)
            rates.append(tokens / took_s)
    return {
        "benchmark": "generation",
        "parameters": parameter_count(config),
        **vars(args),
        "tokens": tokens,
        "seconds": round(statistics.median(seconds), 4),
        "tokens_per_s": round(statistics.median(rates), 1),
        "least_tokens_per_s": round(min(rates), 1),
        "most_tokens_per_s": round(max(rates), 1),
        "held_gb": round(held / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3),
        "predicted_gb": round((held + predicted) / 1e9, 3),
        "device": str(mx.default_device()),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }


def policy_of(args: argparse.Namespace) -> Policy:
    """The random policy that the options name."""
    policy = random_policy(TINY if args.model == "tiny" else PRESETS[args.model], dtype=args.dtype)
    if not args.lora:
        return policy
    config = policy.config
    adapter = resolve_adapter(AdapterConfig(kind="lora", rank=args.lora), config)
    base = Base.of(config, dict(policy.weights), adapter)
    return Policy(config, init_adapter(config, adapter, "default", 0), base=base)


def main() -> None:
    """Measure once and print the line, or two."""
    args = arguments(__doc__).parse_args()
    for rank in sorted({0, args.lora}):
        args.lora = rank
        print(json.dumps(measure(policy_of(args), args)), flush=True)


if __name__ == "__main__":
    main()
