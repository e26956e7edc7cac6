"""What is printed for a person: nothing of it acts on a terminal, and no reader who goes away stops anything.

Names, completions, columns, errors and paths may hold anything: an ESC that clears the screen, a BEL, a carriage return
that hides what stood before it, a mark that turns a line around. Everything that Troupe prints for a person goes
through here; what programs read (JSON) through `safe_json`. Pages are HTML, and escape by themselves what HTML means.
"""

import os
import re
import shutil
import sys
import textwrap
import unicodedata

import click

EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 2, 3, 130
"""Exit codes of every command besides 0, done: bad input; a fault; interrupted, and can be resumed."""

_TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks that change the direction of what follows."""
_GAP = re.compile(r" *(\S+ )*\S+ {2,}(?=\S)|(?<!\S) +(?=\S)")
"""Before the text of a line that has a label, or goes on with one."""
_INDENT = 4
_IN_JSON = re.compile(f"[\x7f-\x9f{_TURNS}\u2028\u2029]")
"""What acts and may stand in JSON as it is: JSON itself escapes the others."""


def harmless(text: str) -> str:
    """The text with its lines and tabs; anything else that acts on a terminal, and a lone surrogate, as its escape."""
    if text.isprintable():
        return text
    return "".join(_escaped(char) if char not in "\n\t" and _acts(char) else char for char in text)


def one_line(text: str, encoding: str = "utf-8") -> str:
    """A text on one line: ends of lines as ⏎, and what acts on a terminal, has no width there, or is not in its
    encoding, as its escape."""
    if not text.isprintable():
        text = "".join("⏎" if char == "\n" else _escaped(char) if _is_unseen(char) else char for char in text)
    return text.encode(encoding, errors="backslashreplace").decode(encoding, errors="replace")


def can_write(text: str, encoding: str) -> bool:
    """Whether an encoding has every letter of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def arrows(text: str, encoding: str) -> str:
    """The text, with -> for → where an encoding lacks that."""
    return text if can_write("→", encoding) else text.replace("→", "->")


def safe_json(text: str) -> str:
    """JSON that means the same, and in which nothing acts."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def tell_rows(text: str) -> None:
    """Print lines of a label and what it says; on a terminal where one is too long, its rest stands below its text."""
    tell(narrowed(text, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text)


def narrowed(text: str, width: int) -> str:
    """Lines of at most `width` letters, as far as their words allow; what goes on is as far to the right as the text
    behind the first gap of two spaces."""
    lines = []
    for line in text.split("\n"):
        gap = _GAP.match(line)
        indent = len(gap[0]) if gap is not None else 0
        indent = indent if 0 < indent <= width // 2 else _INDENT
        wrapped = textwrap.wrap(
            line, max(width, 2 * _INDENT), subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
        )  # fmt: skip
        lines += wrapped if len(line) > width else [line]
    return "\n".join(lines)


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


def _acts(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _TURNS


def _is_unseen(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
