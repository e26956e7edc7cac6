"""Where the files of the demo are now, for runs that were begun when they were elsewhere."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parent.parent / "cli" / "demo"


def moved_demo_file(path: str) -> str:
    """The shipped file where a path led into the demo of a Troupe that kept it in `troupe/demo`, and leads nowhere now;
    else the path as it is."""
    _, found, rest = path.rpartition("/troupe/demo/")
    shipped = DEMO / rest
    return str(shipped) if found and not Path(path).exists() and shipped.exists() else path
