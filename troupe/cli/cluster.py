"""`troupe cluster`: who may work for a run from another machine. Quick to import, and without MLX."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import click

from troupe.cli.commands import Command, report_errors
from troupe.cluster.server import APPLIED
from troupe.cluster.users import JOIN, SERVER, User, Users
from troupe.daemon.control.protocol import NobodyThereError, ask
from troupe.errors import RunError
from troupe.messages import GetStatus, MemberStatus, Status
from troupe.records.members import told
from troupe.runtime.lock import read_owner
from troupe.runtime.terminal import tell

_FOLLOWS_S = 10.0
"""That the server of a run may take to go by another list of users."""
_LOOK_S = 0.05
_ANSWER_S = 6.0
_out = click.argument("folder", metavar="OUT_DIR", type=click.Path(path_type=Path))
_name = click.argument("name", metavar="NAME")


@click.group(short_help="Say who may work for a run from another machine.")
def cluster() -> None:
    """Say who may work for a run from another machine: invite workers, revoke them, list them.

    The run need not be live, but must have been served once, with troupe train ... --serve HOST:PORT.
    """


@cluster.command(cls=Command, short_help="Write a join file for a worker.")
@_out
@_name
@report_errors
def invite(folder: Path, name: str) -> None:
    """Let a worker called NAME work for the run in OUT_DIR: writes OUT_DIR/join/NAME.toml, to be copied to its machine.

    The file holds a key: whoever has it can take part in the run. One worker at a time uses it.
    """
    users = Users(folder / JOIN)
    file = users.invite(name)
    tell(f"{file}: copy it to the worker's machine, where only you may read it (mode 0600), and there:")
    tell(f"  troupe worker --join {shlex.quote(file.name)}")
    _follow(folder, users, "the run lets it in")


@cluster.command(cls=Command, short_help="Take a worker's key away.")
@_out
@_name
@report_errors
def revoke(folder: Path, name: str) -> None:
    """Take the key of worker NAME from the run in OUT_DIR: the worker is cut off, and its join file is worth nothing.

    What it has been given to do goes to others.
    """
    users = Users(folder / JOIN)
    users.revoke(name)
    _follow(folder, users, f"{name} is cut off")


@cluster.command(name="list", cls=Command, short_help="List the workers, and what they are doing.")
@_out
@report_errors
def list_workers(folder: Path) -> None:
    """List the workers that may work for the run in OUT_DIR, and what they are doing where it is live."""
    known = Users(folder / JOIN).read()
    members = _members(folder)
    tell(f"run {known.run}, served at {', '.join(known.addresses)}" + ("" if members is not None else "; not live now"))
    for line in lines_of(known.users, members):
        tell(line)


def lines_of(users: Sequence[User], members: Sequence[MemberStatus] | None) -> list[str]:
    """A line for each worker; `members` None: the run is not live."""
    here = {member.name: member for member in members or () if member.kind == "worker"}
    width = max((len(user.name) for user in users), default=0)
    lines = []
    for user in users:
        member = here.get(user.name)
        state = told(member) if member is not None else "invited" if members is None else "not here"
        lines.append(f"{user.name:{width}}  {state}")
    return lines or ["nobody is invited; to invite: troupe cluster invite OUT_DIR NAME"]


def _follow(folder: Path, users: Users, then: str) -> None:
    """Wait until the server of a live run goes by the list, and tell."""
    owner, wanted = read_owner(folder), users.read().digest
    applied = folder / JOIN / SERVER / APPLIED
    if owner is None or not owner.is_alive or not applied.exists():
        tell("the run is not being served now; this counts from its next start")
        return
    until = time.monotonic() + _FOLLOWS_S
    while time.monotonic() < until:
        try:
            if applied.read_text(encoding="ascii") == wanted:
                tell(then)
                return
        except OSError:  # its server is being started again
            pass
        time.sleep(_LOOK_S)
    raise RunError(
        f"{folder}: the list of users is changed, but the run's server does not go by it yet; see "
        f"{folder / JOIN / SERVER / 'nats.log'}"
    )


def _members(folder: Path) -> Sequence[MemberStatus] | None:
    """Who works for the run now; None where it is not live or does not say."""
    try:
        found = ask(folder, GetStatus(), _ANSWER_S)
    except (NobodyThereError, RunError):
        return None
    return found.members if isinstance(found, Status) else None
