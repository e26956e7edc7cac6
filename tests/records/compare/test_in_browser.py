"""The page of several runs in a real browser: who is shown, along what, and what they answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.records.compare.runs import evaluated, make_run, nobody
from tests.support.browsers import a_browser
from troupe.records.compare.page import compare_page
from troupe.records.compare.runs import read_runs

pytestmark = pytest.mark.slow

HOSTILE = "</script><img src=x onerror=alert(1)>"


def write_page(folder: Path) -> Path:
    """Two seeds and another run; what they were asked and answered would act in a page."""
    runs = []
    for name, seed, rate in (("seed-1", 1, 0.1), ("seed-2", 2, 0.1), ("other", 1, 0.5)):
        asked = [evaluated(version, {HOSTILE: (rate, None), "1+1=": (0.5, 1.0)}) for version in (0, 3)]
        settings = {"seed": seed, "learner": {"lr": rate, "note": HOSTILE + name[:4]}}
        rewards = [0.1 * seed, 0.2, 0.3 + rate]
        runs.append(make_run(folder / name, rewards, settings=settings, evaluations=asked, step_s=2.0 * seed))
    page = folder / "compare.html"
    page.write_text(compare_page(read_runs(runs, nobody)))
    return page


REWARD = (
    "[...document.querySelectorAll('[data-chart]')].map((one) => one.troupeChart)"
    ".find(({ spec }) => spec.key === 'reward').lines"
)


def lines(page: Any) -> list[str]:
    """What the chart of the reward draws."""
    found: list[str] = page.evaluate(f"{REWARD}.map(({{ name }}) => name)")
    return found


def places(page: Any) -> list[float]:
    """Where the points of its first line stand."""
    found: list[float] = page.evaluate(f"{REWARD}[0].x")
    return found


def test_runs_are_shown_hidden_and_read(tmp_path: Path) -> None:
    path = write_page(tmp_path)
    with a_browser() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
        page.goto(path.as_uri())
        assert lines(page) == ["seed-*", "other"]
        page.click("text=Single runs")
        assert lines(page) == ["seed-1", "seed-2", "other"]
        assert not page.is_checked("input[data-run='seed-*']")
        page.uncheck("input[data-run='seed-2']")
        page.click(".run-switches >> text=other")
        assert lines(page) == ["seed-1"]
        page.click("text=Seeds as a band")
        page.click(".run-switches >> text=other")
        assert lines(page) == ["seed-*", "other"]
        page.click("[data-axis=time]")
        while places(page) != [3, 6, 9]:  # a page whose policy forbids `eval` cannot be waited for by playwright
            page.wait_for_timeout(10)
        _read_answers(page)
        assert page.locator("img").count() == 0
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert errors == []


def _read_answers(page: Any) -> None:
    """They agree least about the first prompt; each run's first and last answers stand beside each other."""
    assert page.inner_text("#answers > pre") == HOSTILE
    columns = page.locator(".answers-run")
    assert [text.split("\n")[0] for text in columns.all_inner_texts()] == ["seed-1", "seed-2", "other"]
    assert f"{HOSTILE} 0 0" in columns.nth(2).inner_text()
    assert f"{HOSTILE} 3 0" in columns.nth(2).inner_text()
    page.select_option("#answers select >> nth=1", "1")
    assert "reward –" in columns.nth(2).inner_text()
    page.select_option("#answers select >> nth=0", label="sums: 1+1=")
    assert "1+1= 3 1" in columns.nth(0).inner_text()
