"""Write the tables of docs/coming-from-trl.md: what others call our settings, read off `troupe/run/aliases.py`.

Each stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`; the rest of the page is written by
hand. `python -m scripts.alias_tables` writes them, `--check` only compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from troupe.run.aliases import TABLES, Alias

PAGE = Path(__file__).parent.parent / "docs" / "coming-from-trl.md"
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FIRST = {"absent": "theirs"}


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(alias: Alias) -> str:
    cells = (_names(alias.theirs), _names(alias.ours) or "–", alias.note)
    return "| " + " | ".join(cells).rstrip() + " |"


def table(name: str) -> str:
    """One table as Markdown."""
    head = f"| {_FIRST.get(name, name)} | Troupe | {'why, or what to do' if name == 'absent' else 'differs'} |"
    return "\n".join([head, "|---|---|---|", *map(_row, TABLES[name])]) + "\n"


def reference() -> str:
    """The whole page, its tables written anew."""
    text = PAGE.read_text(encoding="utf-8")
    named = [match[2] for match in _TABLE.finditer(text)]
    assert sorted(named) == sorted(TABLES), f"the tables of the page are {named}"
    return _TABLE.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", text)


def main() -> None:
    """Write the page, or say whether it is up to date."""
    written = reference()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != written:
            sys.exit(f"{PAGE.name} is out of date; write it with: python -m scripts.alias_tables")
        return
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
