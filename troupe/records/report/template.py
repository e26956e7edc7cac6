"""A page as one HTML text that needs no other file and no network.

What others wrote is put in as text: the template escapes it, the data of the scripts stands in a script tag that is no
script and holds no `<`, and the page's policy allows no script but its own.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from troupe.records import text as words
from troupe.records.report.static import SHARED, read_asset, script_safe
from troupe.records.text import shown

LONGEST = 100_000
"""Characters of a text, where nothing else is said."""

Filters = Mapping[str, Callable[..., Any]]


def rendered(
    template: str,
    /,
    *,
    scripts: Sequence[str],
    styles: Sequence[str],
    data: Any,
    folder: Path = SHARED,
    filters: Filters | None = None,
    **values: Any,
) -> str:
    """The template with its scripts, styles and data in it. Files are those of `folder`, or else those that
    pages share."""
    script = "\n".join(read_asset(one, folder) for one in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pages = jinja2.Environment(
        autoescape=True, finalize=_harmless, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"date": words.date, "number": words.number, "seconds": words.seconds, "bytes": words.size}
    pages.filters |= filters or {}
    return pages.from_string(read_asset(template, folder)).render(
        style=Markup("".join(read_asset(one, folder) for one in styles)),
        script=Markup(script),
        digest=digest,
        data=Markup(script_safe(data)),
        written=words.date(time.time()),
        **values,
    )


def _harmless(value: Any) -> Any:
    """What the template puts in: text in which nothing acts, and that has an end. It escapes it afterwards."""
    return value if isinstance(value, Markup) else shown(str(value)[:LONGEST])
