"""Write the tables of docs/coming-from-trl.md: what others call our settings, read off `troupe/run/aliases.py`.

Each stands between the comments `<!-- table: NAME -->` and `<!-- end of table -->`; the rest of the page is written by
hand. `python -m scripts.alias_tables` writes them, `--check` only compares.
"""

from __future__ import annotations

from scripts.pages import DOCS, with_tables, write_or_check
from troupe.run.aliases import TABLES, Alias

PAGE = DOCS / "coming-from-trl.md"
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
    return with_tables(PAGE, {name: table(name) for name in TABLES})


if __name__ == "__main__":
    write_or_check(PAGE, reference(), "alias_tables")
