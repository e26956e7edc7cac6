"""What does a conversation of many turns cost where rows keep what they have read, and where all is read again?

    python benchmarks/bench_turns.py [--turns 10 --prompts 4 --group 8 --prompt-tokens 64 --new-tokens 100]
    python benchmarks/bench_turns.py --model Qwen3-0.6B --dtype bfloat16 [--observed 100]

Random weights; `tiny` has 8.9 million parameters. All turns go to their limit, and an observation of random tokens is
read behind each. `kept`: a session; `again`: every turn reads the whole conversation of every row, as who keeps nothing
between two requests does. Both sample the same tokens at the same places. Prints of every turn the tokens read before
sampling, the seconds that reading took and those of the whole turn; then one JSON line with sums and peaks.
"""

from __future__ import annotations

import json
import platform
import random
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import msgspec

import troupe  # first: it loads OpenBLAS before MLX
from benchmarks.bench_generation import arguments, policy_of
from troupe.policy import GenerationConfig, Policy, RolloutEngine, TurnRequest, TurnSession, parameter_count

import mlx.core as mx  # isort: skip


class Measured(NamedTuple):
    """Of one turn of all rows."""

    read: int
    """Tokens, before sampling."""
    reading_s: float
    seconds: float
    peak_gb: float
    """Beside the weights."""


Name = tuple[int, ...]


def take(session: TurnSession, requests: list[TurnRequest], histories: dict[Name, list[int]]) -> Measured:
    """A turn of all rows, added to their histories."""
    before, held = session.tokens_read, mx.get_active_memory() - session.held_bytes
    mx.reset_peak_memory()
    start_s = time.perf_counter()
    decoding = session.decode(requests)
    next(decoding)
    read_s = time.perf_counter()
    turns = [turn for completed in decoding for turn in completed]
    end_s = time.perf_counter()
    for turn in turns:
        histories[turn.row] += turn.token_ids
    peak = (mx.get_peak_memory() - held) / 1e9
    return Measured(session.tokens_read - before, read_s - start_s, end_s - start_s, peak)


def converse(policy: Policy, args: Any, *, keeps: bool) -> list[Measured]:
    """All turns of all conversations."""
    dice, vocabulary = random.Random(0), policy.config.vocab_size
    longest = args.prompt_tokens + args.turns * (args.new_tokens + args.observed)
    config = msgspec.structs.replace(
        policy.config, max_position_embeddings=max(longest, policy.config.max_position_embeddings)
    )
    engine = RolloutEngine(config, GenerationConfig(), stop_ids=frozenset(), base=policy.base)
    engine.load(policy.weights, 0)
    engine.current_weights()
    prompts = [[dice.randrange(vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
    rows = [(place, sample) for place in range(args.prompts) for sample in range(args.group)]
    histories: dict[Name, list[int]] = {row: [*prompts[row[0]]] for row in rows}
    session, found = engine.session(), []
    for turn in range(args.turns):
        observed = {row: [dice.randrange(vocabulary) for _ in range(args.observed)] if turn else [] for row in rows}
        for row in rows:
            histories[row] += observed[row]
        if not keeps:
            session.close()
        requests = [
            TurnRequest(
                row=row,
                ids=tuple(observed[row] if keeps and turn else histories[row]),
                start=turn * (args.new_tokens + args.observed),
                room=args.new_tokens,
                fresh=not (keeps and turn),
            )
            for row in rows
        ]
        found.append(take(session, requests, histories))
    return found


def main() -> None:
    """Measure both ways, after a short conversation that compiles, and print what they took."""
    parser = arguments(__doc__)
    parser.set_defaults(new_tokens=100)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--observed", type=int, default=100, help="tokens that are read behind each turn")
    args = parser.parse_args()
    policy = policy_of(args)
    for keeps in (True, False):
        warm = type(args)(**(vars(args) | {"turns": 2, "new_tokens": 12}))
        converse(policy, warm, keeps=keeps)
    kept, again = (converse(policy, args, keeps=keeps) for keeps in (True, False))
    print("turn  read: kept    again   reading s: kept   again   turn s: kept   again")
    for turn, (ours, theirs) in enumerate(zip(kept, again, strict=True), 1):
        print(
            f"{turn:4}  {ours.read:10}  {theirs.read:7}  {ours.reading_s:15.3f}  {theirs.reading_s:6.3f}"
            f"  {ours.seconds:13.3f}  {theirs.seconds:6.3f}"
        )
    sums = {
        f"{way}_{name}": round(sum(getattr(turn, name) for turn in turns), 3)
        for way, turns in (("kept", kept), ("again", again))
        for name in ("read", "reading_s", "seconds")
    }
    peaks = {
        f"{way}_peak_gb": round(max(turn.peak_gb for turn in turns), 3)
        for way, turns in (("kept", kept), ("again", again))
    }
    line = {"benchmark": "turns", "parameters": parameter_count(policy.config), **vars(args), **sums, **peaks}
    machine = {"device": str(mx.default_device()), "machine": platform.platform(), "mlx": version("mlx")}
    print(json.dumps(line | machine | {"troupe": troupe.__version__}), flush=True)


if __name__ == "__main__":
    main()
