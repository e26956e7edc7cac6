r"""Decoding and one step of learning of a family, beside mlx-lm with the same weights in the same process.

    python -m benchmarks.bench_families --model Qwen3-30B-A3B --layers 8 --rows 8 64 256
    python -m benchmarks.bench_families --model Qwen3.5-9B --layers 8 [--skip-theirs]

Needs mlx-lm in the interpreter. Random weights, as many of the model's layers as asked for. First both compute the
logits of the same ids, whose largest difference is told over the largest logit. Decoding: `--rows` rows of
`--prompt-tokens` random tokens, groups of `--group` that share a prompt, `--new-tokens` each, in turns; mlx-lm's batch
generator gives ids, ours their log-probabilities too. Learning: AdamW on `--learn-rows` rows of `--learn-tokens`, the
whole network (`--learn whole`) or an adapter on attention's matrices (rank 16). mlx-lm has no policy gradient: its side
is the mean of advantage times log-probability through its network, differentiated by MLX; ours is Troupe's step, which
computes entropies and ratios too. Prints a JSON line each: medians of `--steps` warm rounds, ratios theirs over ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import msgspec

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_learner import make_rows
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import LearnerConfig, adamw_init, train_on_batch
from troupe.policy import (
    PRESETS,
    AdapterConfig,
    Base,
    GenerationConfig,
    NetworkConfig,
    RolloutEngine,
    RolloutRequest,
    Weights,
    hidden_states,
    parameter_count,
    project,
    random_policy,
)
from troupe.policy.adapter.modules import init_adapter, resolve_adapter
from troupe.policy.network.tensors import as_stored

import mlx.core as mx  # isort: skip

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def their_model(config: NetworkConfig, weights: Weights) -> Any:
    """mlx-lm's network with these weights, in their type."""
    settings = config.to_dict()
    if settings["model_type"] == "qwen3_5_text":  # they have it as a part of a network that sees
        settings = {"model_type": "qwen3_5", "text_config": settings}
    # Not imported by name: the type checker of the repository runs without it.
    model_class, arguments = importlib.import_module("mlx_lm.utils")._get_classes(settings)
    model = model_class(arguments.from_dict(settings))
    model.load_weights(list(model.sanitize(as_stored(config, weights)).items()))
    mx.eval(model.parameters())
    model.eval()
    return model


def timed(steps: int, *sides: Callable[[int], object]) -> list[list[float]]:
    """Seconds of each side's rounds, in turns; the first of each compiles and is not counted."""
    seconds: list[list[float]] = [[] for _ in sides]
    for step in range(steps + 1):
        for side, took in zip(sides, seconds, strict=True):
            start_s = time.perf_counter()
            side(step)
            mx.synchronize()
            took += [time.perf_counter() - start_s] if step else []
    return seconds


def compared(ours: list[float], theirs: list[float] | None, scale: float) -> dict[str, Any]:
    """Medians, in seconds times `scale`, and the ratio of what both took."""
    line: dict[str, Any] = {"ours": round(statistics.median(ours) * scale, 3)}
    if theirs:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        line |= {"theirs": round(statistics.median(theirs) * scale, 3), "ratio": round(statistics.median(ratios), 2)}
    return line


def ids_of(dice: random.Random, config: NetworkConfig, rows: int, tokens: int) -> list[list[int]]:
    """Random ids (rows, tokens)."""
    return [[dice.randrange(config.vocab_size) for _ in range(tokens)] for _ in range(rows)]


def logits(config: NetworkConfig, weights: Weights, theirs: Any) -> dict[str, Any]:
    """The largest difference of both sides' logits, over the largest of theirs."""
    ids = mx.array(ids_of(random.Random(1), config, 4, 64))
    own = project(config, weights, hidden_states(config, weights, ids)).astype(mx.float32)
    other = theirs(ids).astype(mx.float32)
    difference = (mx.max(mx.abs(own - other)) / mx.max(mx.abs(other))).item()
    alike = mx.mean(mx.argmax(own, axis=-1) == mx.argmax(other, axis=-1)).item()
    return {"logits": {"difference": round(float(difference), 6), "likeliest_alike": round(float(alike), 4)}}  # type: ignore[arg-type]


def decoding(
    config: NetworkConfig, weights: Weights, theirs: Any, rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds a token of all rows, prompts included."""
    G, T = min(args.group, rows), args.new_tokens
    rounds = [ids_of(random.Random(step), config, rows // G, args.prompt_tokens) for step in range(args.steps + 1)]
    engine = RolloutEngine(config, GenerationConfig(num_generations=G, max_completion_length=T), stop_ids=frozenset())
    engine.load(weights, 0)

    def ours(step: int) -> None:
        requests = [RolloutRequest(prompt_ids=tuple(ids), key=(0, step, i)) for i, ids in enumerate(rounds[step])]
        list(engine.decode(requests))

    def others(step: int) -> None:
        generator = importlib.import_module("mlx_lm.generate").BatchGenerator(
            theirs,
            stop_tokens=[],
            sampler=importlib.import_module("mlx_lm.sample_utils").make_sampler(1.0),
            completion_batch_size=rows,
            prefill_batch_size=rows,
        )
        generator.insert([ids for ids in rounds[step] for _ in range(G)], [T] * rows)
        while generator.next_generated():
            pass
        generator.close()

    took = timed(args.steps, ours, *([] if theirs is None else [others]))
    return {"decode_ms_a_token": {"rows": rows, **compared(took[0], took[1] if theirs else None, 1000 / T)}}


def learning(config: NetworkConfig, weights: Weights, theirs: Any, kind: str, args: argparse.Namespace) -> Any:
    """Seconds of one step of AdamW, and the most memory of each side beside what was held before."""
    shape = argparse.Namespace(
        rows=args.learn_rows, tokens=args.learn_tokens, prompt_tokens=args.prompt_tokens, group=1
    )
    batch = make_rows(config, shape)
    base, trained = Base(), weights
    if kind == "lora":
        said = AdapterConfig(kind="lora", rank=16, target_modules=TARGETS)
        adapter = resolve_adapter(said, config)
        base = Base.of(config, dict(weights), adapter)
        trained = init_adapter(config, adapter, "default", 0)
    log_probs = CompletionLogProbs(config, 1.0, entropy_gradient=False, base=base)
    state: dict[str, Any] = {"weights": dict(trained), "optimizer": adamw_init(trained)}
    mx.eval(state["optimizer"])
    peaks = {"ours": 0.0, "theirs": 0.0}

    def metered(side: str, step: Callable[[], None]) -> None:
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        peaks[side] = max(peaks[side], (mx.get_peak_memory() - held) / 1e9)

    def ours() -> None:
        result = train_on_batch(state["weights"], state["optimizer"], batch, log_probs, LearnerConfig(), lr=1e-6)
        state.update(weights=result.weights, optimizer=result.optimizer_state)

    sides = [lambda _: metered("ours", ours)]
    if theirs is not None:
        step = their_step(theirs, batch, kind)
        sides.append(lambda _: metered("theirs", step))
    took = timed(args.steps, *sides)
    line = compared(took[0], took[1] if theirs else None, 1.0)
    return {"learn_s": {"kind": kind, **line, **{f"{side}_peak_gb": round(gb, 2) for side, gb in peaks.items() if gb}}}


def their_step(model: Any, batch: Any, kind: str) -> Callable[[], None]:
    """Advantage times log-probability through mlx-lm's network, and AdamW."""
    nn, optimizers = importlib.import_module("mlx.nn"), importlib.import_module("mlx.optimizers")
    model.train()
    if kind == "lora":
        model.freeze()
        keys = [f"self_attn.{name}" for name in TARGETS]
        tuner = importlib.import_module("mlx_lm.tuner.utils")
        tuner.linear_to_lora_layers(model, len(model.layers), {"rank": 16, "scale": 1.0, "dropout": 0.0, "keys": keys})
    ids = mx.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
    start = batch.prompt_ids.shape[1] - 1
    optimizer = optimizers.AdamW(1e-6)

    def loss(network: Any) -> mx.array:
        found = network(ids[:, :-1])[:, start:].astype(mx.float32)
        chosen = mx.take_along_axis(found, batch.completion_ids[..., None], axis=-1)[..., 0]
        return -mx.mean(batch.advantages[:, None] * (chosen - mx.logsumexp(found, axis=-1)))

    gradients = nn.value_and_grad(model, loss)

    def step() -> None:
        value, found = gradients(model)
        optimizer.update(model, found)
        mx.eval(value, model.parameters(), optimizer.state)

    return step


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRESETS), default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--learn", nargs="*", choices=["whole", "lora"], default=["whole", "lora"])
    parser.add_argument("--learn-rows", type=int, default=16)
    parser.add_argument("--learn-tokens", type=int, default=320)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip-theirs", action="store_true", help="measure ours alone")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, and print a line for each."""
    config = PRESETS[args.model]
    if args.layers is not None:
        kept = config.layer_types[: args.layers]
        config = msgspec.structs.replace(config, num_hidden_layers=args.layers, layer_types=kept)
    weights = random_policy(config, dtype=args.dtype).weights
    theirs = None if args.skip_theirs else their_model(config, weights)
    jobs: list[Callable[[], dict[str, Any]]] = [] if theirs is None else [partial(logits, config, weights, theirs)]
    jobs += [partial(decoding, config, weights, theirs, rows, args) for rows in args.rows]
    jobs += [partial(learning, config, weights, theirs, kind, args) for kind in args.learn]
    lines = []
    about = {"model": args.model, "layers": config.num_hidden_layers, "parameters": parameter_count(config)}
    for job in jobs:
        try:
            found = job()
        except RuntimeError as error:  # of MLX: no memory, or no kernel here
            found = {"failed": str(error)[:300]}
        line = {**about, **found, "device": str(mx.default_device()), "mlx": version("mlx")}
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


if __name__ == "__main__":
    print(json.dumps({"troupe": troupe.__version__}))
    main(parse())
