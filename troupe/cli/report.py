"""`troupe report`: one HTML page about a run, or about several."""

from collections.abc import Callable
from pathlib import Path

import click

from troupe.cli.commands import report_errors
from troupe.daemon.control.protocol import NobodyThereError, Reply, Request, ask
from troupe.errors import InputError, OutputError, TroupeError
from troupe.messages import GetStatus, Status
from troupe.records.browse import part_in
from troupe.records.compare.listing import runs_meant
from troupe.records.compare.page import compare_page
from troupe.records.compare.runs import read_runs
from troupe.records.layout import COMPARED, REPORT
from troupe.records.report.page import report_page
from troupe.records.report.picture import read_run
from troupe.runtime.files import drafted
from troupe.runtime.terminal import tell

_ANSWER_S = 5.0
"""For how long a live run is asked what it does."""


@click.command(short_help="Write an HTML page about a run, or several.")
@click.argument("folders", metavar="OUT_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help=f"The page.  [default: OUT_DIR/{REPORT}; of several runs, {COMPARED} here]",
)
@click.option("--png", is_flag=True, help="Write the charts of a run as pictures, too, into a folder beside the page.")
@report_errors
def report(folders: tuple[Path, ...], *, out: Path | None, png: bool) -> None:
    """Write one HTML page about the run in OUT_DIR, also while it goes on or after a crash.

    Of several runs, or of a folder that several lie in, the page has their curves over each other, the settings that
    differ, and what they answered to the same prompts. It needs no network and no other file, so it can be sent to
    somebody.
    """
    runs = runs_meant(folders)
    page = out or (runs[0] / REPORT if len(runs) == 1 else Path(COMPARED))
    if page.suffix not in (".html", ".htm"):
        raise OutputError(f"{page}: the page is HTML; give a name that ends in .html")
    if len(runs) > 1:
        if png:
            raise InputError("--png: pictures are made of one run; the page of several saves each chart as one itself")
        write_page(page, compare_page(read_runs(runs, ask_status)))
        tell(f"{page}")
        return
    if png:
        from troupe.records.report.images import require_matplotlib

        require_matplotlib()
    status, notes = ask_status(runs[0])
    run = read_run(runs[0], status, notes)
    write_page(page, report_page(run, part_in(runs[0])))
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
