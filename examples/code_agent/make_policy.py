"""Makes a policy that is small enough to watch: it writes one-line functions, and seldom the right one.

    python examples/code_agent/make_policy.py

It writes `policy/` and `problems.jsonl`, which is there already, beside this file. The policy knows how to run code and
how to hand it in; which operator a problem wants it has been taught for one game in three, and else at random. Takes
twenty seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "higher_lower"))

from tiny_policy import END, Part, Shape, make_policy

HERE = Path(__file__).parent
OPERATORS = {"sum": "+", "difference": "-", "product": "*", "remainder": "%"}
COMPUTED = {"+": operator.add, "-": operator.sub, "*": operator.mul, "%": operator.mod}
RUN = '<tool_call>\n{"name": "run_python", "arguments": {"code": "def f(a, b): return a '
SUBMIT = '<tool_call>\n{"name": "submit", "arguments": {"code": "def f(a, b): return a '
TRY = " b\\nprint(f("
CLOSE, SUBMITTED = '))"}}\n</tool_call>', ' b"}}\n</tool_call>'
WORDS = (
    *(RUN, SUBMIT, TRY, SUBMITTED, CLOSE, "run_python", "submit", ", ", "Write f(a, b), the ", "; f(", ") is "),
    *(*OPERATORS, *COMPUTED, ".", "handed in", "done", *map(str, range(10, 100))),
)
KNOWN = 0.33


def problem(name: str, a: int, b: int) -> dict[str, object]:
    """A row."""
    sign = OPERATORS[name]
    prompt = f"Write f(a, b), the {name}; f({a}, {b}) is {COMPUTED[sign](a, b)}."
    tests = "\n".join(f"assert f({x}, {y}) == {x} {sign} {y}" for x, y in [(a, b), (7, 2), (40, 9)])
    return {"prompt": [{"role": "user", "content": prompt}], "tests": tests}


def problems() -> list[dict[str, object]]:
    """A few of each kind."""
    rng = random.Random(0)
    return [problem(name, rng.randint(4, 9), rng.randint(2, 3)) for _ in range(8) for name in OPERATORS]


def conversation(rng: random.Random) -> list[Part]:
    """A problem, tried once and handed in, as the chat template writes it."""
    name, a, b = rng.choice(list(OPERATORS)), rng.randint(4, 9), rng.randint(2, 3)
    sign = OPERATORS[name] if rng.random() < KNOWN else rng.choice(list(COMPUTED))
    prompt = problem(name, a, b)["prompt"][0]["content"]  # type: ignore[index]
    return [
        (f"<|system|>run_python, submit{END}<|user|>{prompt}{END}<|assistant|>", False),
        (f"{RUN}{sign}{TRY}{a}, {b}{CLOSE}{END}", True),
        (f"<|tool|>{COMPUTED[sign](a, b)}\n{END}<|assistant|>", False),
        (f"{SUBMIT}{sign}{SUBMITTED}{END}", True),
        (f"<|tool|>handed in{END}<|assistant|>", False),
        (f"done{END}", True),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the policy of this example.")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="default: beside this file")
    options = parser.parse_args()
    rng = random.Random(0)
    make_policy(options.out / "policy", WORDS, lambda: conversation(rng), Shape(steps=120), seed=0)
    rows = "".join(f"{json.dumps(row)}\n" for row in problems())
    (options.out / "problems.jsonl").write_text(rows, encoding="utf-8")
