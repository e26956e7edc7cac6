"""The users of a run's message server: names and public keys, in `OUT/join/users.toml`.

Who invites or revokes changes the file; the run that is live sees it and has the server follow.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import tomli_w

from troupe.cluster.keys import check_packages, new_seed, public_key
from troupe.cluster.ticket import RUN, Ticket, check_name, check_private, read_ticket, write_secret, write_ticket
from troupe.errors import ConfigError
from troupe.runtime.files import read_toml

JOIN = "join"
"""In the run folder; for its owner alone."""
SERVER = "server"
"""In `join`: what the message server needs."""
FIRST = "worker"
"""The name of the worker that is invited before anybody asks."""
USERS, CA = "users.toml", "ca.pem"


class User(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One who may join."""

    name: str
    key: str
    """The public one."""


class UserList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in `users.toml`."""

    run: str
    """The run's id, made at random when it is first served."""
    addresses: tuple[str, ...] = ()
    """At which the server was last to be reached."""
    users: tuple[User, ...] = ()

    @property
    def digest(self) -> str:
        """Of everything the server goes by."""
        return hashlib.sha256(msgspec.json.encode((self.run, self.users))).hexdigest()


class Users:
    """The users of one run, on disk. Every method reads the file anew; changes wait for each other."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the run's `join`. ConfigError where it is not there: the run was never served."""
        self.folder = folder
        check_packages()
        if not self._file.exists():
            raise ConfigError(
                f"{folder}: this run has not been served yet; start it with: troupe train … --serve HOST:PORT"
            )

    @classmethod
    def open(cls, folder: Path) -> "Users":
        """The same, made where it is not there."""
        check_packages()
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / SERVER).mkdir(mode=0o700, exist_ok=True)
        for each in (folder, folder / SERVER):
            each.chmod(0o700)
        with _locked(folder):
            if not (folder / USERS).exists():
                _write(folder / USERS, UserList(run="t" + secrets.token_hex(6)))
        return cls(folder)

    @property
    def _file(self) -> Path:
        return self.folder / USERS

    def read(self) -> UserList:
        """What the file says. ConfigError where that cannot be used."""
        check_private(self._file)
        try:
            found = msgspec.convert(read_toml(self._file), UserList)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self._file}: this is no list of users: {error}") from None
        if not RUN.fullmatch(found.run):
            raise ConfigError(f"{self._file}: `run` is not as a run writes it")
        for user in found.users:
            check_name(user.name)
            if not (user.key.startswith("U") and user.key.isalnum() and len(user.key) == 56):
                raise ConfigError(f"{self._file}: the `key` of {user.name} is no public key of an NKey")
        return found

    def ticket_file(self, name: str) -> Path:
        """Where the join file of a worker lies, or lay until somebody moved it."""
        return self.folder / f"{name}.toml"

    def invite(self, name: str) -> Path:
        """Let a worker of this name join → its join file. ConfigError where there is one of this name already, or
        nobody knows yet at which address the run is served."""
        check_name(name)
        with _locked(self.folder):
            known = self.read()
            if any(user.name == name for user in known.users):
                raise ConfigError(
                    f"{name!r} is invited already, by {self.ticket_file(name)}; where that file was lost or seen by "
                    f"others, revoke it first"
                )
            if not known.addresses:
                raise ConfigError(f"{self.folder}: the run has not been served yet, so its address is not known")
            ca = (self.folder / SERVER / CA).read_text(encoding="ascii")
            seed = new_seed()
            ticket = Ticket(run=known.run, name=name, addresses=known.addresses, ca=ca, seed=seed)
            write_ticket(self.ticket_file(name), ticket)
            user = User(name=name, key=public_key(seed))
            _write(self._file, msgspec.structs.replace(known, users=(*known.users, user)))
        return self.ticket_file(name)

    def revoke(self, name: str) -> None:
        """Take a worker's key from the list, and its join file from the folder. ConfigError where there is none."""
        with _locked(self.folder):
            known = self.read()
            rest = tuple(user for user in known.users if user.name != name)
            if rest == known.users:
                names = ", ".join(user.name for user in known.users) or "nobody"
                raise ConfigError(f"no worker {name!r} is invited to this run; invited: {names}")
            _write(self._file, msgspec.structs.replace(known, users=rest))
            self.ticket_file(name).unlink(missing_ok=True)

    def serve_at(self, addresses: tuple[str, ...]) -> None:
        """Note where the run is served from now on, also in the join files that still lie here."""
        with _locked(self.folder):
            known = self.read()
            if known.addresses == addresses:
                return
            for user in known.users:
                file = self.ticket_file(user.name)
                if file.exists():
                    write_ticket(file, msgspec.structs.replace(read_ticket(file), addresses=addresses))
            _write(self._file, msgspec.structs.replace(known, addresses=addresses))


def stream_of(run: str) -> str:
    """The name of the stream that holds what is stored for all workers."""
    return f"{run}-w"


def _write(file: Path, known: UserList) -> None:
    write_secret(file, tomli_w.dumps(msgspec.to_builtins(known)).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
