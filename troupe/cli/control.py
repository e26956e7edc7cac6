"""The commands that speak with a run: `daemon`, `status`, `pause` and the like. Quick to import, and without MLX.

Exit codes: 0 done, 2 bad input or nobody there, 3 refused or a fault.
"""

import os
import select
import shlex
import signal
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import anyio
import click
import msgspec

from troupe.cli.commands import Command, Number, fail, report_errors
from troupe.cli.status import describe, describe_past, read_past, row
from troupe.daemon.control.place import read_address
from troupe.daemon.control.protocol import NobodyThereError, Reply, Request, ask, encode_line
from troupe.daemon.main import keep_alive
from troupe.daemon.orders import Order
from troupe.daemon.units import launchd, systemd
from troupe.errors import ConfigError, InputError, RunError
from troupe.messages import (
    Checkpoint,
    Drain,
    Finding,
    GetStatus,
    Pause,
    Refused,
    Resume,
    Set,
    Status,
    Step,
    Stop,
)
from troupe.records.diagnosis import in_full
from troupe.records.diagnosis.past import diagnose
from troupe.records.layout import METRICS
from troupe.records.standing import describe_standing, read_standing, silence_of
from troupe.run.tables import anchored_reward, parse_setting
from troupe.runtime.lock import read_owner
from troupe.runtime.machine import unusable_backend
from troupe.runtime.terminal import EXIT_FAULT, tell, tell_json, tell_rows

_ANSWER_S, _HOPE_S, _DEATH_S = 15.0, 6.0, 10.0  # a daemon answers for its trainer after 5 s
_LOADING_S = 90.0  # of a reward, before there is an answer
_FOLDER = click.Path(path_type=Path)
_out = click.argument("folder", metavar="OUT_DIR", type=_FOLDER)


@click.group()
def control() -> None:
    """Speak with a run."""


@control.command(cls=Command, keys={"output": "output", "page": "daemon.page", "serve": "cluster.serve"})
@click.argument("run_toml", metavar="RUN.toml|OUT_DIR", type=_FOLDER)
@click.option("-o", "--output", metavar="OUT_DIR", help="Run folder; default: output in RUN.toml, or OUT_DIR.")
@click.option("--set", "settings", multiple=True, metavar="section.key=value", help="Any config key; may be repeated.")
@click.option(
    "--allow-change",
    "allow_changes",
    multiple=True,
    metavar="section.key",
    help="A key that may differ from the run that stands in OUT_DIR; may be repeated.",
)
@click.option(
    "--page",
    is_flag=False,
    flag_value="true",
    metavar="[PORT]",
    help="Serve a live page on 127.0.0.1, at this port or at one that is free.",
)
@click.option("--serve", metavar="HOST:PORT", help="Let workers join, at this address of this machine.")
@click.option(
    "--print-unit", type=click.Choice(["systemd", "launchd"]), help="Print a unit file for this run; start nothing."
)
@report_errors
def daemon(
    run_toml: Path,
    output: str | None,
    settings: tuple[str, ...],
    allow_changes: tuple[str, ...],
    page: str | None,
    serve: str | None,
    print_unit: str | None,
) -> None:
    """Train in the foreground, and go on by itself whatever happens.

    A run that stands in OUT_DIR is gone on with; to name OUT_DIR in place of RUN.toml is enough for that. A run that
    fails is started again from its newest checkpoint. SIGTERM finishes the steps begun, saves and ends; SIGHUP reads
    RUN.toml again.
    """
    if page is not None:
        settings = (*settings, f"daemon.page={_port(page)}")
    if serve is not None:
        settings = (*settings, f"cluster.serve={serve}")
    order = Order.given(run_toml, output, settings, allow_changes)
    if print_unit is not None:
        tell({"systemd": systemd, "launchd": launchd}[print_unit](order), newline=False)
        return
    if (unusable := unusable_backend()) is not None:  # the trainer's, which would only fail again and again
        raise InputError(unusable)
    sys.exit(anyio.run(keep_alive, order))


def _port(text: str) -> str:
    if text != "true" and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ConfigError(f"--page {text}: give a port from 1 to 65535, or nothing after it for one that is free")
    return text


@control.command()
@_out
@click.option("--watch", is_flag=True, help="Show it again and again, until the run has ended.")
@click.option(
    "--interval", type=Number(min=0.1, max=86_400), default=1.0, show_default=True, help="Seconds, with --watch."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a time, on a line of its own.")
@report_errors
def status(folder: Path, watch: bool, interval: float, as_json: bool) -> None:
    """Tell what the run in OUT_DIR is doing, or what became of it."""
    past = _Past(folder)
    while True:  # each time anew: a client that is silent for long is dropped
        try:
            _show(ask(folder, GetStatus(), _patience_s(folder)), folder, as_json=as_json, clear=watch and not as_json)
            goes_on = True
        except (NobodyThereError, RunError) as error:
            if isinstance(error, RunError) and silence_of(folder) is None:
                raise
            found = read_standing(folder)
            goes_on = found.fate == "silent"
            if as_json:
                tell_json(msgspec.json.encode(found).decode())
            else:
                tell_rows("\n".join([f"{folder}: {describe_standing(found)}", *describe_past(read_past(folder))]))
                for line in past.findings():
                    tell_rows(line)
        if not watch or not goes_on:
            return
        time.sleep(interval)


def _patience_s(folder: Path, usual_s: float = _ANSWER_S) -> float:
    """Of a run whose guardian says that it does not answer not much is expected."""
    return usual_s if silence_of(folder) is None else _HOPE_S


def _show(found: Reply, folder: Path, *, as_json: bool, clear: bool) -> None:
    if not isinstance(found, Status):
        raise RunError(f"{folder}: {found.message}")
    if as_json:
        tell_json(encode_line(found).decode().rstrip("\n"))
        return
    if clear:
        click.clear()  # on a terminal
    tell_rows(describe(found, str(folder), read_past(folder)))
    if (address := read_address(folder)) is not None:
        tell(row("live page", address))


class _Past:
    """What the steps of a run that does not answer say is wrong with it: seconds of a long run, so that they are read
    again only where there are more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: tuple[int, int] | None = None
        self._findings: tuple[Finding, ...] = ()

    def findings(self) -> list[str]:
        """A line for each that holds, as far as the steps can be read."""
        with suppress(InputError, OSError):
            there = (self._folder / METRICS).stat()
            if self._read != (written := (there.st_size, there.st_mtime_ns)):
                self._findings, self._read = diagnose(self._folder), written
        return [row("diagnosis", in_full(finding)) for finding in self._findings if finding.until is None]


def _add_request(name: str, request: Request, text: str) -> None:
    """A command that sends one request."""

    @control.command(name, help=text)
    @_out
    @report_errors
    def command(folder: Path) -> None:
        _request(folder, request)


_add_request("pause", Pause(), "Begin no further step until told to resume.")
_add_request("resume", Resume(), "Go on after a pause.")
_add_request("checkpoint", Checkpoint(), "Write a checkpoint at the end of the step in hand.")
_add_request("drain", Drain(), "End the run after the steps already begun.")


@control.command()
@_out
@click.option("-n", "--steps", type=click.IntRange(min=1), default=1, show_default=True, help="Steps to begin.")
@report_errors
def step(folder: Path, steps: int) -> None:
    """Begin one more step of a paused run, or several."""
    _request(folder, Step(steps=steps))


@control.command()
@_out
@click.option("--kill", is_flag=True, help="Where the run does not answer, end it without saving.")
@report_errors
def stop(folder: Path, kill: bool) -> None:
    """End the run now, with a checkpoint of the last completed step."""
    try:
        _request(folder, Stop())
    except (NobodyThereError, RunError):
        if not kill or not _kill(folder):
            raise
    else:
        if kill and silence_of(folder) is not None:  # its daemon has answered
            _kill(folder)


def _kill(folder: Path) -> bool:
    """Kill the trainer of the run in a folder → whether one was there that did not answer."""
    owner, silence = read_owner(folder), silence_of(folder)
    if owner is None or silence is None or owner.pid != silence.pid or not owner.is_alive:
        return False
    if not _ended_within(owner.pid, _DEATH_S) and owner.is_alive:
        raise RunError(f"process {owner.pid} was sent SIGKILL, {silence}, but has not ended after {_DEATH_S:g} s")
    tell(f"process {owner.pid} was killed, {silence}; the newest checkpoint stays")
    return True


def _ended_within(pid: int, timeout_s: float) -> bool:
    """Kill a process that need not be a child of this one → whether it ended in time."""
    try:
        if sys.platform == "linux":
            process = os.pidfd_open(pid)
            try:
                os.kill(pid, signal.SIGKILL)
                return bool(select.select([process], [], [], timeout_s)[0])
            finally:
                os.close(process)
        else:
            with closing(select.kqueue()) as queue:
                end = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
                queue.control([end], 0)
                os.kill(pid, signal.SIGKILL)
                return bool(queue.control(None, 1, timeout_s))
    except ProcessLookupError:  # by itself, in this moment
        return True


@control.command(name="set", short_help="Set what may change while the run goes on.")
@_out
@click.argument("setting", metavar="KEY=VALUE")
@report_errors
def set_command(folder: Path, setting: str) -> None:
    """Set what may change while the run goes on, such as learner.lr=1e-6 or log.level=debug."""
    key, value = parse_setting(setting)
    if key.startswith("rewards."):
        value = anchored_reward(value, Path.cwd())  # ours, not that of the process that has the run
    _request(folder, Set(key=key, value=value), _LOADING_S if key.startswith("rewards.") else _ANSWER_S)


def _request(folder: Path, request: Request, timeout_s: float = _ANSWER_S) -> None:
    try:
        reply = ask(folder, request, _patience_s(folder, timeout_s))
    except NobodyThereError as nobody:
        try:
            why = describe_standing(read_standing(folder))
        except InputError as error:  # it is no run's folder at all
            why = str(error).removeprefix(f"{folder}: ")
        raise InputError(f"{nobody}; {why}") from None
    except RunError:
        if (silence := silence_of(folder)) is None:
            raise
        raise RunError(
            f"{folder}: {silence}; the request is heeded when that is over. To end the run without saving: "
            f"troupe stop {shlex.quote(str(folder))} --kill"
        ) from None
    if isinstance(reply, Refused):
        fail(f"refused: {reply.message}", EXIT_FAULT)
    tell("done" if isinstance(reply, Status) or not reply.message else reply.message)
