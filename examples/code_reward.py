"""A reward that runs the Python code of a completion against the tests of its dataset row.

    python examples/code_reward.py
    troupe train -m MODEL -d problems.jsonl --reward examples/code_reward.py:passes_tests

The first command tries it on a handful of completions, good and bad ones, and says what became of each: it takes some
seconds, since one of them hangs. The second one trains; it wants a model that can write code.

A row has a prompt and `tests`: Python statements, usually asserts, that are run after the completion's code in the same
interpreter. The score is 1 where all went through, else 0: code that hangs, crashes or floods the output is wrong code,
not a fault of the reward, so it is 0 and not missing. One group is scored at a time, as many completions at once as
there are processors; see the attributes of `passes_tests`, which overrule the section `[rewards]`.

What holds the code:

* a process of its own (`python -I -S`: no site packages, no user folder) in a session of its own, in a fresh empty
  folder that is removed afterwards, with a closed stdin and an empty environment;
* limits on processor seconds, memory, size of each file that it writes, open files and number of processes (the last
  not where you are root: the kernel lets root pass), and no core files;
* a limit on wall time and on output, at which the whole process group is killed;
* on Linux, where the kernel lets us (`isolation`), namespaces of its own: no network, and whatever it has started dies
  with it, also what has left the process group.

What does not: it runs as you, so it can read what you can read and write wherever you can write. Where `unshare` is
refused, and on macOS, it can use the network, and what leaves the process group lives on. On macOS the memory limit is
not enforced. And the tests run in the interpreter of the code that they test, so code that sets out to cheat them can;
look at what a rising reward is made of. This keeps a model's mistakes from harming a run. It is no wall against code
that means harm: for that, run Troupe in a container or a virtual machine of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anyio

_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BOOT = """
import json, os, resource, sys
for name, most in json.loads(sys.argv[1]).items():
    try:
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    except (AttributeError, ValueError, OSError):
        pass  # this platform has no such limit, or not for us
os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", "main.py"])
"""


@dataclass(frozen=True)
class Limits:
    """What one run of generated code may take."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20
    processes: int = 32
    """That the code may have at once, threads counted. The kernel does not hold root to it."""
    output_bytes: int = 64 * 2**10


@dataclass(frozen=True)
class Ran:
    """What came of it."""

    exit_code: int | None
    """None: killed at the limit of wall time or output; negative: minus the signal that ended it."""
    output: str
    """Of stdout and stderr together, up to the limit."""
    why_killed: str = ""


async def passes_tests(completions, tests, **columns):  # type: ignore[no-untyped-def]
    """1.0 where the completion's code passes the row's tests, else 0.0."""
    scores = [0.0] * len(completions)
    at_once = anyio.Semaphore(os.cpu_count() or 1)

    async def score(index: int) -> None:
        async with at_once:
            scores[index], _ = await _tested(completions[index], tests[index])

    async with anyio.create_task_group() as group:
        for index in range(len(completions)):
            group.start_soon(score, index)
    return scores


# One group at a time, as many of its completions as there are processors: code that is right must not run out of wall
# time because too much runs beside it. The time is enough for 64 completions that hang, on one processor.
passes_tests.concurrency, passes_tests.timeout_s = 1, 900.0  # type: ignore[attr-defined]


async def _tested(
    completion: str | list[dict[str, str]], tests: str, limits: Limits | None = None
) -> tuple[float, Ran]:
    secret = os.urandom(16).hex()  # exit code 0 alone would let sys.exit() pass
    ran = await run_code(f"{_code_of(completion)}\n\n{tests}\nprint({secret!r})\n", limits)
    return float(ran.exit_code == 0 and ran.output.rstrip().endswith(secret)), ran


def _code_of(completion: str | list[dict[str, str]]) -> str:
    """The last fenced block of code, or all of the text where there is none."""
    text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


async def run_code(code: str, limits: Limits | None = None) -> Ran:
    """Run Python code within the limits. Never raises for what the code does."""
    limits = limits or Limits()
    rlimits = await anyio.to_thread.run_sync(_rlimits, limits)  # it looks around: too slow for the event loop
    with tempfile.TemporaryDirectory(prefix="troupe-code-", ignore_cleanup_errors=True) as folder:
        await anyio.Path(folder, "main.py").write_text(code, encoding="utf-8", errors="replace")
        process = await anyio.open_process(
            [*isolation(), sys.executable, "-I", "-S", "-B", "-c", _BOOT, json.dumps(rlimits)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        return await _watch(process, limits)


async def _watch(process: anyio.abc.Process, limits: Limits) -> Ran:
    output, why = bytearray(), ""
    try:
        with anyio.move_on_after(limits.wall_s) as scope:
            assert process.stdout is not None
            async for chunk in process.stdout:
                output += chunk
                if len(output) > limits.output_bytes:
                    why = f"more than {limits.output_bytes} bytes of output"
                    break
            else:
                await process.wait()
        if scope.cancelled_caught:
            why = f"not done after {limits.wall_s:g} s"
    finally:
        with anyio.CancelScope(shield=True):
            _kill_group(process.pid)
            await process.aclose()
    text = bytes(output[: limits.output_bytes]).decode(errors="replace")
    return Ran(None if why else process.returncode, text, why)


def _kill_group(pid: int) -> None:
    """Whatever the code has started goes with it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left; a Mac refuses where only the dead are
        return


def _rlimits(limits: Limits) -> dict[str, int]:
    """What the child sets for itself before it becomes the code; nothing can raise it again."""
    elsewhere = 0 if isolation() else _tasks_of_user()  # a user namespace counts its own processes only
    return {
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": elsewhere + limits.processes,
    }


def _tasks_of_user() -> int:
    """Threads that run as this user (processes, on macOS), which the limit on processes counts too."""
    if sys.platform != "linux":
        return len(subprocess.run(["ps", "-x", "-o", "pid="], capture_output=True, check=False).stdout.split())
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == os.getuid():
                count += sum(1 for _ in (folder / "task").iterdir())
        except OSError:  # it has just ended
            continue
    return count


@cache
def isolation() -> tuple[str, ...]:
    """The command that takes the network and other processes out of sight; () where this machine does not let us."""
    unshare = shutil.which("unshare")
    command = (unshare or "", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--")
    if unshare is None:
        return ()
    tried = subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()


_TESTS = "assert add(2, 3) == 5"
_TRIED = {
    "right": "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```",
    "wrong": "def add(a, b):\n    return a - b",
    "no Python": "I would add the two numbers.",
    "ends early": "import sys\nsys.exit(0)",
    "hangs": "import time\ntime.sleep(600)",
    "floods the output": "while True: print('x' * 1000)",
    "takes all memory": "x = bytearray(10**10)",
    "asks the network": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
}


async def try_it() -> None:
    """What becomes of completions of all kinds."""
    print("the network:", "out of sight" if isolation() else "within reach, since this machine has no `unshare` for us")
    for kind, completion in _TRIED.items():
        score, ran = await _tested(completion, _TESTS, Limits(wall_s=5.0))
        print(f"{kind:<18} {score:.0f}   {_how_it_ended(ran, score)}")


def _how_it_ended(ran: Ran, score: float) -> str:
    if ran.exit_code is None:
        return f"killed: {ran.why_killed}"
    if ran.exit_code < 0:
        return f"killed: {signal.Signals(-ran.exit_code).name}"
    if ran.exit_code:
        return ran.output.strip().rpartition("\n")[2]
    return "passes" if score else "ended before its tests did"


if __name__ == "__main__":
    anyio.run(try_it)
