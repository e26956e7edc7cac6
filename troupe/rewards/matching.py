"""Matching a regular expression that may never come to an end, within a time that can be kept.

Python's `re` may have more ways to try than there are atoms, holds Python's lock meanwhile, and cannot be stopped. So
texts are matched in small processes (12 MB, there within 50 ms) that the system ends when a text takes too much
processor time, a measure that does not depend on what else the machine does.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from troupe.rewards import matcher

LIMIT_S = 2.0
"""Of processor time for one text, where there are few."""
ALL_S = 12.0
"""For all texts of a call, so that it ends within the time that a reward usually has."""
_AT_ONCE = max(1, min(4, os.cpu_count() or 1))
_END_S = 1.0


class Matching:
    """One pattern, and the processes that match it; they end with this object. May be used by several threads."""

    def __init__(self, pattern: str, limit_s: float = LIMIT_S) -> None:
        self._pattern, self._limit_s = pattern, limit_s
        self.idle: list[subprocess.Popen[bytes]] = []
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        weakref.finalize(self, _end_all, self.idle)

    def limit_s(self, count: int) -> float:
        """Seconds of processor time that each of `count` texts may take."""
        return min(self._limit_s, ALL_S / max(1, count))

    def full(self, texts: Sequence[str]) -> list[bool | None]:
        """Whether each whole text matches; None where that was not found out within the time.

        Raises OSError where there can be no process, RuntimeError where one ends as it should not.
        """
        found: list[bool | None] = []
        limit_s, ended = self.limit_s(len(texts)), 0
        while len(found) < len(texts):
            rest = texts[len(found) :]
            with self._places, self._a_matcher() as child:
                matches = _ask(child, rest, limit_s)
                found += matches
                if len(matches) < len(rest):
                    code = child.wait()
                    if code == -signal.SIGPROF:
                        found.append(None)
                        continue
                    ended += 1  # by somebody, or for want of memory
                    if ended > 1:
                        raise RuntimeError(f"the process that matches the pattern has ended with code {code}")
        return found

    @contextmanager
    def _a_matcher(self) -> Iterator[subprocess.Popen[bytes]]:
        child = None
        while child is None:
            try:
                child = self.idle.pop()
            except IndexError:  # others take from it, too
                break
            if child.poll() is not None:  # somebody has ended it meanwhile
                end_process(child)
                child = None
        child = child or subprocess.Popen(
            [sys.executable, "-I", "-S", matcher.__file__, json.dumps(self._pattern)],
            stdin=subprocess.PIPE,  # its end is the child's
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield child
        except BaseException:
            child.kill()
            raise
        finally:
            if child.poll() is None:
                self.idle.append(child)
            else:
                end_process(child)


def _ask(child: subprocess.Popen[bytes], texts: Sequence[str], limit_s: float) -> list[bool]:
    """What a child answers, up to the text that it ends at."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(json.dumps({"texts": texts, "limit_s": limit_s}).encode() + b"\n")
        child.stdin.flush()
    answer = b""
    while len(answer) < len(texts) and (more := os.read(child.stdout.fileno(), len(texts) - len(answer))):
        answer += more
    return [byte == ord("1") for byte in answer]


def _end_all(children: list[subprocess.Popen[bytes]]) -> None:
    while children:
        end_process(children.pop())


def end_process(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
