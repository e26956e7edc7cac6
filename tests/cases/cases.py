"""Where the inputs of `tests/data/cases` lie, or those of the folder in `TROUPE_CASES` (same layout)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

CASES = Path(os.environ.get("TROUPE_CASES") or Path(__file__).parent.parent / "data" / "cases").resolve()


def copy_case(name: str, target: Path) -> Path:
    """A writable copy of one case's folder, `target/name`; raises where there is none."""
    return Path(shutil.copytree(CASES / name, target / name))


def expected_of(name: str) -> Any:
    """What the case's `expected.json` says is right."""
    return json.loads((CASES / name / "expected.json").read_text(encoding="utf-8"))
