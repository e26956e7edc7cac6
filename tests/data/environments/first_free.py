"""Who plays tic-tac-toe against the policy."""

import re


def first_free(seen: str) -> str:
    """The first square that is free."""
    free = re.findall(r"\[(\d)\]", seen.rpartition("Available Moves:")[2])
    return f"[{free[0]}]"
