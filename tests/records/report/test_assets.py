"""The static files of pages."""

from __future__ import annotations

import re

import pytest

from troupe.records.report.static import BROWSER_SCRIPTS, BROWSER_STYLES, CHART_SCRIPTS, CHART_STYLES, read_asset

_BROWSER = (*BROWSER_SCRIPTS, *BROWSER_STYLES, "embedded.js")


@pytest.mark.parametrize("name", [*CHART_STYLES, *CHART_SCRIPTS, *_BROWSER, "bars.js", "report.html", "report.js"])
def test_assets_need_no_network(name: str) -> None:
    text = read_asset(name)
    assert not re.search("https?:", text)
    assert "@import" not in text
    assert "innerHTML" not in text
    assert "</script" not in text or name.endswith(".html")


def test_every_class_that_is_used_has_a_look() -> None:
    style = "".join(map(read_asset, ("style.css", *BROWSER_STYLES)))
    page = re.sub(r"\{[{%].*?[%}]\}", " ", read_asset("report.html"))
    used = {name for names in re.findall(r'class="([^"]*)"', page) for name in names.split()}
    scripts = "".join(read_asset(name) for name in (*CHART_SCRIPTS[1:], *BROWSER_SCRIPTS, "bars.js"))
    used |= {name for names in re.findall(r'html\("\w+", "([\w -]+)"', scripts) for name in names.split()}
    assert used
    assert {name for name in used if f".{name}" not in style} <= {"number", "name"}


def test_every_colour_is_there_in_light_and_dark() -> None:
    style = read_asset("style.css")
    colours = dict(re.findall(r"(--[\w-]+): (.*#.*);", style))
    assert len(colours) > 20
    assert {
        name for name, colour in colours.items() if not re.fullmatch(r"light-dark\(#\w{6}, #\w{6}\)", colour)
    } == set()
    rules = re.sub(r"--[\w-]+: .*;", "", style)
    assert not re.search(r"#[0-9a-f]{3,6}\b", rules), "rules name colours by what they are for"
