"""Commands that answer a flag or a name that they do not have with the nearest of ours, and how every command ends: its
errors as exit codes and messages. Quick to import.

Which key of the configuration a flag stands for is said where the command is; what others call it, in `aliases`.
"""

import functools
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, ParamSpec

import click

from troupe.errors import InputError, TroupeError
from troupe.run.aliases import COMMANDS, Meaning, close_to, known_names, normalized, ours_for, plain
from troupe.runtime.terminal import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, tell

P = ParamSpec("P")
_OTHER_VALUES = {"scale", "exclude_modules"}
"""Names of others' settings whose values are other ones here."""
_FIRST = ("train", "sft", "generate", "eval", "inspect", "runs", "compare", "report", "fuse", "doctor", "worker")


class Number(click.FloatRange):
    """A float in a range; NaN, which compares as if it were in every range, is refused, and so is infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is no finite number.", param, ctx)
        return number


def report_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into an exit code; Troupe's own into one message, any other, which is a fault, into a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            fail(str(error), EXIT_BAD_INPUT)
        except TroupeError as error:
            fail(str(error), EXIT_FAULT)
        except KeyboardInterrupt:  # before the run began, or where no run is
            sys.exit(EXIT_INTERRUPTED)
        except Exception:
            tell(traceback.format_exc().rstrip("\n"), error=True)
            sys.exit(EXIT_FAULT)

    return wrapped


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message on stderr."""
    tell(f"troupe: {message}", error=True)
    sys.exit(code)


class Command(click.Command):
    """A command whose parameters stand for keys of the configuration."""

    def __init__(self, *arguments: Any, keys: Mapping[str, str] | None = None, **options: Any) -> None:
        """`keys`: name of a parameter → the `section.key` that it sets."""
        super().__init__(*arguments, **options)
        self._keys = dict(keys or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but an unknown flag is answered with ours."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(self._answer(error.option_name, given), ctx) from None

    def _answer(self, name: str, given: Sequence[str]) -> str:
        if not name.startswith("--"):  # click names the first letter alone
            name = next((word for word in given if word.startswith(name)), name)
        words = [word.partition("=")[0] for word in given]
        place = words.index(name) if name in words else len(words)
        value = given[place].partition("=")[2] if place < len(words) else ""
        if not value and place + 1 < len(given) and not given[place + 1].startswith("-"):
            value = given[place + 1]
        return f"No such option '{name}'; {self._hint(name, value)}"

    def _hint(self, name: str, value: str) -> str:
        options = {flag: flag for param in self.params for flag in param.opts if flag.startswith("--")}
        spelled = {normalized(flag): flag for flag in options}
        if (flag := spelled.get(normalized(name))) is not None:
            return f"it is {flag} here"
        if (meaning := ours_for(name, _keys())) is not None:
            return self._meant(meaning, "" if normalized(name) in _OTHER_VALUES else value)
        leaves = [key.rpartition(".")[2] for key in _keys()]
        close = close_to(normalized(name), [*spelled, *leaves, *known_names()])
        if close in spelled:
            return f"did you mean {spelled[close]}?"
        if close is not None and (meaning := ours_for(close, _keys())) is not None:
            return f"did you mean {close}? {self._meant(meaning, value)}"
        return f"what there is: troupe {self.name} --help"

    def _meant(self, meaning: Meaning, value: str) -> str:
        note = plain(meaning.note)
        if not meaning.ours:
            return f"there is none here: {note}"
        if self.name not in ("train", "sft", "daemon"):  # notes are about runs
            note = ""
        ways = list(dict.fromkeys(self._way(ours, value) for ours in meaning.ours))
        if None in ways:
            return f"it is {' or '.join(meaning.ours)} in the configuration of a run, and nothing to troupe {self.name}"
        return f"it is {' or '.join(filter(None, ways))} here{f' ({note})' if note else ''}"

    def _way(self, ours: str, value: str) -> str | None:
        """How this command is told a key, or the option itself; None where it is not."""
        flags = {param.name: param.opts for param in self.params}
        for param, key in self._keys.items():
            if key == ours:
                return next(flag for flag in flags[param] if flag.startswith("--"))
        mine = {flag for opts in flags.values() for flag in opts}
        if ours.startswith("--"):
            return ours if ours in mine else None
        if "--set" not in mine or not self._admits(ours):
            return None
        return f"--set {_setting(ours, value)}"

    def _admits(self, key: str) -> bool:
        return self.name != "eval" or key.startswith("data.")


class Commands(click.Group):
    """A group that answers an unknown command with the nearest of its own, and lists them by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """First what begins or looks at something, then what speaks with a run that goes on."""
        others = [name for name in self.list_commands(ctx) if name not in _FIRST]
        for title, names in (("Commands", _FIRST), ("To keep a run alive, and to speak with one that is live", others)):
            room = formatter.width - 6 - max(map(len, self.commands))
            rows = [(name, self.commands[name].get_short_help_str(room)) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a hint."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchOption:
            raise
        except click.UsageError:
            name = args[0]
            meant = COMMANDS.get(normalized(name)) or close_to(normalized(name), self.list_commands(ctx))
            if name.endswith(".toml"):
                meant = f"train {name}"
            hint = f"it is troupe {meant} here" if meant else f"there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"No such command '{name}'; {hint}", ctx) from None


def _keys() -> list[str]:
    """Every key of a run's configuration; none where MLX, which the configuration needs, is not there."""
    try:
        from troupe.run.config import known_keys  # here, where a command has failed: others need no configuration
    except ImportError:
        return []
    return known_keys()


def _setting(key: str, value: str) -> str:
    """`KEY=VALUE` with a value that the key can have, written for a shell; one that it cannot have is left open."""
    from troupe.errors import ConfigError
    from troupe.run.config import load_config

    beside = ["adapter.kind=lora"] if key.startswith("adapter.") else []  # without which the section says nothing
    ways = [value, f'["{value}"]'] if value else []
    if key == "adapter.target_modules" and value.replace("_", "").replace(".", "").isalnum():
        ways.reverse()  # a name: as one text it would be an expression for the whole of a module's name
    for written in ways:
        with suppress(ConfigError):
            load_config(None, [*beside, f"{key}={written}"])
            return shlex.quote(f"{key}={written}")
    return f"{key}=VALUE"
