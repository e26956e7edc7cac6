"""The program `troupe`: its commands, each loaded when it is asked for, so that who only looks at a run loads no MLX.

Exit codes: 0 done, 2 bad input, 3 fault, 130 interrupted and resumable.
"""

import importlib

import click

from troupe.cli.commands import Commands, fail
from troupe.cli.control import control
from troupe.runtime.machine import VERSION, missing_backend
from troupe.runtime.terminal import EXIT_BAD_INPUT

_LOADED = {
    name: name
    for name in (
        "train",
        "sft",
        "generate",
        "inspect",
        "report",
        "doctor",
        "fuse",
        "worker",
        "cluster",
        "runs",
        "compare",
    )
} | {"eval": "evaluate"}
"""Command → the file of this room, and the name in it."""


class Program(Commands):
    """All commands; those whose file is not loaded yet are in `_LOADED` alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name."""
        return sorted({*self.commands, *_LOADED})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; where it needs MLX and there is none, one that says what to install."""
        if cmd_name in _LOADED and cmd_name not in self.commands:
            name = _LOADED[cmd_name]
            try:
                self.add_command(getattr(importlib.import_module(f"troupe.cli.{name}"), name), cmd_name)
            except ImportError as error:
                if (reason := missing_backend(error)) is None:
                    raise
                self.help = f"{reason}."
                self.add_command(_unusable(cmd_name, reason))
        return super().get_command(ctx, cmd_name)

    def load_all(self) -> dict[str, click.Command]:
        """Every command, by its name."""
        for name in _LOADED:
            self.get_command(click.Context(self), name)
        return dict(self.commands)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """With all commands there: what is missing is said before they are listed."""
        self.load_all()
        super().format_help(ctx, formatter)


def _unusable(name: str, reason: str) -> click.Command:
    return click.Command(
        name,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        callback=lambda words: fail(reason, EXIT_BAD_INPUT),
        help="This command needs MLX, which cannot be imported.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )


@click.group(
    cls=Program,
    commands=dict(control.commands),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(VERSION, prog_name="troupe")
def main() -> None:
    """Teach language models with GRPO on Apple's MLX."""
