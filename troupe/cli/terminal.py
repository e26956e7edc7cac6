"""How every command speaks to its terminal, and what its exit code means. Knows no command; quick to import.

Exit codes: 0 done, 2 bad input, 3 fault, 130 interrupted and resumable.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import click

from troupe.errors import InputError, TroupeError
from troupe.runtime.escapes import harmless, safe_json

EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 2, 3, 130

P = ParamSpec("P")


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


def tell_json(text: str) -> None:
    """Print JSON for a program, in which nothing acts on a terminal either."""
    tell(safe_json(text), as_it_is=True)


def tell(text: str, *, error: bool = False, newline: bool = True, as_it_is: bool = False) -> None:
    """Print a line, or the beginning of one. What would act on a terminal is told as an escape, unless `as_it_is`.

    A reader who has gone (`troupe … | head`, a terminal that was closed) changes nothing about what the command has
    done.
    """
    try:
        click.echo(text if as_it_is else harmless(text), nl=newline, err=error)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if error else sys.stdout).fileno())  # so that the flush at exit succeeds
        os.close(nowhere)
