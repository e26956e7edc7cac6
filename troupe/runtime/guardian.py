"""The guardian: a small process beside a trainer that sees whether it turns, and ends it where nothing else can.

Python runs one thread at a time. One that computes in C without giving up Python's lock (a regular expression that
backtracks, a power of huge numbers) keeps all others from running, also the one that heeds signals and requests. So
`guarding.py` starts `python -I -S guardian.py`, which needs nothing of the trainer but a page of memory that both
share, what Python's own watchdog wrote of its stacks, and the pipe into which the system's signal handler writes.
Standard library only, and little of it: it lives as long as the run.
"""

import json
import mmap
import os
import re
import select
import shlex
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

TICK_S = 0.5
"""Between two looks, and between two turns that a trainer tells of."""
STACKS_S = 3.0
"""Of silence, after which stacks are written down."""
QUIET_S = 4.0
"""Of silence, before anything is said or done."""
TELL_S = 60.0
"""Of silence, after which it is told without anybody asking; then again each time that as much has passed."""
SIGNALS = 3
"""As many end a trainer that does not turn."""
STACKS_SIGNAL = signal.SIGURG
"""Has a trainer's stacks written down."""
SILENT = "control.silent"
"""In the run folder: what keeps the trainer from answering."""
_OURS = f"{Path(__file__).parents[1]}/"

HEAD = struct.Struct("<ddQI")
CALL = struct.Struct("<BdQQ")
TEXTS = {"folder": (64, 4096), "threads": (4160, 12_000)}  # where each begins, and how long it may be
CALLS_AT, CALL_BYTES, CALLS = 16_384, 512, 96


class Call:
    """A reward's call that is under way."""

    def __init__(self, since_s: float, thread: int, native: int, name: str, file: str, function: str) -> None:
        self.since_s, self.thread, self.native = since_s, thread, native
        """`thread`: the one that makes it, as `threading.get_ident`; 0: the event loop, in turns with others. `native`:
        the system's number of it."""
        self.name, self.file, self.function = name, file, function


class Page:
    """What a trainer has written to memory, there to be read when it is stuck.

    Times are `time.monotonic`, which processes of one machine have in common.
    """

    BYTES = CALLS_AT + CALL_BYTES * CALLS

    def __init__(self, descriptor: int) -> None:
        self.memory = mmap.mmap(descriptor, self.BYTES)

    def turns(self) -> tuple[float, float, int, int]:
        """When the event loop turned last, when any thread could run, which thread the loop's is, signals heeded."""
        return HEAD.unpack_from(self.memory, 0)

    def read(self, what: str) -> str:
        """The text that was written last; empty where there is none."""
        start, room = TEXTS[what]
        (size,) = struct.unpack_from("<I", self.memory, start)
        return self.memory[start + 4 : start + 4 + min(size, room - 4)].decode(errors="surrogateescape")

    def calls(self) -> list[Call]:
        """Those under way, the newest first."""
        found = []
        for place in range(CALLS):
            start = CALLS_AT + place * CALL_BYTES
            used, since_s, thread, native = CALL.unpack_from(self.memory, start)
            if used:
                text = self.memory[start + CALL.size : start + CALL_BYTES].decode(errors="replace")
                name, function, file = [*text.split("\0"), "", ""][:3]
                found.append(Call(since_s, thread, native, name, file, function))
        return sorted(found, key=lambda call: -call.since_s)


class Vigil:
    """The rule: what is to be done, from one look to the next."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: of silence, after which the trainer is ended; 0: never."""
        self.limit_s = limit_s
        self.silent_s = 0.0
        """Seconds for which the event loop has not turned."""
        self._turned_s: float | None = None
        self._told_signals = 0
        self._next_tell_s = TELL_S

    def look(self, passed_s: float, turned_s: float, heeded: int, waiting: int) -> str:
        """What to do now: `nothing`, `tell`, or why to end it.

        `passed_s` since the last look; of a pause of our own (a machine that slept) no more counts than two looks
        take. `waiting`: signals that came and are not heeded yet.
        """
        if turned_s != self._turned_s:
            self._turned_s, self.silent_s = turned_s, 0.0
            self._told_signals, self._next_tell_s = 0, TELL_S
            return "nothing"
        self.silent_s += min(passed_s, 2 * TICK_S)
        if self.silent_s < QUIET_S:
            return "nothing"
        if waiting and heeded + waiting >= SIGNALS:
            return f"signal {SIGNALS}"
        if self.limit_s and self.silent_s >= self.limit_s:
            return f"daemon.kill_after_s = {self.limit_s:g}"
        if waiting > self._told_signals or self.silent_s >= self._next_tell_s:
            self._told_signals = waiting
            self._next_tell_s = max(self._next_tell_s, self.silent_s + TELL_S)
            return "tell"
        return "nothing"


Frame = tuple[str, int, str]
"""File, line, function."""


def stacks_of(text: str) -> dict[int, list[Frame]]:
    """What `faulthandler` wrote: thread → frames, the innermost first."""
    stacks: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in text.splitlines():
        if head := re.search(r"hread 0x([0-9a-f]+)", line):
            frames = stacks[int(head[1], 16)] = []
        elif frame := re.match(r'  File "(.*)", line (\d+) in (.*)', line):
            frames.append((frame[1], int(frame[2]), frame[3]))
    return stacks


def reason(
    calls: list[Call], stacks: dict[int, list[Frame]], *, held: bool, loop_thread: int, busiest: int | None
) -> tuple[str, str]:
    """Who keeps a trainer from turning → the reward's name, or "" where it is none; and the sentence without its time.

    `held`: no thread can run, so it is Python's lock, not only the event loop. `busiest`: the thread that computes,
    where the system tells.
    """
    does = "holds Python's lock, so that nothing else can run" if held else "keeps the event loop from turning"
    sync = [call for call in calls if call.thread]
    thread = loop_thread
    if held:
        own = {call.thread for call in sync}
        thread = busiest if busiest is not None else own.pop() if len(own) == 1 else 0 if own else loop_thread
    frames = stacks.get(thread, [])
    files = {frame[0] for frame in frames}
    call = next((call for call in sync if call.thread == thread), None)
    if call is None:
        turns = [call for call in calls if not call.thread and call.file in files]
        functions = {frame[2] for frame in frames}
        call = next((call for call in turns if call.function in functions), turns[0] if turns else None)
    if call is None and thread == 0:
        names = sorted({call.name for call in sync})
        return names[0], f"one of the rewards {', '.join(names)} {does}"
    if call is None and not frames and len({call.name for call in calls}) == 1:
        call = calls[0]
    place = _place(frames, None if call is None else call.file)
    if call is not None:
        return call.name, f"the reward {call.name}{place and f' ({place})'} {does}"
    return "", f"{place or 'something'} {does}"


def _place(frames: list[Frame], file: str | None) -> str:
    """FILE:LINE of the innermost frame in a file; else in none of Python's own and ours; else of the innermost."""
    own = [frame for frame in frames if frame[0] == file]
    foreign = [f for f in frames if not (f[0].startswith(_OURS) or re.search("/python3[^/]*/", f[0]))]
    places = [*own, *foreign, *frames]
    return f"{places[0][0].removeprefix(f'{Path.cwd()}/')}:{places[0][1]}" if places else ""


class Guardian:
    """Watches its parent to the end."""

    def __init__(self, parent: int, page: int, stacks: int, signals: int, limit_s: float) -> None:
        self._parent, self._page, self._stacks = parent, Page(page), stacks
        self._signals = None if signals < 0 else socket.socket(fileno=signals)
        self._vigil = Vigil(limit_s)
        self._ticks: dict[int, int] = {}  # of each thread, when the silence began
        self._silent: Path | None = None  # the file, where it is written
        self._terminal = os.isatty(2)

    def watch(self) -> None:
        """Until the trainer has ended, or was ended."""
        looked_s = time.monotonic()
        try:
            while not select.select([0], [], [], TICK_S)[0] and os.getppid() == self._parent:
                now_s = time.monotonic()
                if self._is_over(now_s - looked_s):
                    return
                looked_s = now_s
        finally:
            self._remove_silent()

    def _is_over(self, passed_s: float) -> bool:
        turned_s, _, _, heeded = self._page.turns()
        vigil, before_s = self._vigil, self._vigil.silent_s
        waiting = self._waiting() if before_s else 0
        what = vigil.look(passed_s, turned_s, heeded, waiting)
        if vigil.silent_s == 0.0:
            self._remove_silent()
            return False
        if before_s == 0.0:
            self._ticks = self._computed()
        if vigil.silent_s < STACKS_S:
            return False
        if _is_stopped(self._parent):  # by Ctrl-Z or a debugger: it is to stand still, and is to find no signal then
            vigil.silent_s = 0.0
            return False
        if before_s < STACKS_S and self._is_held:
            self._have_stacks_written()
        if vigil.silent_s < QUIET_S:
            return False
        name, sentence = self._reason()
        self._write_silent(name, sentence)
        sentence = f"{sentence}, for {vigil.silent_s:.0f} s"
        if what == "tell":
            left = SIGNALS - heeded - waiting
            how = "Ctrl-C again ends the run at once" if left == 1 else f"Ctrl-C {left} times ends the run at once"
            limit = f"; it is ended after {vigil.limit_s:g} s (daemon.kill_after_s)" if vigil.limit_s else ""
            self._say(f"troupe: {sentence}; {how}, without saving{limit}" if self._signals else f"troupe: {sentence}")
        elif what != "nothing":
            self._end(what, sentence)
            return True
        return False

    def _end(self, why: str, sentence: str) -> None:
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        folder = self._page.read("folder")
        there = folder and (Path(folder) / "checkpoints").is_dir()
        on = f"; go on from the last checkpoint with: troupe train -o {shlex.quote(folder)} --resume" if there else ""
        remedy = "; run it in a process, which can be killed: rewards.run" if "reward" in sentence else ""
        shown = "\x1b[?25h" if self._terminal else ""  # a display had the cursor hidden
        self._say(f"{shown}troupe: ended without saving ({why}): {sentence}{remedy}{on}")

    def _waiting(self) -> int:
        """Signals in the pipe, which is looked into without taking anything out."""
        if self._signals is None:
            return 0
        try:
            waiting = self._signals.recv(64, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return 0
        return sum(number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for number in waiting)

    @property
    def _is_held(self) -> bool:
        return time.monotonic() - self._page.turns()[1] > 0.8 * STACKS_S

    def _have_stacks_written(self) -> None:
        """By `faulthandler`, whose handler needs no lock; nothing of the trainer runs, so that its stacks stand still.
        Where the handler is not there any more, the system ignores this signal."""
        os.ftruncate(self._stacks, 0)
        os.lseek(self._stacks, 0, os.SEEK_SET)
        if os.getppid() == self._parent:
            os.kill(self._parent, STACKS_SIGNAL)

    def _reason(self) -> tuple[str, str]:
        loop_thread, calls, held = self._page.turns()[2], self._page.calls(), self._is_held
        try:
            threads = {int(ident): native for ident, native in json.loads(self._page.read("threads")).items()}
        except ValueError:
            threads = {}
        threads |= {call.thread: call.native for call in calls if call.thread}
        now, before = self._computed(), self._ticks
        computed = {i: now[n] - before[n] for i, n in threads.items() if n in now and n in before}
        most = max(computed.values(), default=0)
        own = [call.thread for call in calls if call.thread and 2 * computed.get(call.thread, 0) > most]
        busiest = None
        if most > 0.1 * self._vigil.silent_s * os.sysconf("SC_CLK_TCK"):  # the lock's holder computes
            busiest = own[0] if own else max(computed, key=lambda i: computed[i])
        stacks = stacks_of(os.pread(self._stacks, 256 * 1024, 0).decode(errors="replace"))
        return reason(calls, stacks, held=held, loop_thread=loop_thread, busiest=busiest)

    def _computed(self) -> dict[int, int]:
        """Thread, by the system's number → ticks of the processor that it has had. Empty where the system does not
        say."""
        ticks = {}
        with suppress(OSError, ValueError, IndexError):  # a thread has just ended, or there is no such folder
            for task in Path(f"/proc/{self._parent}/task").iterdir():
                fields = (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                ticks[int(task.name)] = int(fields[11]) + int(fields[12])
        return ticks

    def _write_silent(self, name: str, sentence: str) -> None:
        """Have whoever asks the run be told why it does not answer."""
        folder = self._page.read("folder")
        if not folder:
            return
        path = Path(folder) / SILENT
        told = {"pid": self._parent, "name": name, "reason": sentence, "since": time.time() - self._vigil.silent_s}
        with suppress(OSError):
            draft = path.with_name(f"{SILENT}~")
            draft.write_text(json.dumps(told), encoding="utf-8")
            draft.replace(path)
            self._silent = path

    def _remove_silent(self) -> None:
        if self._silent is not None:
            with suppress(OSError):
                self._silent.unlink()
            self._silent = None

    def _say(self, text: str) -> None:
        """To stderr, if somebody reads it; names and paths are of others, and may not act on a terminal."""
        text = _ACTING.sub("?", text)
        line = f"{os.linesep if self._terminal else ''}{text}\n".encode(errors="replace")
        with suppress(OSError):
            if select.select([], [2], [], 0)[1]:
                os.write(2, line[:4000])


_ACTING = re.compile(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")
"""White space that moves a cursor, and control characters."""


def _is_stopped(pid: int) -> bool:
    """Whether somebody has stopped a process, as Ctrl-Z does."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        import subprocess  # only where there is no /proc: it takes memory

        state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] in ("T", "t")


def main() -> None:
    """Watch the process that the arguments name."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # they are the trainer's
    parent, page, stacks, signals = map(int, sys.argv[1:5])
    Guardian(parent, page, stacks, signals, float(sys.argv[5])).watch()


if __name__ == "__main__":
    main()
