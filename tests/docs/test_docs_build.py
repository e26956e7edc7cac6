"""The site of the documents is built without a warning, and asks nothing of anybody else when it is read."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_FETCHED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("TROUPE_REQUIRE_ORACLES") and importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_built(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    found = {
        f"{page.name}: {address}"
        for page in site.rglob("*.html")
        for address in _FETCHED.findall(page.read_text(encoding="utf-8"))
    }
    styles = {
        f"{style.name}: {address}"
        for style in site.rglob("*.css")
        for address in re.findall(r"(?:url\(|@import )[\"']?(https?://[^\"')]+)", style.read_text(encoding="utf-8"))
    }
    assert found | styles == set()


@pytest.mark.slow
def test_the_reference_of_python_has_signatures_and_meanings(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for text in ("Runs a run", "exchange_reward", "Ask the run to end after the steps already begun"):
        assert text in page


@pytest.mark.slow
def test_no_signature_is_wider_than_its_page(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    blocks = re.findall(r'<div class="[^"]*doc-signature.*?<pre.*?</pre>', page, re.DOTALL)
    lines = [line for block in blocks for line in html.unescape(re.sub(r"<[^>]+>", "", block)).splitlines()]
    assert len(blocks) > 60
    assert [line for line in lines if len(line) > 76] == []
    assert any(line.startswith("    completion_mask: array") for line in lines), "broken into parameters"
    styles = (site / "stylesheets" / "extra.css").read_text(encoding="utf-8")
    assert ".doc-signature code { white-space: pre-wrap;" in styles
