"""TensorBoard event files: scalars, histograms of rewards and lengths, and some completions as text.

The messages of the format are tensorboardX's; the file is written here, so that a disk that fails for a while costs
nothing.
"""

import re
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from troupe.messages import Evaluated, GroupClosed, Incident, Update
from troupe.records.sinks.base import RunInfo, package
from troupe.records.sinks.digest import Digest, Sample, StepDigest
from troupe.records.sinks.jsonl import AppendedFile

FOLDER = "tensorboard"
_BINS = 30
_NOT_IN_A_TAG = re.compile(r"[^-/\w.]")
_CRC_MASK = 0xA282EAD8


class TensorBoardSink:
    """Writes one event file a start into `folder`.

    A start begins with the mark by which TensorBoard knows that it goes on after `first_step`: what an earlier start
    told of later steps is left out of its curves.
    """

    name = "tensorboard"
    takes: tuple[type, ...] = (Update, GroupClosed, Evaluated)

    def __init__(
        self,
        folder: Path,
        run: RunInfo,
        *,
        completions: int = 4,
        completions_every: int = 10,
        clock: Callable[[], float] = time.time,
        make_file: Callable[[Path], AppendedFile] = AppendedFile,
    ) -> None:
        self.notes: deque[Incident] = deque()
        self._folder, self._run, self._clock, self._make_file = folder, run, clock, make_file
        self._digest = Digest(newest=run.first_step, samples=completions, every=completions_every)
        self._unpacked: deque[tuple[float, StepDigest]] = deque()
        self._file: AppendedFile | None = None
        self._opened = False
        self._events: Any = None
        self._summaries: Any = None
        self._crc: Any = None

    def open(self) -> None:
        self._events, self._summaries = package("tensorboard", "proto.event_pb2"), package("tensorboard", "summary")
        self._crc = package("tensorboard", "crc32c").crc32c
        self._opened = True
        self._open_file()

    def write(self, message: object) -> None:
        """Take a message; a step is written by the `flush` after its Update."""
        if isinstance(message, Evaluated):
            digest: StepDigest | None = StepDigest(step=message.version, metrics=dict(message.metrics))
        else:
            digest = self._digest.add(message)
        if digest is not None:
            self._unpacked.append((self._clock(), digest))

    def flush(self) -> None:
        if not self._opened:
            return
        file = self._file or self._open_file()
        while self._unpacked:  # taken out first: a step that cannot be packed must not stand before all others
            wall_s, digest = self._unpacked.popleft()
            self._add_step(file, digest, wall_s)
        file.flush()

    def settle(self) -> None:
        if self._file is not None:
            self._file.settle()

    def close(self) -> None:
        self._opened = False
        if self._file is not None:
            self._file.close()

    def _open_file(self) -> AppendedFile:
        self._folder.mkdir(parents=True, exist_ok=True)
        now_s = self._clock()
        file = self._make_file(self._folder / self._next_name(now_s))
        file.open()
        self._file = file
        self._add(file, now_s, file_version="brain.Event:2")
        self._add(
            file,
            now_s,
            step=self._run.first_step + 1,
            session_log=self._events.SessionLog(status=self._events.SessionLog.START),
        )
        if self._run.first_step == 0 and self._run.config:
            text = self._summaries.text("run.toml", _as_code(tomli_w.dumps(self._run.config)))
            self._add(file, now_s, step=0, summary=text)
        return file

    def _next_name(self, now_s: float) -> str:
        """Names sort as the starts came, whatever the clock did: that is the order in which they are read."""
        stamps = [int(path.name.split(".")[3]) for path in self._folder.glob("events.out.tfevents.*.troupe")]
        return f"events.out.tfevents.{max([int(now_s), *(stamp + 1 for stamp in stamps)]):010d}.troupe"

    def _add_step(self, file: AppendedFile, digest: StepDigest, wall_s: float) -> None:
        summary = self._summaries.Summary()
        for name, value in digest.metrics.items():
            summary.value.add(tag=_tag(name), simple_value=value)
        for name, values in digest.histograms.items():
            summary.MergeFrom(self._summaries.histogram(name, list(values), bins=_BINS))
        if digest.samples:
            summary.MergeFrom(self._summaries.text("completions", _as_markdown(digest.samples)))
        self._add(file, wall_s, step=digest.step, summary=summary)

    def _add(self, file: AppendedFile, wall_s: float, **fields: Any) -> None:
        """An event as a record: its length and its bytes, each with a checksum."""
        data = self._events.Event(wall_time=wall_s, **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        file.add(length + self._checksum(length) + data + self._checksum(data))

    def _checksum(self, data: bytes) -> bytes:
        crc = self._crc(data) & 0xFFFFFFFF
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _CRC_MASK) & 0xFFFFFFFF)


def _tag(name: str) -> str:
    return _NOT_IN_A_TAG.sub("_", name).lstrip("/") or "_"


def _as_markdown(samples: Sequence[Sample]) -> str:
    """The texts as blocks of code, in which nothing of what a policy wrote means anything."""
    return "\n\n".join(
        f"**reward {sample.reward:.4g}, {sample.tokens} tokens**\n\n"
        f"{_as_code(sample.prompt)}\n\n→\n\n{_as_code(sample.text)}"
        for sample in samples
    )


def _as_code(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
