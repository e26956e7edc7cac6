"""The static files of pages."""

from __future__ import annotations

import re

import pytest

from troupe.records.report.static import read_asset


@pytest.mark.parametrize("name", ["style.css", "format.js", "charts.js", "bars.js", "report.html", "report.js"])
def test_assets_need_no_network(name: str) -> None:
    text = read_asset(name)
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}
    assert "@import" not in text
    assert "innerHTML" not in text
    assert "</script" not in text or name.endswith(".html")


def test_every_class_that_is_used_has_a_look() -> None:
    style = read_asset("style.css")
    page = re.sub(r"\{[{%].*?[%}]\}", " ", read_asset("report.html"))
    used = {name for names in re.findall(r'class="([^"]*)"', page) for name in names.split()}
    scripts = read_asset("charts.js") + read_asset("bars.js")
    used |= {name for names in re.findall(r'html\("\w+", "([\w -]+)"', scripts) for name in names.split()}
    assert used
    assert {name for name in used if f".{name}" not in style} <= {"number", "name"}


def test_every_colour_is_there_in_light_and_dark() -> None:
    light, _, dark = read_asset("style.css").partition("prefers-color-scheme: dark")
    tokens = {
        name for name in re.findall(r"(--[\w-]+):", light) if name not in ("--radius", "--gap", "--font", "--mono")
    }
    assert tokens - {"--chart-height"} == set(re.findall(r"(--[\w-]+):", dark))
