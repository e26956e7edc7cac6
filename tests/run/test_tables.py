"""Plain tables: reading, settings, laying one over another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from troupe.errors import ConfigError
from troupe.run.tables import copied, flattened, lay_over, parse_setting, table_of
from troupe.runtime.files import read_toml


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learner.lr=1e-5", "learner.lr", 1e-5),
        (" learner.lr = 3 ", "learner.lr", 3),
        ("a.b.c=[1, 2]", "a.b.c", [1, 2]),
        ("output=runs/x", "output", "runs/x"),
        ('output="runs/x"', "output", "runs/x"),
        ("output=2026-01-02", "output", "2026-01-02"),
        ("output=10:20:30", "output", "10:20:30"),
        ("rewards.kind=r.py:kind", "rewards.kind", "r.py:kind"),
        ("a.b=x=y", "a.b", "x=y"),
        ("a.b=", "a.b", ""),
        ("a.b=true", "a.b", True),
    ],
)
def test_a_setting_is_a_key_and_a_value(text: str, key: str, value: Any) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["learner.lr", "=3", ".lr=3", "learner.=3", "a..b=3", ""])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
        parse_setting(text)


def test_a_setting_as_a_table() -> None:
    assert table_of("a.b.c=1") == {"a": {"b": {"c": 1}}}
    assert table_of("seed=1") == {"seed": 1}


def test_what_lies_above_counts() -> None:
    table: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": {"e": 1}, "f": 1}
    below = copied(table)
    lay_over(table, {"a": {"c": 3}, "d": 4, "f": {"g": 5}})
    assert table == {"a": {"b": 1, "c": 3}, "d": 4, "f": {"g": 5}}
    assert below == {"a": {"b": 1, "c": 2}, "d": {"e": 1}, "f": 1}


def test_every_value_by_its_whole_key() -> None:
    assert flattened({"a": {"b": {"c": 1}, "d": [2]}, "e": 3}) == {"a.b.c": 1, "a.d": [2], "e": 3}


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match="there is no such configuration file"):
        read_toml(path)
    path.write_text("[a]\nb = 1\n")
    assert read_toml(path) == {"a": {"b": 1}}
    path.write_text("[a\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


def test_whoever_names_a_run_folder_for_its_file_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be read: .*; this is the folder of a run, to go on with"):
        read_toml(tmp_path)
