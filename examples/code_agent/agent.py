"""An agent that writes code: it may run some in a sandbox, reads what it prints, and hands in what it thinks is right.

The sandbox is that of `../code_reward.py`, which says what it holds off and what not. A row has `tests`, Python
statements that are run behind what was handed in.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from code_reward import Limits, passes_tests, run_code

LIMITS = Limits(wall_s=20.0, output_bytes=2000)


class CodeAgent:
    """One problem."""

    def __init__(self) -> None:
        self.tests = ""
        self.handed_in = ""
        self.runs = 0

    def reset(self, tests: str, **columns: Any) -> None:
        """Begin. The prompt says what is to be written."""
        self.tests, self.handed_in, self.runs = tests, "", 0

    async def run_python(self, code: str) -> str:
        """Run a Python program.

        Args:
            code: The program.

        Returns:
            What it prints, errors included.
        """
        self.runs += 1
        ran = await run_code(code, LIMITS)
        return ran.output + (f"\nkilled: {ran.why_killed}" if ran.why_killed else "")

    async def submit(self, code: str) -> str:
        """Hand in the final program.

        Args:
            code: The program.

        Returns:
            That it was taken.
        """
        self.handed_in = code
        return "handed in"

    async def get_reward(self) -> float:
        """1 where what was handed in passes the tests of the row, else 0."""
        if not self.handed_in:
            return 0.0
        (score,) = await passes_tests([self.handed_in], [self.tests])
        return float(score)
