"""The page in a real browser: its script runs under its own policy, and draws; hostile text does nothing.

Marked slow, and skipped where Chromium is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from tests.records.report.folders import make_run, metrics_of
from tests.records.report.pages import Page
from tests.records.report.test_page import HOSTILE, write_hostile, write_hostile_episode
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run

pytestmark = pytest.mark.slow


def dom_of(folder: Path) -> str:
    """The page of a run as it is when its scripts have run."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        if os.environ.get("TROUPE_REQUIRE_ORACLES"):
            pytest.fail("there is no Chromium: ./setup.sh browser")
        pytest.skip("there is no Chromium")
    path = folder / "report.html"
    path.write_bytes(report_page(read_run(folder)).encode("utf-8", "replace"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    ended = subprocess.run(
        [browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True, encoding="utf-8"
    )
    return ended.stdout


def body_of(page: Page) -> dict[str, str | None]:
    [body] = page.attributes("body")
    return body


def test_all_charts_are_drawn(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        for step in range(1, 1201):
            file.write(msgspec.json.encode({"step": step, "version": step, **metrics_of(step)}) + b"\n")
    page = Page(dom_of(tmp_path))
    charts = page.data["charts"]
    assert body_of(page)["data-drawn"] == str(len(charts) + 2)
    assert page.within("title").count("Reward") == 1  # that of the drawing
    lines = [attributes for attributes in page.attributes("path") if "line" in str(attributes["class"]).split()]
    raw = [attributes for attributes in lines if "raw" in str(attributes["class"]).split()]
    assert len(raw) == sum(len(chart["series"]) for chart in charts if chart.get("smooth"))
    assert len(lines) == sum(len(chart["series"]) for chart in charts) + len(raw)
    assert not any("NaN" in str(attributes["d"]) or not attributes["d"] for attributes in page.attributes("path"))
    assert {"1,000", "100"} <= set(page.within("text"))
    assert "50.0 % at work" in page.within("div")
    values = page.within("span") + page.within("b")
    assert "120" in values  # the newest reward
    assert "1.00e−6" in values


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps(tmp_path: Path, steps: int) -> None:
    page = Page(dom_of(make_run(tmp_path, steps)))
    assert body_of(page)["data-drawn"] == str(len(page.data["charts"]) + (2 if steps else 0))
    assert not any("NaN" in str(attributes.get("d")) for attributes in page.attributes("path"))


def test_hostile_text_does_nothing(tmp_path: Path) -> None:
    write_hostile(tmp_path, " ".join(text for text in HOSTILE if text.isprintable()))
    page = Page(dom_of(tmp_path))
    assert body_of(page)["data-drawn"] == str(len(page.data["charts"]))
    assert page.attributes("img") == []
    assert len(page.attributes("script")) == 2


def test_hostile_conversations_do_nothing(tmp_path: Path) -> None:
    write_hostile_episode(tmp_path, " ".join(text for text in HOSTILE if text.isprintable()))
    page = Page(dom_of(tmp_path))
    assert body_of(page)["data-drawn"] == str(len(page.data["charts"]))
    assert page.attributes("img") == []
    assert len(page.attributes("script")) == 2
    assert len([a for a in page.attributes("details") if a.get("class") == "call"]) == 4  # it is the best and the worst
