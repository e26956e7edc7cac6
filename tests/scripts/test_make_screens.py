"""The pictures in the documents: small, without anything fetched from elsewhere; and the screens drawn as pictures."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.make_screens import PAGES, SCREENS, as_svg

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "docs" / "images").iterdir())


def texts(svg: str) -> str:
    """What a reader sees."""
    return " ".join("".join(ElementTree.fromstring(svg).itertext()).replace("\u00a0", " ").split())


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_every_picture_is_small_shown_and_stands_alone(image: Path) -> None:
    assert image.stat().st_size < 150_000
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"images/{image.name}" in page.read_text(encoding="utf-8") for page in pages)
    if image.name.startswith("screen-"):
        text = image.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert "@font-face" not in text


def test_the_script_makes_every_screen_and_page() -> None:
    made = {f"{name}.svg" for name in SCREENS} | {f"{name}.png" for name in PAGES}
    assert made == {image.name for image in IMAGES if image.name.startswith(("screen-", "page-"))}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("screen-held-out", r"sums ?running .* evaluating held_out of step 0: .*rows [\d,]+ / 8,000"),
        ("screen-first-generation", r"now generating step 1: \d+ of at most 512 tokens"),
        (
            "screen-reward-refused",
            r"sums ?held .* waiting for reward my_judge: connection refused \([\d,]+ tries, \d+ s\)",
        ),
        ("screen-reward-back", r"sums ?running .* (reward my_judge answers again after|too few scores)"),
    ],
)
def test_the_screens_show_what_they_are_shown_for(name: str, shown: str) -> None:
    text = texts((ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8"))
    assert re.search(shown, text), text


def test_a_screen_is_drawn_with_its_colours_and_as_text() -> None:
    svg = as_svg("plain <b> &\n\x1b[36mcyan\x1b[0m\n", "one")
    assert texts(svg).endswith("plain <b> & cyan")
    assert len(set(re.findall(r"\.one-r\d \{ fill: (#\w+)", svg))) == 2
