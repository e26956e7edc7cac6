"""Pages that scripts write: their tables are put where the marks are, and `--check` changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.pages import with_tables, write_or_check


def test_each_table_stands_where_it_is_marked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n<!-- table: one -->\nold\n<!-- end of table -->\nb\n<!-- table: two -->\n<!-- end of table -->\n"
    )
    written = with_tables(page, {"two": "| 2 |\n", "one": "| \\1 |\n"})
    assert written == (
        "# A\n<!-- table: one -->\n\n| \\1 |\n\n<!-- end of table -->\nb\n"
        "<!-- table: two -->\n\n| 2 |\n\n<!-- end of table -->\n"
    )
    page.write_text(written)
    assert with_tables(page, {"one": "| \\1 |\n", "two": "| 2 |\n"}) == written
    with pytest.raises(AssertionError, match=r"the tables of page\.md are \['one', 'two'\]"):
        with_tables(page, {"one": ""})


def test_a_page_is_written_or_only_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(sys, "argv", ["script", "--check"])
    with pytest.raises(SystemExit, match=r"page\.md is out of date; write it with: python -m scripts\.some"):
        write_or_check(page, "new", "some")
    assert page.read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["script"])
    write_or_check(page, "new", "some")
    assert page.read_text() == "new"
    monkeypatch.setattr(sys, "argv", ["script", "--check"])
    write_or_check(page, "new", "some")
