"""Packages that some sinks write with: required where TROUPE_REQUIRE_ORACLES is set, else skipped where missing."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def package(name: str) -> Any:
    """The module of that name."""
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        return importlib.import_module(name)
    return pytest.importorskip(name)
