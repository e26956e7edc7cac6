"""A report's page, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, texts and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        """(innermost tag, text)."""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag: str) -> list[str]:
        """The texts of a tag, those of inner tags left out."""
        return [text for innermost, text in self.texts if innermost == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def visible(self) -> str:
        """All text that a reader sees."""
        texts = [text for tag, text in self.texts if tag not in ("script", "style")]
        return " ".join(" ".join(texts).split())

    @property
    def data(self) -> Any:
        """What the charts are drawn from."""
        data, _ = self.within("script")
        return json.loads(data)

    @property
    def script(self) -> str:
        return self.within("script")[1]
