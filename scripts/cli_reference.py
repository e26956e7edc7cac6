"""Write docs/cli.md: every command and option, read off the commands themselves.

`python -m scripts.cli_reference` writes the file, `--check` only compares it. Nothing here depends on how click lays
out its help.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import click

from scripts.pages import DOCS, write_or_check
from troupe.cli.main import main as troupe

PAGE = DOCS / "cli.md"

_HEAD = """\
# Every command

<!-- written by scripts/cli_reference.py; change the commands' help texts, not this file -->

`troupe COMMAND --help` shows the same in a terminal; `troupe --version` the version. `python -m troupe` is `troupe`.

| it ends with | when |
|---|---|
| 0 | done |
| 2 | bad input, found before work began; or no process runs the run that was asked |
| 3 | a fault while a run was under way, or a request that was refused |
| 130 | interrupted; `troupe train -o OUT_DIR --resume` goes on |

The first Ctrl-C (or SIGTERM) of a training finishes the steps that have begun, the second saves the last completed step
and ends, the third leaves at once.
"""


def _value(param: click.Parameter) -> str:
    """What stands behind an option's name, or for an argument."""
    if isinstance(param, click.Option) and param.is_flag:
        return ""
    if param.metavar:
        return param.metavar.replace("|", " or ")  # no way of writing a bar in a table suits every reader of Markdown
    if isinstance(param.type, click.Choice):
        return " or ".join(map(str, param.type.choices))
    if isinstance(param, click.Argument):
        return (param.name or "").upper()
    if isinstance(param.type, click.types.IntParamType):
        return "N"
    return "X" if isinstance(param.type, click.types.FloatParamType) else "TEXT"


def _option(param: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in sorted((*param.opts, *param.secondary_opts), key=len))
    value = f" `{_value(param)}`" if _value(param) else ""
    told = " ".join((param.help or "").split())
    if param.show_default and not param.is_flag:
        told += f" [default: {param.default}]"
    if param.required:
        told += " [required]"
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in (names + value, told)) + " |"


def _usage(name: str, command: click.Command) -> str:
    arguments = [
        _value(param) if param.required else f"[{_value(param)}]"
        for param in command.params
        if isinstance(param, click.Argument)
    ]
    options = [param for param in command.params if isinstance(param, click.Option)]
    return " ".join(["troupe", name, *(["[OPTIONS]"] if options else []), *arguments])


def _section(name: str, command: click.Command) -> list[str]:
    lines = [f"## troupe {name}", "", f"`{_usage(name, command)}`", "", inspect.cleandoc(command.help or ""), ""]
    options = [param for param in command.params if isinstance(param, click.Option)]
    if options:
        lines += ["| option | meaning |", "|---|---|", *map(_option, options), ""]
    return lines


def _flat(commands: Mapping[str, click.Command]) -> dict[str, click.Command]:
    """Commands by their whole names; a group's stand for it."""
    flat: dict[str, click.Command] = {}
    for name, command in commands.items():
        parts = command.commands if isinstance(command, click.Group) else {}
        flat |= {f"{name} {part}": each for part, each in parts.items()} or {name: command}
    return flat


def reference() -> str:
    """The whole page."""
    commands = _flat(troupe.load_all())
    first = ["train", "sft", "generate", "eval", "inspect", "doctor"]
    rest = [name for name in commands if name not in first]
    lines = [_HEAD]
    for name in [name for name in first if name in commands] + sorted(rest):
        lines += _section(name, commands[name])
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    write_or_check(PAGE, reference(), "cli_reference")
