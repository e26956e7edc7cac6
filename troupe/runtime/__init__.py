"""Mailboxes, actors, processes, files; no GRPO."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`Guard` is for scripts, too; its file loads asyncio, which quick commands do without."""
    if name != "Guard":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from troupe.runtime.guarding import Guard

    return Guard
