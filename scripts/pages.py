"""Pages of the documents that a script writes, whole or their tables alone, and the command line of such a script.

A table stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(page: Path, tables: Mapping[str, str]) -> str:
    """A whole page, its tables, each of which is there once, written anew."""
    text = page.read_text(encoding="utf-8")
    named = [match[2] for match in _TABLE.finditer(text)]
    assert sorted(named) == sorted(tables), f"the tables of {page.name} are {named}"
    return _TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", text)


def write_or_check(page: Path, written: str, script: str) -> None:
    """Write a page; with `--check` only say whether it is up to date. `script`: its name, for who has to write it."""
    if "--check" not in sys.argv[1:]:
        page.write_text(written, encoding="utf-8")
    elif page.read_text(encoding="utf-8") != written:
        sys.exit(f"{page.name} is out of date; write it with: python -m scripts.{script}")
