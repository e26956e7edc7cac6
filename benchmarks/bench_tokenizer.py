"""How fast does the tokenizer encode 10 MB of text, beside Hugging Face's `tokenizers` on one thread?

    python benchmarks/bench_tokenizer.py MODEL_FOLDER [--text FILE --megabytes 10 --piece-chars 10000 --repeat 5]

MODEL_FOLDER holds a tokenizer.json. The text, cut into pieces as a dataset would be, is the sources of Python's own
library and the test vectors' texts of many scripts and chats, half and half, or FILE, repeated to the size. Prints one
JSON line of medians and the ratio of the times, below 1 where ours is faster; null where `tokenizers` is missing. Fails
where the two give different ids.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import troupe
from troupe.policy import Tokenizer

VECTORS = Path(__file__).parent.parent / "tests" / "data" / "tokenizer" / "qwen3.json"


def main() -> None:
    """Time both in turns and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--piece-chars", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pieces = read_pieces(args.text, int(args.megabytes * 1e6), args.piece_chars)
    encoders: dict[str, Callable[[str], list[int]]] = {"troupe": Tokenizer.from_pretrained(args.folder).encode}
    try:
        theirs = importlib.import_module("tokenizers").Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        encoders["tokenizers"] = lambda text: theirs.encode(text).ids
    except ImportError:
        pass
    times: dict[str, list[float]] = {name: [] for name in encoders}
    ids: dict[str, list[list[int]]] = {}
    for _ in range(args.repeat):
        for name, encode in encoders.items():
            start_s = time.perf_counter()
            ids[name] = [encode(piece) for piece in pieces]
            times[name].append(time.perf_counter() - start_s)
    if "tokenizers" in ids and ids["troupe"] != ids["tokenizers"]:
        raise SystemExit("the two tokenizers give different ids")
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    line = {
        "benchmark": "tokenizer",
        "megabytes": args.megabytes,
        "tokens": sum(map(len, ids["troupe"])),
        "piece_chars": args.piece_chars,
        "repeat": args.repeat,
        "troupe_s": round(medians["troupe"], 3),
        "tokenizers_s": round(medians["tokenizers"], 3) if "tokenizers" in medians else None,
        "troupe_over_tokenizers": round(medians["troupe"] / medians["tokenizers"], 3) if len(medians) > 1 else None,
        "machine": platform.platform(),
        "tiktoken": version("tiktoken"),
        "tokenizers": version("tokenizers") if len(medians) > 1 else None,
        "troupe": troupe.__version__,
    }
    print(json.dumps(line))


def read_pieces(file: Path | None, size: int, piece_chars: int) -> list[str]:
    """Texts of about `size` bytes in all, each of at most `piece_chars` characters."""
    if file is not None:
        return take_pieces(cycle([file.read_text(encoding="utf-8")]), size, piece_chars)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    many_scripts = "\n".join(row["text"] for row in [*vectors["rows"], *vectors["chats"]])
    code = (source.read_text(encoding="utf-8", errors="replace") for source in cycle(sources))
    return take_pieces(code, size // 2, piece_chars) + take_pieces(cycle([many_scripts]), size // 2, piece_chars)


def take_pieces(texts: Iterator[str], size: int, piece_chars: int) -> list[str]:
    """Pieces of the texts, one after the other, until they have `size` bytes."""
    pieces: list[str] = []
    for text in texts:
        for begin in range(0, len(text), piece_chars):
            if size <= 0:
                return pieces
            pieces.append(text[begin : begin + piece_chars])
            size -= len(pieces[-1].encode())
    return pieces


if __name__ == "__main__":
    main()
