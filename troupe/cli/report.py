"""`troupe report`: one HTML page about a run."""

from collections.abc import Callable
from pathlib import Path

import click

from troupe.cli.commands import report_errors
from troupe.daemon.control.protocol import NobodyThereError, Reply, Request, ask
from troupe.errors import OutputError, TroupeError
from troupe.messages import GetStatus, Status
from troupe.records.layout import REPORT
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run
from troupe.runtime.files import drafted
from troupe.runtime.terminal import tell

_ANSWER_S = 5.0
"""For how long a live run is asked what it does."""


@click.command(short_help="Write an HTML page about a run.")
@click.argument("folder", metavar="OUT_DIR", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.html", help="The page.  [default: OUT_DIR/report.html]"
)
@click.option("--png", is_flag=True, help="Write the charts as pictures, too, into a folder beside the page.")
@report_errors
def report(folder: Path, *, out: Path | None, png: bool) -> None:
    """Write one HTML page about the run in OUT_DIR, also while it goes on or after a crash.

    The page needs no network and no other file: it can be sent to somebody.
    """
    page = folder / REPORT if out is None else out
    if page.suffix not in (".html", ".htm"):
        raise OutputError(f"{page}: the page is HTML; give a name that ends in .html")
    if png:
        from troupe.records.report.images import require_matplotlib

        require_matplotlib()
    status, notes = ask_status(folder)
    run = read_run(folder, status, notes)
    write_page(page, report_page(run))
    tell(f"{page}")
    if png:
        from troupe.records.report.images import write_pictures

        for path in write_pictures(run, page.with_suffix("")):
            tell(f"{path}")


def ask_status(folder: Path, ask: Callable[[Path, Request, float], Reply] = ask) -> tuple[Status | None, list[str]]:
    """What the run in a folder says of itself, and what is to be noted where it gives no answer."""
    try:
        reply = ask(folder, GetStatus(), _ANSWER_S)
    except NobodyThereError:
        return None, []
    except TroupeError as error:
        return None, [str(error)]
    return reply if isinstance(reply, Status) else None, []


def write_page(path: Path, page: str) -> None:
    """Put the page there, whole or not at all. OutputError where it cannot be written."""
    try:
        with drafted(path) as draft:
            draft.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}; name another file (--out FILE.html)") from None
