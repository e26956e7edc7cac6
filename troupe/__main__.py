"""The program `troupe`; `python -m troupe` is the same."""

import io
import sys

import click

from troupe.cli.control import control

_WITHOUT_MLX = "This command needs MLX, which cannot be imported."


def main() -> None:
    """Run the command that the arguments name. One that only looks at a run loads nothing that it does not need."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a policy writes may be more than a terminal has letters for
        sys.stdout.reconfigure(errors="replace")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in control.commands:
        control(prog_name="troupe")
    elif name in ("report", "inspect", "doctor"):
        _looking()[name](sys.argv[2:], prog_name=f"troupe {name}")
    try:
        from troupe.cli.main import main as commands
    except ImportError as error:
        from troupe.runtime.installing import missing_backend

        if (told := missing_backend(error)) is None:
            raise
        _without_mlx(told)(prog_name="troupe")
    else:
        commands(prog_name="troupe")


def _looking() -> dict[str, click.Command]:
    from troupe.cli.looking import doctor, inspect
    from troupe.cli.report import report

    return {"report": report, "inspect": inspect, "doctor": doctor}


def _without_mlx(told: str) -> click.Group:
    """The commands where MLX is not there: those that need it say what to install."""
    from troupe.cli.terminal import fail
    from troupe.runtime.machine import VERSION
    from troupe.runtime.terminal import EXIT_BAD_INPUT

    group = click.Group(help=f"{told}.", context_settings={"help_option_names": ["-h", "--help"]})
    click.version_option(VERSION, prog_name="troupe")(group)
    for name, command in {**control.commands, **_looking()}.items():
        group.add_command(command, name)
    for name in ("train", "generate", "eval"):
        needing = click.Command(
            name,
            params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
            callback=lambda words: fail(told, EXIT_BAD_INPUT),
            help=_WITHOUT_MLX,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True},
        )
        group.add_command(needing)
    return group


if __name__ == "__main__":
    __spec__ = (
        None  # so that what multiprocessing spawns imports this file, and with it finds rewards (reward_files.py)
    )
    main()
