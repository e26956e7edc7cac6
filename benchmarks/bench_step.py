r"""How long does one GRPO step take without actors: generating P × G completions, and learning from them?

    python -m benchmarks.bench_step [--prompts 4 --group 8 --prompt-tokens 64 --new-tokens 128 --steps 5]
    python -m benchmarks.bench_step --model Qwen3-0.6B --dtype bfloat16 --prompts 32 \
        --prompt-tokens 128 --new-tokens 256 --micro-batches 8

Random weights (`tiny`: 8.9 million parameters), no stop token unless `--stop-ids`, random rewards. Prints one JSON line
of medians.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from importlib.metadata import version

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_generation import arguments, policy_of
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import LearnerConfig, adamw_init, compute_advantages, make_batch, train_on_batch
from troupe.grpo.optimizer import LEARNING_RATE
from troupe.policy import GenerationConfig, RolloutEngine, RolloutRequest, parameter_count

import mlx.core as mx  # isort: skip


def main() -> None:
    """Time the steps and print the line."""
    parser = arguments(__doc__)
    parser.add_argument("--micro-batches", type=int, default=4)
    args = parser.parse_args()
    policy = policy_of(args)
    config = policy.config
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(config.vocab_size) for _ in range(args.prompt_tokens)) for _ in range(args.prompts)]
    rewards = mx.array([rng.random() for _ in range(args.prompts * args.group)])
    generation = GenerationConfig(num_generations=args.group, max_completion_length=args.new_tokens)
    engine = RolloutEngine(config, generation, stop_ids=frozenset(range(1000, 1000 + args.stop_ids)))
    learner = LearnerConfig(lr=1e-5, gradient_accumulation_steps=args.micro_batches)
    weights, state = policy.weights, adamw_init(policy.weights)
    del policy
    generate_s, learn_s, tokens = [], [], 0
    for step in range(args.steps + 1):
        start_s = time.perf_counter()
        engine.load(weights, step)
        requests = [RolloutRequest(prompt_ids=ids, key=(0, step, place)) for place, ids in enumerate(prompts)]
        groups = sorted(engine.decode(requests), key=lambda group: group.index)
        generated_s = time.perf_counter()
        engine.release()
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(len(completion.token_ids) for completion in completions)
        batch = make_batch(
            [ids for ids in prompts for _ in range(args.group)],
            [completion.token_ids for completion in completions],
            [completion.log_probs for completion in completions],
            compute_advantages(rewards, args.group),
            pad_id=0,
        )
        log_probs = CompletionLogProbs(config, 1.0, entropy_gradient=False)
        result = train_on_batch(weights, state, batch, log_probs, learner, lr=LEARNING_RATE)
        weights, state = result.weights, result.optimizer_state
        if step:  # the first step compiles kernels
            generate_s.append(generated_s - start_s)
            learn_s.append(time.perf_counter() - generated_s)
    line = {
        "benchmark": "step",
        "parameters": parameter_count(config),
        **vars(args),
        "generate_s": round(statistics.median(generate_s), 4),
        "learn_s": round(statistics.median(learn_s), 4),
        "generate_tokens_per_s": round(tokens / statistics.median(generate_s), 1),
        "step_tokens_per_s": round(tokens / statistics.median(map(sum, zip(generate_s, learn_s, strict=True))), 1),
        "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
        "device": str(mx.default_device()),
        "machine": platform.platform(),
        "mlx": version("mlx"),
        "troupe": troupe.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
