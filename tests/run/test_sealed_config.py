"""Whether somebody has edited a run.toml since a run wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.run.config import load_config, write_config
from troupe.run.folder import is_as_written, seal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    write_config(load_config(None, [{"output": "ünusual # name", "learner": {"lr": 1e-5}}]), path)
    seal(path)
    return path


def test_what_was_written_is_as_it_was_and_says_the_same(file: Path) -> None:
    assert is_as_written(file)
    assert load_config(file).learner.lr == 1e-5


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("lr = 1e-05", "lr = 0.00001", True),
        ("seed = 0", "# a remark\nseed =   0", True),
        ("lr = 1e-05", "lr = 1e-3", False),
        ("seed = 0\n", "", False),
        ("seed = 0", "seed = 0\nnew = 1", False),
        ("seed = 0", "seed = '", False),
        ("sha256 ", "sha256 0", False),
    ],
)
def test_edits(file: Path, old: str, new: str, is_same: bool) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    assert is_as_written(file) is is_same


def test_without_a_sum_or_a_file(file: Path) -> None:
    file.write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    assert not is_as_written(file)
    file.write_bytes(b"\xff")
    assert not is_as_written(file)
    file.unlink()
    assert not is_as_written(file)
