"""Does the memory formula hold? Predicted beside measured, for the phases of a run.

    python benchmarks/bench_memory.py [--model Qwen3-0.6B --dtype bfloat16 --prompts 2 --group 8 --tokens 512]
                                      [--lora 16 --bits 4]

Random weights, with `--lora` an adapter beside them, with `--bits` packed in groups of 64. Makes the memory plan of
such a run, then does its phases without actors: decodes every completion to its full length, lets the engine go, learns
twice; all that a run holds is held. Prints one JSON line for each choice of `--micro-batches` and `--checkpointing`;
peaks are MLX's, cached buffers not counted. With `--limit` MLX waits rather than run ahead over it, as in a run;
`--limit 0` shows what the work itself needs, slowly.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from importlib.metadata import version
from itertools import product

import msgspec

import troupe  # first: it loads OpenBLAS before MLX
from troupe import RunConfig
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.checkpoint import CheckpointConfig
from troupe.grpo import LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.policy import (
    DTYPES,
    PRESETS,
    Adapter,
    AdapterConfig,
    Base,
    GenerationConfig,
    NetworkConfig,
    Policy,
    RolloutEngine,
    RolloutRequest,
    is_on_cpu,
)
from troupe.policy.adapter.modules import init_adapter, resolve_adapter
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.policy.network.tensors import network_shapes
from troupe.run.memory import Plan, peak_bytes, plan_memory
from troupe.run.workload import Workload
from troupe.runtime.memory import GB

import mlx.core as mx  # isort: skip


def plan_of(args: argparse.Namespace, micro_batches: int, checkpointing: bool) -> Plan:
    """What is predicted."""
    config = RunConfig(
        memory_limit_gb=args.memory_limit,
        generation=GenerationConfig(num_generations=args.group, max_completion_length=args.tokens - args.prompt_tokens),
        learner=LearnerConfig(
            batch_size=args.prompts,
            gradient_accumulation_steps=micro_batches,
            gradient_checkpointing=checkpointing,
        ),
        checkpoint=CheckpointConfig(overlap=False),
    )
    work = Workload(
        policy=network_of(args),
        dtype=DTYPES[args.dtype],
        adapter=None if args.lora is None else adapter_of(args),
        longest_prompt=args.prompt_tokens,
        on_cpu=is_on_cpu(),
    )
    return plan_memory(config, work)


def network_of(args: argparse.Namespace) -> NetworkConfig:
    """The network, packed or not."""
    packing = None if args.bits is None else Quantization(Quantized(64, args.bits))
    return msgspec.structs.replace(PRESETS[args.model], quantization=packing)


def adapter_of(args: argparse.Namespace) -> Adapter:
    """All linear layers."""
    return resolve_adapter(AdapterConfig(kind="lora", rank=args.lora), PRESETS[args.model])


def policy_of(args: argparse.Namespace) -> Policy:
    """Random weights, matrix by matrix, as they are to be held."""
    network, weights = network_of(args), dict[str, mx.array]()
    for number, (name, shape) in enumerate(network_shapes(network).items()):
        key, dtype = mx.random.key(number), DTYPES[args.dtype]
        x = mx.ones(shape, dtype) if len(shape) == 1 else (mx.random.normal(shape, key=key) * 0.02).astype(dtype)
        if args.bits is not None and len(shape) > 1:
            parts = mx.quantize(x, group_size=64, bits=args.bits)
            named = zip(("weight", "scales", "biases"), parts, strict=True)
            weights |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in named}
        else:
            weights[name] = x
        mx.eval(weights)
    if args.lora is None:
        return Policy(network, weights)
    adapter = adapter_of(args)
    base = Base.of(network, weights, adapter)
    return Policy(network, init_adapter(network, adapter, "default", 0), base=base)


def do_phases(plan: Plan, args: argparse.Namespace, policy: Policy) -> dict[str, float]:
    """Peaks in GB and seconds of the phases."""
    config = plan.config
    rng = random.Random(0)
    prompts = [
        tuple(rng.randrange(policy.config.vocab_size) for _ in range(args.prompt_tokens)) for _ in range(args.prompts)
    ]
    weights, state = policy.weights, adamw_init(policy.weights)
    policy.weights = {}
    mx.eval(weights, state)
    figures = {"held_gb": mx.get_active_memory() / GB}
    completions = [
        [rng.randrange(policy.config.vocab_size) for _ in range(args.tokens - args.prompt_tokens)]
        for _ in range(args.prompts * args.group)
    ]
    if not args.no_decode:
        mx.reset_peak_memory()
        start_s = time.perf_counter()
        engine = RolloutEngine(policy.config, config.generation, stop_ids=frozenset(), base=policy.base)
        engine.load(weights, 0)
        list(engine.decode([RolloutRequest(prompt_ids=ids, key=(i,)) for i, ids in enumerate(prompts)]))
        engine.release()
        figures |= {"generate_gb": mx.get_peak_memory() / GB, "generate_s": time.perf_counter() - start_s}
    batch = make_batch(
        [ids for ids in prompts for _ in range(args.group)],
        completions,
        [[-12.0] * len(row) for row in completions],
        [rng.gauss(0, 1) for _ in completions],
        pad_id=0,
    )
    log_probs = CompletionLogProbs(
        policy.config,
        1.0,
        recompute=config.learner.gradient_checkpointing or False,
        entropy_gradient=False,
        base=policy.base,
    )
    for _ in range(args.steps):
        published = weights  # what the generator would decode with
        mx.reset_peak_memory()
        start_s = time.perf_counter()
        result = train_on_batch(published, state, batch, log_probs, config.learner, lr=1e-6)
        weights, state = result.weights, result.optimizer_state
        figures |= {"learn_gb": mx.get_peak_memory() / GB, "learn_s": time.perf_counter() - start_s}
        del published, result
    return figures


def main() -> None:
    """Print a line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRESETS), default="Qwen3-0.6B")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of prompt and completion together")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", type=int, choices=[0, 1], nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=float, help="GB that MLX is told not to run ahead over")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora", type=int, metavar="RANK", help="an adapter of all linear layers")
    parser.add_argument("--bits", type=int, help="of packed matrices")
    parser.add_argument("--memory-limit", type=float, help="GB that the plan has to fit, as memory_limit_gb")
    args = parser.parse_args()
    if args.limit is not None:
        mx.set_memory_limit(max(1, round(args.limit * GB)))
    for micro_batches, checkpointing in product(args.micro_batches, args.checkpointing):
        plan = plan_of(args, micro_batches, bool(checkpointing))
        policy = policy_of(args)
        mx.clear_cache()
        figures = do_phases(plan, args, policy)
        predicted = {f"predicted_{name}_gb": peak_bytes({name: items}) / GB for name, items in plan.phases.items()}
        line = {
            "benchmark": "memory",
            **{key: value for key, value in vars(args).items() if key not in ("micro_batches", "checkpointing")},
            "micro_batches": micro_batches,
            "checkpointing": bool(checkpointing),
            **{name: round(value, 3) for name, value in (predicted | figures).items()},
            "plan": plan.notices,
            "device": str(mx.default_device()),
            "machine": platform.platform(),
            "mlx": version("mlx"),
            "troupe": troupe.__version__,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
