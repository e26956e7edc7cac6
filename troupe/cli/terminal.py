"""How every command ends: its errors as exit codes and messages. Quick to import."""

from __future__ import annotations

import functools
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import click

from troupe.errors import InputError, TroupeError
from troupe.runtime.terminal import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, tell

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
