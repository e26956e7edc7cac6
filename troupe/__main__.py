"""The program `troupe`; `python -m troupe` is the same."""

import io
import sys

from troupe.daemon.commands import control


def main() -> None:
    """Run the command that the arguments name. One that only looks at a run loads nothing that it does not need."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a policy writes may be more than a terminal has letters for
        sys.stdout.reconfigure(errors="replace")
    if sys.argv[1:2] and sys.argv[1] in control.commands:
        control(prog_name="troupe")
    if sys.argv[1:2] == ["report"]:
        from troupe.report.command import report

        report(sys.argv[2:], prog_name="troupe report")
    from troupe.cli import main as commands

    commands(prog_name="troupe")


if __name__ == "__main__":
    __spec__ = (
        None  # so that what multiprocessing spawns imports this file, and with it finds rewards (reward_files.py)
    )
    main()
