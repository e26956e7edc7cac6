"""The program `troupe`; `python -m troupe` is the same."""

import io
import sys

from troupe.cli.main import main as program


def main() -> None:
    """Run the command that the arguments name."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a policy writes may be more than a terminal has letters for
        sys.stdout.reconfigure(errors="replace")
    program(prog_name="troupe")


if __name__ == "__main__":
    __spec__ = None  # so that what multiprocessing spawns imports this file, and with it finds rewards (code_files.py)
    main()
