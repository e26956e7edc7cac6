"""The run's message server: a nats-server of its own, started again when it dies, that ends with the run.

Everything of it lies in `OUT/join/server` (mode 0700). It listens at one address, speaks TLS 1.3 from the first byte,
knows the users of `OUT/join/users.toml` and nobody else, has no port for monitoring, and stores in memory only. A
thread watches it, and that file: whoever is invited may join, and whoever is revoked is cut off, within a second.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from troupe.cluster import keeper
from troupe.cluster.addresses import ANYWHERE, Place, reachable
from troupe.cluster.binary import find_server
from troupe.cluster.bus import HUB
from troupe.cluster.keys import certify, client_context, new_seed, public_key, server_name
from troupe.cluster.knocks import Knocks
from troupe.cluster.server_settings import LOG, LOG_BYTES, server_settings
from troupe.cluster.ticket import Ticket, write_secret
from troupe.cluster.users import FIRST, SERVER, User, UserList, Users
from troupe.errors import ConfigError, InputError
from troupe.runtime.backoff import backoff_s

APPLIED = "applied"
"""In the server's folder while it runs: the digest of the users that it goes by."""
_LOOK_S = 0.25
_START_S = 20.0
_END_S, _DEATH_S = 3.0, 0.5
_RELOAD_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_RELOADED, _NOT_RELOADED = "Reloaded server configuration", "Failed to reload"
_LOG_LINE = re.compile(r"^\[\d+\] [\d/]+ [\d:.]+ (\[\w+\]) ")


class MessageServer:
    """The server of one run. Made by `serving`."""

    def __init__(
        self, folder: Path, place: Place, store_bytes: int, tell: Callable[[str], None], revoked: Callable[[str], None]
    ) -> None:
        self.users = Users.open(folder)
        self._known = self.users.read()
        self.run = self._known.run
        """The run's id."""
        self._program = find_server()
        self._place = place
        self._store_bytes = store_bytes
        self._tell, self._revoked = tell, revoked
        self._folder = folder / SERVER
        self._seed = new_seed()
        self._ca = certify(self._folder, self.run)
        self._tls = client_context(self._ca)
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="troupe-message-server", daemon=True)
        self._applied = self._complained = ""
        self._served: tuple[User, ...] = ()
        self.starts = 0
        """How often it was started."""

    @property
    def pids(self) -> list[int]:
        """Of the processes: the keeper, and the server where the system tells it."""
        process = self._process
        if process is None:
            return []
        with suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
            return [process.pid, *map(int, children.split())]
        return [process.pid]

    @property
    def addresses(self) -> tuple[str, ...]:
        """HOST:PORT at which it is to be reached."""
        return reachable(self._place)

    @property
    def ticket(self) -> Ticket:
        """The hub's own, for `connect`; its key is new at every start of a run, and on no disk."""
        host = f"[{self._place.near}]" if ":" in self._place.near else self._place.near
        address = f"{host}:{self._place.port}"
        return Ticket(run=self.run, name=HUB, addresses=(address,), ca=self._ca, seed=self._seed)

    def start(self) -> None:
        """Start it and the thread that watches it; returns when it answers. InputError where it cannot be."""
        before = self.users.read().addresses
        self._place = self._place.settled(before)
        self.users.serve_at(self.addresses)
        if not before:
            self.users.invite(FIRST)
        try:
            self._launch(self.users.read())
        except _NotThereError as error:
            self._kill()
            raise InputError(f"the message server does not start at {self._place}: {error}") from None
        self._thread.start()

    def stop(self) -> None:
        """End it; nothing of it is left running. Safe to call twice."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(_START_S)
        self._kill()

    def _launch(self, known: UserList) -> None:
        """Start the process by the users as they are now, and wait until it answers."""
        self._known = known
        self._configure(known)
        read_end, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(read_end), self._program, "-c", self._config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(read_end,),
                env={key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ},
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        self.starts += 1
        until = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None:
                raise _NotThereError(f"it ended at once: {self._last_line()}")
            if time.monotonic() > until or self._ending.is_set():
                raise _NotThereError(f"it does not answer: {self._last_line()}")
            time.sleep(0.02)
        self._note(known)

    def _kill(self) -> None:
        """End the process, with its keeper, however they are."""
        (self._folder / APPLIED).unlink(missing_ok=True)
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)
            _end_group(process)
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _watch(self) -> None:
        """Start it again when it has died; have it follow the list of users."""
        failures, knocks = 0, Knocks(self._log, self._tell)
        while not self._ending.wait(_LOOK_S):
            try:
                known = self.users.read()
                self._known = known
            except (ConfigError, OSError) as error:
                known = self._known
                self._complain(f"the list of users cannot be read, the last one holds: {error}")
            try:
                if self._process is None or self._process.poll() is not None:
                    failures = self._again(known, failures)
                    continue
                if known.digest != self._applied:
                    self._reload(known)
                knocks.look(known)
            except OSError as error:  # of the disk
                self._complain(f"the message server is not looked after: {error}")

    def _again(self, known: UserList, failures: int) -> int:
        """One attempt to start it anew → how many failed in a row."""
        if not failures:
            self._tell(f"the message server has ended; it is started again ({self._last_line()})")
        self._kill()
        if failures and self._ending.wait(backoff_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)):
            return failures + 1
        try:
            self._launch(known)
        except (_NotThereError, OSError) as error:
            self._complain(f"the message server does not start: {error}")
            self._kill()
            return failures + 1
        return 0

    def _reload(self, known: UserList) -> None:
        """Have it go by other users. Where it does not, it is ended, and started with them: a key that was revoked must
        not stay good."""
        self._configure(known)
        process, size = self._process, self._log_size()
        assert process is not None
        process.send_signal(signal.SIGHUP)
        until = time.monotonic() + _RELOAD_S
        while time.monotonic() < until and process.poll() is None:
            said = self._log_since(size)
            if _RELOADED in said:
                self._note(known)
                return
            if _NOT_RELOADED in said:
                break
            time.sleep(0.02)
        self._tell("the message server does not take other users while it runs; it is started again")
        self._kill()

    def _complain(self, text: str) -> None:
        """Tell it, once."""
        if text != self._complained:
            self._complained = text
            self._tell(text)

    def _note(self, known: UserList) -> None:
        """The server goes by these users now."""
        gone, self._served = set(self._served) - set(known.users), known.users
        self._applied = known.digest
        write_secret(self._folder / APPLIED, known.digest.encode())
        for user in gone:
            self._revoked(user.name)

    def _answers(self) -> bool:
        """Whether the server speaks as it should; only one with this run's certificate does."""
        try:
            plain = socket.create_connection((self._place.near, self._place.port), timeout=2.0)
            with plain, self._tls.wrap_socket(plain, server_hostname=server_name(self.run)) as wrapped:
                return wrapped.recv(5) == b"INFO "
        except (OSError, ssl.SSLError):
            return False

    @property
    def _config(self) -> str:
        return str(self._folder / "nats.conf")

    @property
    def _log(self) -> Path:
        return self._folder / LOG

    def _configure(self, known: UserList) -> None:
        settings = server_settings(known, public_key(self._seed), self._place, self._folder, self._store_bytes)
        write_secret(Path(self._config), json.dumps(settings, indent=1).encode())

    def _log_size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def _log_since(self, size: int) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(size if size <= self._log_size() else 0)
                return file.read(LOG_BYTES).decode(errors="replace")
        except OSError:
            return ""

    def _last_line(self) -> str:
        """What the server wrote last, for a message."""
        lines = self._log_since(max(self._log_size() - 2000, 0)).splitlines()
        return _LOG_LINE.sub(r"\1 ", lines[-1])[:200] if lines else "it wrote nothing"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and its children, and wait until nothing is."""
    until = time.monotonic() + _DEATH_S
    with suppress(ProcessLookupError, PermissionError):  # a Mac refuses where only the dead are left
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.005)
    process.wait()


class _NotThereError(Exception):
    """The server did not come up."""


def parse_place(text: str) -> Place:
    """HOST:PORT as `--serve` takes it; port 0: one that is free. ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise ConfigError(
            f"--serve: {text!r} is no HOST:PORT; this machine's own: 127.0.0.1:0, all of its addresses: "
            f"{ANYWHERE[0]}:4222"
        )
    return Place(host, int(port))


@contextmanager
def serving(
    folder: Path,
    serve: str,
    *,
    store_bytes: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
    revoked: Callable[[str], None] = lambda name: None,
) -> Iterator[MessageServer]:
    """The message server of a run, from the beginning to the end of the block; `folder`: the run's `join`.

    `store_bytes`: how much of weights it may hold, half of this machine's memory where not given. `tell` hears, in
    another thread, of what befalls it, `revoked` the name of a worker whose key is good no more.
    Blocks for a moment. InputError: no program, no packages, no such address.
    """
    if store_bytes is None:
        store_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    place = parse_place(serve)
    server = MessageServer(folder, place, store_bytes, tell, revoked)
    try:
        server.start()
        yield server
    finally:
        server.stop()
