"""Draws what `bench_scaling.py` measured: speed and memory against rows and context, a line a model.

    python -m benchmarks.bench_scaling >> lines.jsonl
    python -m benchmarks.draw_scaling lines.jsonl docs/images/scaling-cpu.svg

Needs matplotlib (`pip install -e '.[report]'`). Later lines of a shape replace earlier ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#3a55c9", "#d9622b", "#12877f", "#9a3fb5")
PARTS = {"rows": "rows decoded together", "context": "tokens of the prompt"}
Points = dict[int, dict[str, Any]]


def read_lines(path: Path) -> dict[tuple[str, str], Points]:
    """(part, model) → what was measured at each place of its axis."""
    found: dict[tuple[str, str], Points] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        place = line["prompts"] * line["group"] if line["part"] == "rows" else line["prompt_tokens"]
        found.setdefault((line["part"], line["model"]), {})[place] = line
    return {key: dict(sorted(points.items())) for key, points in found.items()}


def draw(found: dict[tuple[str, str], Points], path: Path) -> None:
    """Speed above, memory below: measured with dots, what the formula says without."""
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    models = list(dict.fromkeys(model for _, model in found))
    for column, (part, name) in enumerate(PARTS.items()):
        speed, memory = axes[0][column], axes[1][column]
        for model, colour in zip(models, COLOURS, strict=False):
            points = found.get((part, model), {})
            speed.plot(list(points), [each["tokens_per_s"] for each in points.values()], "o-", color=colour)
            for key, style in (("peak_gb", "o"), ("predicted_gb", "-")):
                beside = [each[key] - each["held_gb"] for each in points.values()]
                label = f"{model}, {'measured' if style == 'o' else 'predicted'}"
                memory.plot(list(points), beside, style, color=colour, label=label)
        for axis, quantity in ((speed, "tokens a second"), (memory, "GB beside the weights")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(quantity)
            axis.grid(color="#e6e6e0")
            axis.spines[["top", "right"]].set_visible(False)
        ticks = sorted({place for (each, _), points in found.items() if each == part for place in points})
        memory.set_xticks(ticks, [str(tick) for tick in ticks])
        memory.set_xlabel(name)
    axes[1][0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Read, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="what bench_scaling printed")
    parser.add_argument("picture", type=Path, help="a file that ends in .svg or .png")
    args = parser.parse_args()
    draw(read_lines(args.lines), args.picture)


if __name__ == "__main__":
    main()
