"""Where a server listens, and where others may reach it."""

import socket
from contextlib import suppress
from typing import NamedTuple

from troupe.errors import ConfigError

ANYWHERE = ("0.0.0.0", "::")
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Addresses that nobody has: the way to them starts at an address of ours."""


class Place(NamedTuple):
    """HOST and PORT to listen at."""

    host: str
    port: int

    def __str__(self) -> str:
        return _joined(self.host, self.port)

    @property
    def near(self) -> str:
        """The host by which this machine itself reaches it."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def settled(self, before: tuple[str, ...]) -> "Place":
        """The same with a port, where it has none: that of `before` if it is free, so that workers find the run again,
        else any. ConfigError where nobody can listen there."""
        if self.port:
            return Place(self.host, _free(self.host, self.port))
        for port in dict.fromkeys(int(address.rpartition(":")[2]) for address in before):
            with suppress(ConfigError):
                return Place(self.host, _free(self.host, port))
        return Place(self.host, _free(self.host, 0))


def reachable(place: Place) -> tuple[str, ...]:
    """HOST:PORT for other machines, the likeliest first; where all addresses are listened at, this machine's last."""
    if place.host not in ANYWHERE:
        return (str(place),)
    hosts = []
    for family, address in _ELSEWHERE:
        if place.host == "::" or family == socket.AF_INET:
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing
                hosts.append(str(probe.getsockname()[0]))
    name = socket.gethostname()
    with suppress(OSError):
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        hosts += [str(entry[4][0]) for entry in found if place.host == "::" or entry[0] == socket.AF_INET]
    outside = [host for host in hosts if not host.startswith("127.") and host != "::1" and "%" not in host]
    return tuple(_joined(host, place.port) for host in dict.fromkeys([*outside, name, place.near]))


def _free(host: str, port: int) -> int:
    """The port, or one that is free for 0. ConfigError where it cannot be listened at."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"--serve {_joined(host, port)}: nobody can listen there ({error.strerror or error}); take an address of "
            "this machine, and a port that is free (0: any)"
        ) from None


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
