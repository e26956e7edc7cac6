"""What does the full sampling chain cost over plain argmax, and how does it compare with mlx-lm's?

    python benchmarks/bench_sampling.py [--rows 64 --vocabulary 151936 272 --repeat 5]

The chain, as a decode calls it: logit bias and three penalties, temperature 0.7, top_k 50, top_p 0.95, min_p 0.05,
XTC, the draw and the drawn token's log-probs, by the model and as drawn. "nucleus" is top_p alone, which has to look at
every id. On an NVIDIA card each is one kernel; "plain" is what other devices do. mlx-lm's chain has the same settings,
but one list of recent tokens and one XTC draw for all rows, and no log-prob. Logits are normal with deviation 3.
Prints one JSON line of medians in milliseconds a token of all rows; mlx-lm's are null where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from troupe.policy import Sampler, SamplingConfig
from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.loop import draw_tokens

import mlx.core as mx  # isort: skip

FILTERS: dict[str, Any] = {"top_p": 0.95, "min_p": 0.05, "top_k": 50, "xtc_probability": 0.5, "xtc_threshold": 0.1}
PENALTIES: dict[str, Any] = {
    "logit_bias": {7: 1.0, 11: -1.0},
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
}
TEMPERATURE = 0.7


def main() -> None:
    """Time both chains at each size and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151_936, 272])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    line = {
        "benchmark": "sampling",
        "rows": args.rows,
        "repeat": args.repeat,
        "sizes": {str(V): measure(args.rows, V, args.repeat) for V in args.vocabulary},
        "device": str(mx.default_device()),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps(line))


def measure(B: int, V: int, repeat: int) -> dict[str, float | None]:
    """Medians at one size, with the ratio of the two full chains."""
    logits = mx.random.normal((B, V), key=mx.random.key(0)) * 3
    recent = mx.random.randint(0, V, (B, 20), key=mx.random.key(1))
    uniforms = mx.random.uniform(shape=(2, B), key=mx.random.key(2))
    mx.eval(logits, recent, uniforms)
    by_kernel = cuda_kernels.are_available()
    full = Sampler(SamplingConfig(temperature=TEMPERATURE, **FILTERS, **PENALTIES), special_ids=(0, 1))
    nucleus = Sampler(SamplingConfig(temperature=TEMPERATURE, top_p=0.95))
    choices: dict[str, Callable[[], Any] | None] = {
        "argmax_ms": lambda: mx.argmax(logits, axis=-1),
        "chain_ms": lambda: draw_tokens(full, logits, uniforms[0], recent, uniforms[1], by_kernel=by_kernel),
        "nucleus_ms": lambda: draw_tokens(nucleus, logits, uniforms[0], by_kernel=by_kernel),
        "plain_chain_ms": (lambda: draw_tokens(full, logits, uniforms[0], recent, uniforms[1])) if by_kernel else None,
        "plain_nucleus_ms": (lambda: draw_tokens(nucleus, logits, uniforms[0])) if by_kernel else None,
        "mlx_lm_chain_ms": mlx_lm_chain(logits, recent[0], PENALTIES, {**FILTERS, "xtc_special_tokens": [0, 1]}),
        "mlx_lm_nucleus_ms": mlx_lm_chain(logits, recent[0], {}, {"top_p": 0.95}),
    }
    found = medians_ms(choices, repeat)
    chain_ms, argmax_ms, theirs_ms = found["chain_ms"], found["argmax_ms"], found["mlx_lm_chain_ms"]
    assert chain_ms is not None
    assert argmax_ms is not None
    found["chain_over_argmax_ms"] = round(chain_ms - argmax_ms, 3)
    found["chain_over_mlx_lm"] = round(chain_ms / theirs_ms, 3) if theirs_ms else None
    return found


def mlx_lm_chain(
    logits: mx.array, recent: mx.array, penalties: dict[str, Any], filters: dict[str, Any]
) -> Callable[[], mx.array] | None:
    """mlx-lm's processors and sampler, called as its own `generate_step` does; None where it is not installed."""
    try:
        utils = importlib.import_module("mlx_lm.sample_utils")
    except ImportError:
        return None
    processors = utils.make_logits_processors(**penalties)
    sampler = utils.make_sampler(temp=TEMPERATURE, **filters)

    def run() -> mx.array:
        changed = mx.array(logits)  # the processors write into what they are given
        for processor in processors:
            changed = processor(recent, changed)
        drawn: mx.array = sampler(changed - mx.logsumexp(changed, axis=-1, keepdims=True))
        return drawn

    return run


def medians_ms(choices: dict[str, Callable[[], Any] | None], repeat: int) -> dict[str, float | None]:
    """Each choice once for warming up, then in turns, so that all see the same load of the machine."""
    times: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(repeat + 1):
        for name, choice in choices.items():
            if choice is not None:
                start_s = time.perf_counter()
                mx.eval(choice())
                times[name].append((time.perf_counter() - start_s) * 1e3)
    return {name: round(statistics.median(seen[1:]), 3) if seen else None for name, seen in times.items()}


if __name__ == "__main__":
    main()
