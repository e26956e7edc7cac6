"""A run store of many completions, made quickly, and what is in it."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from troupe.records.layout import STORE
from troupe.records.store.format import ADD_COMPLETION, ADD_GROUP, ADD_STEP, packed
from troupe.records.store.write import StoreWriter

STATES = ("trained", "trained", "filtered", "stale")
ENDS = ("stop", "stop", "length", "repetition")
WORDS = ["the", "answer", "is", "because", "Grüße", "to", "Ärger", "100%", "of", "under_score", "and", "so", "on"]
SAMPLES = 8
A_STEP = 4
"""Groups in it."""


def make_many(folder: Path, completions: int, *, letters: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """A store of so many completions, and what is told of each, in the order of steps. Some have no reward,
    only the trained have an advantage."""
    drawn = random.Random(seed)
    told: list[dict[str, Any]] = []
    StoreWriter(folder / STORE, first_step=0, program="0.9", clock=lambda: 50.0).close()
    filling = " ".join(drawn.choices(WORDS, k=letters // 5 + 1))[:letters]
    with closing(sqlite3.connect(folder / STORE)) as connection, connection:
        for gid in range(completions // SAMPLES):
            step, row, state = 1 + gid // A_STEP, gid % 97, STATES[gid % 4]
            prompt = f'"What is {row} + {row}? Say \\"so\\"."'
            slot = step - 1, gid % A_STEP, 0
            connection.execute(ADD_GROUP, (gid, step, *slot, row, gid // 97, state, prompt, f'{{"answer":{2 * row}}}'))
            for sample in range(SAMPLES):
                reward = drawn.choice((0.0, 0.0, 1.0, drawn.random(), None))
                one = {
                    "gid": gid,
                    "sample": sample,
                    "step": step,
                    "row": row,
                    "state": state,
                    "prompt": f'What is {row} + {row}? Say "so".',
                    "text": f"{drawn.choice(WORDS)} {drawn.randrange(10**6)} {filling}",
                    "tokens": drawn.randrange(1, 60),
                    "finish_reason": drawn.choice(ENDS),
                    "reward": reward,
                    "advantage": drawn.gauss(0.0, 1.0) if state == "trained" else None,
                    "other": None if reward is None else 1.0 - reward,
                }
                told.append(one)
                connection.execute(ADD_COMPLETION, _row(one))
        for step in range(1, told[-1]["step"] + 1):
            connection.execute(ADD_STEP, (step, step, 50.0, f'{{"reward":{step / 1e6}}}'))
    return told


def _row(one: dict[str, Any]) -> tuple[Any, ...]:
    tokens, scores = one["tokens"], {"r": one["reward"] or 0.0, "other": one["other"]}
    return (
        one["gid"],
        one["sample"],
        one["step"],
        one["text"],
        packed("i", range(tokens)),
        f"[[{one['step'] - 1},{tokens}]]",
        one["finish_reason"],
        one["reward"],
        one["advantage"],
        json.dumps(scores),
        "{}",
        packed("f", [-0.5] * tokens),
    )
