"""The browser of completions in a real browser: in a report, and on a page with a server.

Marked slow, and skipped where Chromium or playwright is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.from_thread
import msgspec
import pytest

from tests.daemon.page.test_live_page import Tab
from tests.daemon.page.test_server import FakeDaemon
from tests.records.report.folders import make_run
from tests.records.report.test_page import HOSTILE
from tests.support.browsers import a_browser
from tests.support.many import make_many
from tests.support.stored import acted, closed, update
from tests.support.tiny import write_tiny_model
from troupe.daemon.page.history import History
from troupe.daemon.page.server import Page
from troupe.messages import GroupClosed, TokenFigures
from troupe.policy import Tokenizer
from troupe.records.browse import part_in
from troupe.records.layout import STORE
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run
from troupe.records.sinks.sqlite import SqliteSink

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SAID = ("the cat sat on the mat", "the cat sat on a red mat", "no idea")
NASTY = " ".join(HOSTILE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with a_browser() as opened:
        yield opened


def said(step: int, tokenizer: Tokenizer, texts: tuple[str, ...]) -> GroupClosed:
    """A group of which sample i wrote text i; the first token of each is unlikely."""
    told = closed(step, 0, tuple(i / 2 for i in range(len(texts))))
    assert told.scored is not None
    rollouts, figures = [], []
    for text, rollout in zip(texts, told.scored.group.rollouts, strict=True):
        ids = tuple(tokenizer.encode(text)) or (0,)
        T = len(ids)
        log_probs = (-4.0,) + (-0.01,) * (T - 1)
        rollouts.append(
            msgspec.structs.replace(rollout, text=text, token_ids=ids, log_probs=log_probs, versions=(0,) * T)
        )
        figures.append(TokenFigures(entropies=(2.0,) * T, ratios=(1.5,) + (1.0,) * (T - 1)))
    group = msgspec.structs.replace(told.scored.group, rollouts=tuple(rollouts))
    scored = msgspec.structs.replace(told.scored, group=group)
    gid = told.gid if step == 3 else 2**53 + 2 * step + 1  # no number of JavaScript's
    return msgspec.structs.replace(told, gid=gid, scored=scored, token_figures=tuple(figures))


def make_said(folder: Path) -> Path:
    """A run of three steps with all figures of every token; its last step holds a conversation and hostile text."""
    make_run(folder, 0)
    tokenizer = Tokenizer.from_pretrained(write_tiny_model(folder / "final"))
    sink = SqliteSink(folder / STORE, log_probs=True)
    sink.open()
    for step in (1, 2):
        sink.write(said(step, tokenizer, SAID))
        sink.write(update(step))
    sink.write(said(3, tokenizer, (NASTY, "x" * 1_000_000, "")))
    sink.write(acted(3, 1))
    sink.write(update(3))
    sink.flush()
    sink.close()
    return folder


def report_in(browser: Any, folder: Path, **options: Any) -> Tab:
    path = folder / "report.html"
    path.write_bytes(report_page(read_run(folder), part_in(folder)).encode("utf-8", "replace"))
    tab = Tab(browser.new_context(**options).new_page())
    tab.page.goto(path.as_uri())
    return tab


@pytest.fixture
def served() -> Iterator[Any]:
    """Opens the page of a folder, with a server and nobody behind it."""
    with anyio.from_thread.start_blocking_portal() as portal:
        opened = []

        def serve(folder: Path) -> str:
            page = portal.wrap_async_context_manager(Page(FakeDaemon(), History("kind", str(folder)), folder))
            opened.append(page)
            return str(page.__enter__().address)

        yield serve
        for page in opened:
            page.__exit__(None, None, None)


def fill(tab: Tab, label: str, text: str) -> None:
    tab.page.get_by_label(label, exact=True).fill(text)


def lines(tab: Tab) -> list[str]:
    return [" ".join(text.split()) for text in tab.page.locator(".listed .line").all_inner_texts()]


def opened(tab: Tab, text: str) -> None:
    tab.see(lambda: text in tab.text(".opened"))


def more_than(tab: Tab, count: int) -> None:
    tab.see(lambda: tab.page.locator(".listed .line").count() > count)


def strongly(tab: Tab, *expected: bool) -> None:
    """Whether the first tokens are coloured strongly."""
    tab.see(lambda: tab.page.locator(".token").count() >= len(expected))
    assert [_colour_of(tab, place) > 0.2 for place in range(len(expected))] == list(expected)


def found(tab: Tab, text: str) -> None:
    tab.see(lambda: tab.text(".found").startswith(text))


def test_a_report_is_looked_through(tmp_path: Path, browser: Any) -> None:
    tab = report_in(browser, make_said(tmp_path), accept_downloads=True)
    found(tab, "13 found")
    _filter(tab)
    _colour(tab)
    fill(tab, "to step", "1")
    found(tab, "3 found")
    _save(tab)
    assert tab.errors == []


def test_a_page_asks_its_server(tmp_path: Path, browser: Any, served: Any) -> None:
    tab = Tab(browser.new_context(accept_downloads=True).new_page())
    tab.page.goto(served(make_said(tmp_path)))
    tab.page.click("#past summary")
    found(tab, "13 found")
    _filter(tab)
    _colour(tab)
    _compare(tab)
    _save(tab)
    assert tab.errors == []


DIFFERENCES = """() => {
  let seed = 1;
  const draw = (below) => (seed = (seed * 48271) % 2147483647) % below;
  const shortest = (a, b) => { // words that only one of them has, by the longest common subsequence
    const rows = [...Array(a.length + 1)].map(() => Array(b.length + 1).fill(0));
    for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
      rows[i][j] = a[i] === b[j] ? rows[i + 1][j + 1] + 1 : Math.max(rows[i + 1][j], rows[i][j + 1]);
    return a.length + b.length - 2 * rows[0][0];
  };
  for (let n = 0; n < 400; n += 1) {
    const [a, b] = [0, 1].map(() => [...Array(draw(12))].map(() => "abc"[draw(3)]));
    const parts = differences(a, b);
    const [left, right] = [1, 2].map((side) => parts.flatMap((part) => part[side]).join(""));
    const count = (sum, part) => sum + part[1].length + part[2].length;
    const others = parts.filter(([kind]) => kind === "other").reduce(count, 0);
    const same = parts.filter(([kind]) => kind === "same").every(([, one, other]) => one.join() === other.join());
    if (left !== a.join("") || right !== b.join("") || !same || others !== shortest(a, b)) return [a, b, parts];
  }
  return null;
}"""


def test_differences_are_the_shortest(tmp_path: Path, browser: Any) -> None:
    tab = report_in(browser, make_said(tmp_path))
    assert tab.page.evaluate(DIFFERENCES) is None
    far = "() => differences(wordsOf('a '.repeat(9000)), wordsOf('b '.repeat(9000))).length"
    assert tab.page.evaluate(far) >= 1, "what differs in all is told of at once"


def _filter(tab: Tab) -> None:
    fill(tab, "text holds", "RED mat")
    found(tab, "2 found")
    assert [line[:6] for line in lines(tab)] == ["step 2", "step 1"]
    tab.page.get_by_label("order", exact=True).select_option("all")
    tab.see(lambda: [line[:6] for line in lines(tab)] == ["step 1", "step 2"])
    fill(tab, "from step", "2")
    found(tab, "1 found")
    tab.page.get_by_role("button", name="Clear").click()
    found(tab, "13 found")
    fill(tab, "reward from", "1.5")
    fill(tab, "to step", "2")
    found(tab, "2 found")
    assert tab.text("#completions code").endswith("--steps :2 --min-reward 1.5 --export FILE.parquet")
    fill(tab, "text holds", "is nowhere")
    tab.see(lambda: "There is no such completion." in tab.text(".listed"))
    tab.page.get_by_role("button", name="Clear").click()
    found(tab, "13 found")


def _colour(tab: Tab) -> None:
    fill(tab, "to step", "1")
    found(tab, "3 found")
    tab.page.locator(".listed").focus()
    tab.page.keyboard.press("ArrowDown")
    tab.see(lambda: "sample 0" in tab.text(".opened"))
    choice = tab.page.locator(".colour-bar select")
    assert choice.locator("option").all_inner_texts() == [
        "nothing",
        "log-prob",
        "entropy",
        "importance ratio",
        "advantage",
    ]
    for name, first, second in (("log_probs", True, False), ("entropies", True, True), ("ratios", True, False)):
        choice.select_option(name)
        strongly(tab, first, second)
    assert "".join(tab.page.locator(".token").all_inner_texts()) == SAID[0]
    tab.page.locator(".tokens").focus()
    tab.page.keyboard.press("ArrowRight")
    assert "log-prob −4 · entropy 2 · importance ratio 1.5" in tab.text(".readout")
    tab.page.get_by_role("button", name="This prompt through the steps").click()
    tab.see(lambda: [line[:6] for line in lines(tab)][:3] == ["step 1"] * 3)
    tab.see(lambda: tab.page.locator(".course i").count() == tab.page.locator(".listed .line").count())


def _colour_of(tab: Tab, place: int) -> float:
    """How strongly a token is coloured, from 0 to 1."""
    colour = tab.page.evaluate(
        "place => getComputedStyle(document.querySelectorAll('.token')[place]).backgroundColor", place
    )
    return float(colour.rstrip(")").split("/")[1]) if "/" in colour else 0.0 if "0)" in colour else 1.0


def _compare(tab: Tab) -> None:
    tab.page.get_by_role("button", name="Clear").click()
    found(tab, "13 found")
    fill(tab, "to step", "1")
    found(tab, "3 found")
    first = tab.page.locator(".listed .line").nth(0)
    _, gid, sample = (first.get_attribute("id") or "").split("-")
    first.click()
    tab.see(lambda: f"group {gid}, sample {sample}" in tab.text(".opened"))  # and not what was opened before
    tab.page.get_by_role("button", name="Compare with another").click()
    tab.page.locator(".listed").focus()
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("ArrowDown")
    tab.see(lambda: "3 words differ" in tab.text(".opened"))
    assert tab.page.locator(".difference del").all_inner_texts() == ["the"]
    assert tab.page.locator(".difference ins").all_inner_texts() == ["a red"]
    tab.page.get_by_role("button", name="No more").click()
    tab.see(lambda: tab.page.locator(".difference").count() == 0)


def _save(tab: Tab) -> None:
    with tab.page.expect_download() as download:
        tab.page.get_by_text("Save these as JSONL").click()
    saved = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [one["completion"] for one in saved] == list(SAID)


def test_hostile_text_does_nothing_and_all_fits_a_telephone(tmp_path: Path, browser: Any, served: Any) -> None:
    make_said(tmp_path)
    tab = Tab(browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark").new_page())
    tab.page.goto(served(tmp_path))
    tab.page.click("#past summary")
    fill(tab, "from step", "3")
    found(tab, "7 found")
    for place in range(7):
        line = tab.page.locator(".listed .line").nth(place)
        line.click()
        assert line.get_attribute("aria-selected") == "true"
        opened(tab, f"sample {place if place < 3 else place - 3}")
        if place == 0:
            assert "</script><script>alert(1)</script>" in tab.text(".opened")
            assert "\\u202egnp.exe" in tab.text(".opened")
            assert not {"\u202e", "\x1b"} & set(tab.text(".opened"))
        if place == 1:
            assert "800,000 more characters" in tab.text(".opened")
        if place == 3:
            assert tab.page.locator(".opened .said").count() > 6
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.page.locator("#completions img").count() == 0
    assert tab.errors == []


def test_thousands_are_scrolled_through(tmp_path: Path, browser: Any, served: Any) -> None:
    make_many(tmp_path, 4000, letters=30)
    tab = Tab(browser.new_page())
    tab.page.goto(served(tmp_path))
    tab.page.click("#past summary")
    found(tab, "4,000 found")
    first = tab.page.locator(".listed .line").count()
    assert first < 200, "not all at once"
    for _ in range(4):
        before = tab.page.locator(".listed .line").count()
        tab.page.evaluate("document.querySelector('.listed').scrollTop = 1e9")
        more_than(tab, before)
    tab.page.locator(".listed").focus()
    tab.page.keyboard.press("End")
    tab.see(lambda: "sample" in tab.text(".opened"))
    assert tab.errors == []
