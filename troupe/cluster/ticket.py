"""The join file: what a worker needs to find a run, to know it, and to be known by it.

It holds a key, so only its owner may read it (mode 0600), here and where it is copied to.
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

import msgspec
import tomli_w

from troupe.cluster.bus import HUB
from troupe.errors import ConfigError
from troupe.runtime.files import drafted, expanded, read_toml

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
"""A worker's."""
RUN: Final = re.compile(r"[a-z0-9]{1,32}")
_RESERVED = {HUB, "server", "users"}
_SEED: Final = re.compile(r"SU[A-Z2-7]{56}")
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_CERTIFICATE = "-----BEGIN CERTIFICATE-----"
_MAX_BYTES = 64 * 1024


class Ticket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in a join file. Its seed is never shown."""

    run: str
    """The run's id: what all its subjects begin with."""
    name: str
    """The worker's name; one worker at a time may use it."""
    addresses: tuple[str, ...]
    """HOST:PORT of the run's server, as it may be reached from elsewhere; tried in this order."""
    ca: str
    """The certificate, in PEM, of whoever signed the server's."""
    seed: str
    """Of the worker's NKey."""

    def __repr__(self) -> str:
        return f"Ticket(run={self.run!r}, name={self.name!r}, addresses={self.addresses!r})"


def check_name(name: str) -> None:
    """ConfigError where a worker may not be called this."""
    if not NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"{name!r} is no name for a worker: up to 32 of a-z, 0-9, - and _, beginning with a letter or digit, and "
            f"not {', '.join(sorted(_RESERVED))}"
        )


def write_ticket(path: Path, ticket: Ticket) -> None:
    """Write a join file, whole, that only its owner may read."""
    write_secret(path, tomli_w.dumps(msgspec.to_builtins(ticket), multiline_strings=True).encode())


def write_secret(path: Path, data: bytes) -> None:
    """Write a file, whole, of mode 0600 from its first byte on."""
    with drafted(path) as draft:
        draft.unlink(missing_ok=True)  # one that a killed writer left may be another's to read
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(data)


def read_ticket(path: str | Path) -> Ticket:
    """The ticket in a join file. ConfigError: it is not there, others may read it, or a key of it cannot be used."""
    path = expanded(path)
    check_private(path)
    table = read_toml(path)
    try:
        ticket = msgspec.convert(table, Ticket)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: this is no join file of a run: {error}") from None
    for key, good in {
        "run": bool(RUN.fullmatch(ticket.run)),
        "name": bool(NAME.fullmatch(ticket.name)),
        "addresses": bool(ticket.addresses) and all(map(_is_address, ticket.addresses)),
        "ca": _CERTIFICATE in ticket.ca,
        "seed": bool(_SEED.fullmatch(ticket.seed)),
    }.items():
        if not good:
            raise ConfigError(
                f"{path}: `{key}` is not as a run writes it; copy the file anew, or make one: "
                "troupe cluster invite OUT NAME"
            )
    return ticket


def check_private(path: Path) -> None:
    """ConfigError where a file with a key is missing, too large, or may be read by others than its owner."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such join file; a run writes it: OUT/join/NAME.toml") from None
    except OSError as error:
        raise ConfigError(f"{path}: the join file cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: this is no join file of a run")
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path}: the file holds a key, and may be read by others than its owner (mode "
            f"{stat.S_IMODE(found.st_mode):04o}, owner {found.st_uid}); chmod 600 it, and where others may have read "
            "it, make a new one: troupe cluster revoke OUT NAME, then invite"
        )


def _is_address(text: str) -> bool:
    return bool(_ADDRESS.fullmatch(text)) and 0 < int(text.rpartition(":")[2]) < 65536
