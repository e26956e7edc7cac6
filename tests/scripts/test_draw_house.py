"""scripts.draw_house: the committed picture shows the rooms and imports that there are."""

from __future__ import annotations

import re
from collections import Counter

from scripts.draw_house import PICTURE, Room, imports, picture, rooms


def shape(svg: str) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Lines, rooms and sentences of a picture, without what changes at every edit."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    lines = re.findall(r'data-from="(\w+)" data-to="(\w+)"', svg)
    return sorted(lines), re.findall(r'data-room="(\w+)"', svg), [text for text in texts if " files · " not in text]


def test_the_picture_is_of_the_house_as_it_is() -> None:
    told = "python -m scripts.draw_house draws it anew"
    assert shape(PICTURE.read_text(encoding="utf-8")) == shape(picture(rooms(), imports())), told


def test_rooms_are_drawn_with_their_sentence_and_size() -> None:
    house = {name: Room(name, f"what {name} is <for>", 2, 1234) for name in rooms()}
    svg = picture(house, Counter({("run", "grpo"): 4, ("run", "messages"): 1}))
    assert shape(svg)[0] == [("run", "grpo"), ("run", "messages")]
    assert "what grpo is &lt;for&gt;" in svg
    assert svg.count("2 files · 1,234 lines") == len(house)
    thick, thin = (float(width) for width in re.findall(r'stroke-width="([\d.]+)" stroke-opacity', svg))
    assert thick > thin
