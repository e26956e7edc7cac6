"""Sums to ask for, cut into those that are trained and those that are kept aside, and what an answer is worth.

    python examples/smollm2/sums.py                          # writes the four files of prompts beside it anew

The reward was settled first, after reading what the untrained model says to sums of an earlier cut; then the cut was
made, by one seed; then the first policy was trained. A sum and its mirror (3 + 4, 4 + 3) are on the same side of the
cut, so that none of those kept aside is trained in the other order.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 2
"""Of the cut, drawn anew when the reward had been settled."""
HELD_OUT = 50
"""Sums kept aside, of either kind."""
TRAINED = 500
"""Most sums that are trained."""
NUMBERS = {"one-digit": range(10), "two-digit": range(10, 100)}


def right_sum(completions: list[list[dict[str, str]]], total: list[str], **columns: Any) -> list[float]:
    """1 where the first line of the answer ends with the sum, behind which a full stop may stand; else 0."""
    lines = [messages[-1]["content"].strip().partition("\n")[0] for messages in completions]
    ends = [re.search(r"(\d+)\.?$", line.rstrip()) for line in lines]
    return [float(end is not None and end[1] == wanted) for end, wanted in zip(ends, total, strict=True)]


def split(numbers: range, seed: int = SEED) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs to train and pairs to keep aside, in an order drawn from the seed."""
    drawn = random.Random(seed)
    unordered = [(a, b) for a in numbers for b in numbers if a <= b]
    drawn.shuffle(unordered)
    aside: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for a, b in unordered:
        both = sorted({(a, b), (b, a)})
        (aside if len(aside) + len(both) <= HELD_OUT else rest).extend(both)
    drawn.shuffle(rest)
    return rest[:TRAINED], aside


def rows(pairs: list[tuple[int, int]]) -> str:
    """A row of JSON a pair."""
    asked = [{"prompt": f"What is {a} + {b}?", "total": str(a + b)} for a, b in pairs]
    return "".join(json.dumps(row) + "\n" for row in asked)


def files() -> dict[str, str]:
    """Name of each file of prompts → what is in it."""
    made = {}
    for name, numbers in NUMBERS.items():
        trained, aside = split(numbers)
        made |= {f"{name}.jsonl": rows(trained), f"{name}-held-out.jsonl": rows(aside)}
    return made


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content, encoding="utf-8")
        print(f"{HERE / name}: {len(content.splitlines())} sums")
