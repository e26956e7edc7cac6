"""The program `troupe`; `python -m troupe` is the same."""

import sys

from troupe.daemon.commands import control


def main() -> None:
    """Run the command that the arguments name. One that speaks with a run loads nothing that it does not need."""
    if sys.argv[1:2] and sys.argv[1] in control.commands:
        control(prog_name="troupe")
    from troupe.cli import main as commands

    commands(prog_name="troupe")


if __name__ == "__main__":
    main()
