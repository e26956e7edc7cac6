"""The static parts of pages, style, scripts, templates, and how data is put beside them."""

from pathlib import Path
from typing import Any

import msgspec

SHARED = Path(__file__).with_name("assets")
CHART_SCRIPTS = ("vendor/uPlot.iife.min.js", "format.js", "settings.js", "series.js", "plot.js", "save.js", "charts.js")
"""What draws charts, in the order in which it is loaded."""
CHART_STYLES = ("vendor/uPlot.min.css", "style.css")
"""How pages with charts look, likewise."""

BROWSER_SCRIPTS = ("conversation.js", "difference.js", "completion.js", "completions.js")
"""What browses completions, after `format.js`; a source of them comes after it."""
BROWSER_STYLES = ("completions.css",)


def read_asset(name: str, folder: Path = SHARED) -> str:
    """The text of a page's file, such as `style.css`: of the given folder, or else of those that pages share."""
    path = folder / name
    return (path if path.is_file() else SHARED / name).read_text(encoding="utf-8")


def script_safe(data: Any) -> str:
    """Data as JSON that ends no script tag: no `<`, `>` and `&`, wherever they stand."""
    text = msgspec.json.encode(data).decode()
    for char in "<>&\u2028\u2029":  # in JSON these stand within strings only
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
