"""Packages that an extra brings: tests of them are left out where they are missing, unless all have to be there."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def extra(module: str) -> Any:
    """The module. Where it is missing the test is skipped, or, with TROUPE_REQUIRE_ORACLES set, fails."""
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        return importlib.import_module(module)
    return pytest.importorskip(module)
