"""Conversations on the live page, in a real browser: turn by turn, by keyboard, on a telephone, whatever is in them.

Needs Chromium on the machine and the `browser` extra, and is skipped without them, unless TROUPE_REQUIRE_ORACLES is
set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from anyio.from_thread import start_blocking_portal

from tests.daemon.page.test_live_page import Tab
from tests.daemon.page.test_live_page import browser as browser
from tests.daemon.page.test_server import HURRY, FakeDaemon
from tests.support.stored import acted
from troupe.daemon.page.history import History
from troupe.daemon.page.news import excerpt
from troupe.daemon.page.server import Page
from troupe.daemon.trainer.frames import Happened, Stepped

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def figures(step: int) -> dict[str, float]:
    """Of a step in which tools are called."""
    return {
        "reward": 0.1 * step,
        "turns/mean": 3 + math.sin(step),
        "turns/min": 1.0,
        "turns/max": 6.0,
        "tools/call_frequency": 1.5,
        "tools/failure_frequency": 0.5 / step,
    }


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Any, History]]:
    """The address of a page, what calls functions in its thread, and what the page shows."""
    with start_blocking_portal() as portal:
        history = portal.call(History, "library", str(folder))
        with portal.wrap_async_context_manager(Page(FakeDaemon(), history, folder, **HURRY)) as page:
            yield page.address, portal, history


def tell(history: History, step: int) -> None:
    """A step with a group that acts."""
    history.add(Stepped(step=step, total_steps=99, metrics=figures(step), incidents={}))
    group = msgspec.structs.replace(acted(step, 0), gid=step)
    history.add(Happened(groups=(excerpt(group),)))


def test_conversations_are_seen_in_a_browser(tmp_path: Path, browser: Any) -> None:
    with served(tmp_path) as (address, portal, history):
        for step in (1, 2, 3):
            portal.call(tell, history, step)
        tab = Tab(browser.new_context(viewport={"width": 1280, "height": 900}).new_page())
        tab.page.goto(address)
        tab.see(lambda: tab.page.locator("#talks .talk").count() == 3)
        first = tab.page.locator("#talks .conversation").first
        heads = first.locator(".said-head b").all_inner_texts()
        assert heads == ["system", "user", *[f"turn {turn}" for turn in (1, 2, 3, 4)], "tool", "turn 5", "turn 6"]
        assert first.locator(".said-head").nth(2).inner_text().split("\n") == [
            "turn 1",
            "11 tokens",
            "5 read",
            "1.45 s",
        ]
        assert tab.text("#talks .talk >> nth=0").count("failed") == 2
        assert {"Turns an episode", "Calls of tools", "Calls that failed"} <= set(
            tab.page.locator("#curves .chart-title").all_inner_texts()
        )
        _unfold_by_keyboard(tab)
        portal.call(tell, history, 4)
        tab.see(lambda: tab.page.locator("#talks .talk").count() == 4)
        assert tab.page.locator("#talks .talk >> nth=1").locator("details.call[open]").count() == 1, "it stays unfolded"
        assert tab.page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert tab.page.locator("#talks script, #talks b b, #talks i:not(.strip i), #talks td").count() == 0
        tab.page.set_viewport_size({"width": 390, "height": 800})
        tab.see(lambda: tab.page.evaluate("document.documentElement.scrollWidth") <= 390)
        assert tab.errors == []


def _unfold_by_keyboard(tab: Tab) -> None:
    tab.page.locator("#talks .conversation").first.focus()
    for _ in range(2):  # its thoughts, then its first call
        tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    call = tab.page.locator("#talks details.call").first
    assert call.evaluate("node => node.open")
    texts = call.locator("pre").all_inner_texts()
    assert texts[0] == '{"query":"ابن سينا","limit":256}'
    assert texts[1].startswith("<tr onclick='alert(1)'><td>Ibn Sina")
    assert texts[1].endswith(" more characters")
