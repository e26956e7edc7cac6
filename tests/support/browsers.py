"""A real browser. Tests that need one are skipped where there is none, unless TROUPE_REQUIRE_ORACLES is set."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def browser_program() -> str:
    """Chromium, as it is installed here."""
    found = next((path for name in _PROGRAMS if (path := shutil.which(name))), None)
    if found is None:
        assert not os.environ.get("TROUPE_REQUIRE_ORACLES"), "there is no Chromium: ./setup.sh browser"
        pytest.skip("there is no Chromium on this machine")
    return found


def playwright() -> Any:
    """What drives it."""
    name = "playwright.sync_api"
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@contextmanager
def a_browser() -> Iterator[Any]:
    """One that shows no window."""
    program = browser_program()
    with playwright().sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
