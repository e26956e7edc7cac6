"""How much memory does a learner's step take, and how fast is it? Each measure against memory on its own.

    python benchmarks/bench_learner.py [--model Qwen3-0.6B --dtype bfloat16 --rows 16 --tokens 512]

Random weights; every row is a prompt of its own of `--prompt-tokens` tokens, the rest is completion, unless `--group`
rows share one. Tokens a second count rows × tokens. Prints one JSON line a variant, medians of `--steps` warm steps:

    plain        mx.value_and_grad over whole logits, then mlx.optimizers.AdamW (its moments are bfloat16)
    float32      the same, with float32 moments and weights, clipped by the norm
    head         and the head over the vocabulary in blocks, tokens packed
    layers       backwards layer by layer, keeping results of matrix products alone; updated piece by piece
    recompute    and the inside of layers computed again instead of kept
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import troupe  # first: it loads OpenBLAS before MLX
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import (
    Batch,
    LearnerConfig,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    entropy_from_logits,
    grpo_loss,
    make_batch,
    selective_log_softmax,
    train_on_batch,
)
from troupe.policy import PRESETS, NetworkConfig, Weights, hidden_states, parameter_count, project, random_policy

import mlx.core as mx  # isort: skip
from mlx.optimizers import AdamW  # isort: skip

VARIANTS = ("plain", "float32", "head", "layers", "recompute")
State = dict[str, mx.array]


def plain_log_probs(config: NetworkConfig, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
    """Rows of equal lengths, whole logits."""
    ids = mx.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
    hidden = hidden_states(config, weights, ids[:, :-1])[:, batch.prompt_ids.shape[1] - 1 :]
    logits = project(config, weights, hidden).astype(mx.float32)
    return selective_log_softmax(logits, batch.completion_ids), entropy_from_logits(logits)


def loss_of(log_probs: Callable[..., Any], batch: Batch) -> Callable[[Weights], mx.array]:
    """The loss of a batch as a function of the weights."""

    def loss(weights: Weights) -> mx.array:
        new, entropies = log_probs(weights, batch)
        return grpo_loss(new, None, batch.advantages, batch.completion_mask, LearnerConfig(), entropies=entropies)[0]

    return loss


def step_of(variant: str, config: NetworkConfig, micro_batches: int) -> Callable[[Weights, State, Batch], Any]:
    """(weights, state, batch) → weights, state."""
    packed = CompletionLogProbs(config, 1.0, recompute=variant == "recompute", entropy_gradient=False)
    optimizer = AdamW(1e-6)
    learner = LearnerConfig(gradient_accumulation_steps=micro_batches)

    def whole_logits(weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        return plain_log_probs(config, weights, batch)

    def plain(weights: Weights, state: State, batch: Batch) -> tuple[Weights, State]:
        state.clear()
        grads = mx.grad(loss_of(whole_logits, batch))(weights)
        weights = optimizer.apply_gradients(grads, dict(weights))
        mx.eval(weights, optimizer.state)
        return weights, state

    def at_once(weights: Weights, state: State, batch: Batch) -> tuple[Weights, State]:
        grads = mx.grad(loss_of(packed if variant == "head" else whole_logits, batch))(weights)
        grads, _ = clip_by_global_norm(grads, 1.0)
        weights, state = adamw_update(weights, grads, state, lr=1e-6)
        mx.eval(weights, state)
        return weights, state

    def ours(weights: Weights, state: State, batch: Batch) -> tuple[Weights, State]:
        result = train_on_batch(weights, state, batch, packed, learner, lr=1e-6)
        return result.weights, result.optimizer_state

    return {"plain": plain, "float32": at_once, "head": at_once}.get(variant, ours)


def make_rows(config: NetworkConfig, args: argparse.Namespace) -> Batch:
    """Random ids and advantages."""
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(config.vocab_size) for _ in range(n)]

    prompts = [ids(args.prompt_tokens) for _ in range(args.rows // args.group)]
    completions = [ids(args.tokens - args.prompt_tokens) for _ in range(args.rows)]
    return make_batch(
        [prompts[row // args.group] for row in range(args.rows)],
        completions,
        [[-10.0] * len(row) for row in completions],
        [rng.gauss(0, 1) for _ in range(args.rows)],
        pad_id=0,
    )


def main() -> None:
    """Time the variants and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRESETS), default="Qwen3-0.6B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=1, help="neighbouring rows that share a prompt")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, help="GB above which MLX waits before it begins more work")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    config = PRESETS[args.model]
    batch = make_rows(config, args)
    if args.memory_limit is not None:
        mx.set_memory_limit(round(args.memory_limit * 1e9))
    for variant in args.variants:
        policy = random_policy(config, dtype=args.dtype)
        weights: Weights = policy.weights
        policy.weights = {}
        state = adamw_init(weights)
        mx.eval(state)
        held = mx.get_active_memory()
        step = step_of(variant, config, args.micro_batches)
        seconds = []
        for count in range(args.steps + 1):
            published = weights  # a generator holds the weights that the step begins with
            mx.reset_peak_memory()
            start_s = time.perf_counter()
            weights, state = step(published, state, batch)
            if count:  # the first step compiles kernels
                seconds.append(time.perf_counter() - start_s)
        step_s = statistics.median(seconds)
        line = {
            "benchmark": "learner",
            "variant": variant,
            **{key: value for key, value in vars(args).items() if key != "variants"},
            "parameters": parameter_count(config),
            "held_gb": round(held / 1e9, 2),
            "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
            "step_s": round(step_s, 4),
            "tokens_per_s": round(args.rows * args.tokens / step_s),
            "device": str(mx.default_device()),
            "machine": platform.platform(),
            "mlx": version("mlx"),
            "troupe": troupe.__version__,
        }
        print(json.dumps(line), flush=True)
        del weights, state, published


if __name__ == "__main__":
    main()
