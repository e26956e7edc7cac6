"""The page in a real browser: its script runs under its own policy, and draws; hostile text does nothing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.records.report.folders import make_run, metrics_of
from tests.records.report.test_page import HOSTILE, write_hostile, write_hostile_episode
from tests.support.browsers import a_browser
from troupe.records.browse import part_in
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STATES = "[...document.querySelectorAll('.chart')].map((chart) => chart.troupeChart)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with a_browser() as browser:
        yield browser


class Tab:
    """The report of a run as a reader has it before him."""

    def __init__(self, browser: Any, folder: Path, **context: Any) -> None:
        path = folder / "report.html"
        path.write_bytes(report_page(read_run(folder), part_in(folder)).encode("utf-8", "replace"))
        self.errors: list[str] = []
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-drawn]")
        self.drawn = int(self.page.get_attribute("body", "data-drawn"))
        data = self.page.evaluate("JSON.parse(document.getElementById('data').textContent)")
        self.charts = data["charts"]
        assert self.drawn == len(self.charts) + sum(map(bool, data["bars"].values()))

    def of_each(self, told: str) -> Any:
        """`told` of every chart's state `s`, when what was asked for is drawn."""
        self.page.wait_for_timeout(30)  # a frame
        while self.page.evaluate(f"{STATES}.some((s) => s.stale)"):
            self.page.wait_for_timeout(10)
        return self.page.evaluate(f"{STATES}.map((s) => {told})")

    def close(self) -> None:
        assert self.errors == []
        self.page.context.close()


def long_run(folder: Path, steps: int = 1200) -> Path:
    """A run whose reward is 0.1, 0.2, 0.3 and so on; more steps than a curve has points."""
    make_run(folder, 0)
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(1, steps + 1):
            file.write(msgspec.json.encode({"step": step, "version": step, **metrics_of(step)}) + b"\n")
    return folder


def test_all_charts_are_drawn(tmp_path: Path, browser: Any) -> None:
    tab = Tab(browser, long_run(tmp_path))
    assert tab.drawn == len(tab.charts) + 2 > 10
    assert tab.of_each("s.plot.data.length") == [1 + 2 * len(chart["series"]) for chart in tab.charts]
    assert tab.of_each("s.spec.title") == [chart["title"] for chart in tab.charts]
    assert tab.of_each("s.plot.data[0].length") == [600] * len(tab.charts)
    text = tab.page.inner_text("main")
    for part in ("Reward\n120\n⋯", "1.00e−6", "50.0 % at work"):
        assert part in text
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 1280
    _draw_twice_at_once(tab)
    tab.close()


def _draw_twice_at_once(tab: Tab) -> None:
    """The second has fewer lines; the first draws once more when its place is taken."""
    tab.page.evaluate(
        "() => { const place = document.querySelector('.chart'), { spec } = place.troupeChart;"
        "for (const times of [3, 1]) troupeChart(place, { ...spec, series: Array(times).fill(spec.series[0]) }); }"
    )
    assert tab.of_each("s.lines.length")[0] == 1


def test_what_a_reader_does(tmp_path: Path, browser: Any) -> None:
    tab = Tab(browser, long_run(tmp_path, 100))
    loss = "s.spec.key === 'loss'"
    _smooth(tab, loss)
    _change_the_axis(tab)
    _zoom(tab)
    _look(tab)
    _use_the_keyboard(tab)
    _use_the_menu(tab, tmp_path)
    tab.page.reload()
    tab.page.wait_for_selector("body[data-drawn]")
    assert tab.of_each("s.plot.scales.y.distr")[0] == 3, "what was chosen is kept"
    tab.close()


def _smooth(tab: Tab, loss: str) -> None:
    def drawn() -> list[float]:
        [values] = [values for values in tab.of_each(f"{loss} ? s.plot.data[2] : null") if values]
        return list(values)

    [raw] = [values for values in tab.of_each(f"{loss} ? s.plot.data[1] : null") if values]
    last = 0.0
    for count, (value, found) in enumerate(zip(raw, drawn(), strict=True), 1):
        last = 0.6 * last + 0.4 * value
        assert found == pytest.approx(last / (1 - 0.6**count))
    tab.page.locator(".smoothing").fill("0")
    assert set(drawn()) == {None}


def _change_the_axis(tab: Tab) -> None:
    for axis, first, last in (("time", 0, 200), ("tokens", 0, 10000), ("step", 1, 100)):
        tab.page.click(f"[data-axis={axis}]")
        assert tab.of_each("[s.plot.scales.x.min, s.plot.scales.x.max]")[0] == [first, last]


def _zoom(tab: Tab) -> None:
    box = tab.page.locator(".u-over").first.bounding_box()
    y = box["y"] + box["height"] / 2
    tab.page.mouse.move(box["x"] + box["width"] * 0.25, y)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=4)
    tab.page.mouse.up()
    views = tab.of_each("[s.plot.scales.x.min, s.plot.scales.x.max]")
    assert views[0] == pytest.approx([25.75, 50.5], abs=0.6)
    assert all(view == views[0] for view in views), "all charts show the same steps"
    low, high = tab.of_each("[s.plot.scales.y.min, s.plot.scales.y.max]")[0]
    assert low > 2.0
    assert high < 5.6
    tab.page.mouse.dblclick(box["x"] + 40, y)
    assert tab.of_each("[s.plot.scales.x.min, s.plot.scales.x.max]")[0] == [1, 100]


def _look(tab: Tab) -> None:
    box = tab.page.locator(".u-over").first.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert set(tab.of_each("s.at.textContent")) == {"step 50"}
    assert tab.page.inner_text(".chart >> nth=0").startswith("Reward\nstep 50\n5")
    tab.page.mouse.move(2, 2)
    assert set(tab.of_each("s.at.textContent")) == {""}


def _use_the_keyboard(tab: Tab) -> None:
    tab.page.locator(".chart-plot").first.focus()
    tab.page.keyboard.press("End")
    tab.page.keyboard.press("ArrowLeft")
    assert tab.page.inner_text(".aloud") == "Reward, step 99: 9.9"
    tab.page.keyboard.press("+")
    assert tab.of_each("s.plot.scales.x.min")[0] == pytest.approx(50)
    tab.page.keyboard.press("Escape")
    assert tab.of_each("s.plot.scales.x.min")[0] == 1


def _use_the_menu(tab: Tab, folder: Path) -> None:
    tab.page.click(".chart-menu summary >> nth=0")
    tab.page.click("text=Logarithmic axis >> nth=0")
    assert tab.of_each("s.plot.scales.y.distr")[:2] == [3, 1]
    files = {}
    for kind in ("CSV", "PNG"):
        tab.page.click(".chart-menu summary >> nth=0")
        with tab.page.expect_download() as download:
            tab.page.click(f".chart-menu[open] >> text=Save as {kind}")
        files[kind] = folder / download.value.suggested_filename
        download.value.save_as(files[kind])
    rows = list(csv.reader(files["CSV"].read_text().splitlines()))
    assert rows[0] == ["step", "seconds", "tokens", "mean", "mean (band, low)", "mean (band, high)"]
    assert [float(value) for value in rows[7]] == [7, 14, 700, 0.7, 0.45, 0.95]
    assert files["PNG"].name == "reward.png"
    assert files["PNG"].read_bytes().startswith(b"\x89PNG")


def test_light_and_dark(tmp_path: Path, browser: Any) -> None:
    tab = Tab(browser, make_run(tmp_path), color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    stroke = "s.plot.series[1].stroke(s.plot, 1)"
    dark = (tab.page.evaluate(ground), tab.of_each(stroke)[0])
    assert dark[0] == "rgb(19, 21, 25)"
    tab.page.click(".theme-switch")  # light, whatever the system is
    light = (tab.page.evaluate(ground), tab.of_each(stroke)[0])
    assert light[0] == "rgb(246, 246, 243)"
    assert light[1] != dark[1]
    tab.page.click(".theme-switch")
    assert tab.page.evaluate(ground) == dark[0]
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert (tab.page.evaluate(ground), tab.of_each(stroke)[0]) == light, "paper is light"
    tab.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert (tab.page.evaluate(ground), tab.of_each(stroke)[0]) == dark
    tab.close()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps(tmp_path: Path, browser: Any, steps: int) -> None:
    tab = Tab(browser, make_run(tmp_path, steps))
    assert all(low < high for low, high in tab.of_each("[s.plot.scales.y.min, s.plot.scales.y.max]"))
    tab.close()


def test_hostile_text_does_nothing(tmp_path: Path, browser: Any) -> None:
    hostile = " ".join(text for text in HOSTILE if text.isprintable())
    write_hostile(tmp_path / "one", hostile)
    write_hostile_episode(tmp_path / "other", hostile)
    for folder, calls in ((tmp_path / "one", 0), (tmp_path / "other", 4)):  # it is the best and the worst
        tab = Tab(browser, folder)
        assert tab.page.locator("img").count() == 0
        assert tab.page.locator("script").count() == 2
        assert tab.page.locator("details.call").count() == calls
        chart = {"series": [{"name": '=HYPERLINK("x")', "x": {"step": [1, 2]}, "y": [0.5, None]}]}
        lines = tab.page.evaluate("chartAsCsv", chart)
        assert lines == 'step,"\'=HYPERLINK(""x"")"\r\n1,0.5\r\n2,\r\n', "no formula for a spreadsheet"
        tab.close()
