"""No input lies there without a test that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.cases import CASES

TESTS = "\n".join(
    file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__)
)


@pytest.mark.parametrize("case", sorted(folder.name for folder in CASES.iterdir() if folder.is_dir()))
def test_it_is_read(case: str) -> None:
    assert f'"{case}' in TESTS
