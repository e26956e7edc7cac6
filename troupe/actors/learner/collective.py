"""Ranks that give each other arrays through `mx.distributed`: over NCCL between cards of one host, over its ring of
loopback sockets between processes on a processor.

What waits in a collective cannot be called back: `waiting_since_s` tells how long it has, for whoever watches.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import mlx.core as mx
import msgspec

from troupe.errors import RunError

LOOPBACK = "127.0.0.1"
_TOLD_WITHIN_S = 1.0
Backend = Literal["ring", "nccl"]


class Meeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the ranks of one run find each other."""

    backend: Backend
    ports: tuple[int, ...]
    """On the loopback address: with the ring one a rank, with NCCL that of rank 0."""
    size: int


def arrange(backend: Backend, size: int) -> Meeting:
    """A meeting at ports that are free now."""
    sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(size if backend == "ring" else 1)]
    ports = tuple(each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return Meeting(backend=backend, ports=ports, size=size)


class MlxRanks:
    """This process in a group of `mx.distributed`, of which a process can have one in its life."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        """To be joined on the thread that learns."""
        self.rank, self.size = rank, meeting.size
        self.waiting_since_s: float | None = None
        """On `time.perf_counter`, since when this rank has waited for the others; None: it does not."""
        self._why_broken, self._is_broken = "", threading.Event()
        self._meeting = meeting
        self._group: mx.distributed.Group

    def join(self) -> None:
        """Wait for the other ranks. RunError where they do not come together."""
        if _joined:
            raise RunError(
                "this process has learned with several ranks before, and MLX joins them once in the life of a "
                "process; make the run in a new one"
            )
        _joined.append(self._meeting)
        with self._waits(), _environment(self._meeting, self.rank):
            self._group = mx.distributed.init(strict=True, backend=self._meeting.backend)
            mx.eval(mx.distributed.all_gather(mx.zeros(1), group=self._group))
        if (self._group.rank(), self._group.size()) != (self.rank, self.size):
            raise RunError(f"rank {self.rank} of {self.size} is {self._group.rank()} of {self._group.size()} to MLX")

    def gather(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """Every rank's arrays, all of one dtype, in one piece. RunError where a rank is gone."""
        flat = mx.concatenate([array.reshape(-1) for array in arrays])
        edges = [0, *accumulate(array.size for array in arrays)]
        with self._waits():
            lines = mx.distributed.all_gather(flat, group=self._group).reshape(self.size, -1)
            mx.eval(lines)
        cut = list(zip(arrays, pairwise(edges), strict=True))
        return [[line[start:stop].reshape(array.shape) for array, (start, stop) in cut] for line in lines]

    @property
    def broken(self) -> str | None:
        """Why no collective can be had any more."""
        return self._why_broken if self._is_broken.is_set() else None

    def break_up(self, why: str) -> None:
        """No collective can be had any more. May be called in any thread."""
        self._why_broken = why
        self._is_broken.set()

    @contextmanager
    def _waits(self) -> Iterator[None]:
        if self.broken is not None:
            raise RunError(self.broken)
        self.waiting_since_s = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise RunError(self._why(error)) from None
        finally:
            self.waiting_since_s = None

    def _why(self, error: RuntimeError) -> str:
        """What became of the others, which whoever watches them may be about to say."""
        self._is_broken.wait(_TOLD_WITHIN_S)
        return self.broken or f"the learner's ranks lost each other: {error}"


_joined: list[Meeting] = []


@contextmanager
def _environment(meeting: Meeting, rank: int) -> Iterator[None]:
    """What MLX reads of the environment, for as long as it does."""
    with tempfile.TemporaryDirectory(prefix="troupe-ranks-") as folder:
        said = {"MLX_RANK": str(rank)}
        if meeting.backend == "ring":
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in meeting.ports]))
            said["MLX_HOSTFILE"] = str(hosts)
        else:
            said |= {"MLX_WORLD_SIZE": str(meeting.size)}
            said |= {"NCCL_HOST_IP": LOOPBACK, "NCCL_PORT": str(meeting.ports[0])}
            if "NCCL_SOCKET_IFNAME" not in os.environ:
                said["NCCL_SOCKET_IFNAME"] = "lo"  # cards of one host: nothing needs to listen outside
        with _said(said):
            yield


@contextmanager
def _said(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
