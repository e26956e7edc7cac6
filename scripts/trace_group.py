"""Follow one group through a real run: how far it is to the user's reward, and how many files from prompt to weights.

`python -m scripts.trace_group` prints two Markdown tables. A run of four tiny steps, with the policy that ships and a
reward in a file of its own, is watched by a profile function in every thread. The third step is measured: nothing is
done for the first time then, and nothing ends.

Calls to a reward: functions of ours that were entered for a group after the Scorer's own and have not ended when the
user's function begins. Hops: how often these pass from one file to another, the last one into the user's file.

Files of a group: those of which a function ran between the publication of one version and that of the next, in the
tasks and threads of Prompter, Generator, Scorer and Learner. What Metrics, the Checkpointer and the supervisor do
meanwhile is not of a group's path; mailboxes, tasks and threads (the runtime) carry all that there is, and are counted
apart.
"""

from __future__ import annotations

import asyncio.events
import contextvars
import dis
import inspect
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import troupe

HOUSE = str(Path(troupe.__file__).parent)
MOST_HOPS, MOST_FILES = 7, 40
RUNTIME = ("runtime/", "linux_cpu.py")
STEPS, MEASURED = 4, 3
ON_PATH = {"prompter", "generator", "scorer", "learner"}

REWARDS = {
    "a plain function": "def reward(completions, **columns):\n    return [float(len(text)) for text in completions]\n",
    "an async function": "async def reward(completions, **columns):\n    return [float(len(t)) for t in completions]\n",
    "a RewardActor": (
        "import troupe\n\n\nclass Reward(troupe.RewardActor):\n    name = 'reward'\n\n"
        "    async def score(self, sample):\n        return float(len(sample.completion))\n\n\nreward = Reward()\n"
    ),
}

_actor: contextvars.ContextVar[str] = contextvars.ContextVar("actor", default="")
_group: contextvars.ContextVar[dict[FrameType, None] | None] = contextvars.ContextVar("group", default=None)
"""Of one group being scored: the functions that were entered for it and have not ended, in order."""


class Trace:
    """What a profile function sees of a run."""

    def __init__(self, reward_file: Path) -> None:
        self.reward_file = str(reward_file)
        self.calls: list[str] = []
        """Functions between the Scorer and the user's, outermost first, for the newest group."""
        self.files: set[str] = set()
        """Of a group's path, in the step that is measured."""
        self.published = 0

    @property
    def hops(self) -> list[str]:
        """The files that a group's scoring passes through, in order, from the manager's to the user's."""
        files = [call.partition(":")[0] for call in self.calls]
        return [file for file, before in zip(files, ["", *files], strict=False) if file != before]

    @property
    def stations(self) -> list[str]:
        """The files of a group's path without those of the runtime."""
        return sorted(file for file in self.files if not file.startswith(RUNTIME))

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Watch this thread and every one that it starts meanwhile."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if event == "call" and code.co_filename == self.reward_file and code.co_name in ("reward", "score"):
            self._note_calls(frame)
        if not code.co_filename.startswith(HOUSE):
            return
        if event == "return":
            opened = _group.get()
            if opened is not None and _has_ended(frame):
                opened.pop(frame, None)
            return
        self._note_actor(frame)
        if (opened := _group.get()) is not None and not code.co_flags & inspect.CO_GENERATOR:
            opened.setdefault(frame)
        if self._on_path(frame):
            self.files.add(_name(code).partition(":")[0])
        if code.co_name == "publish" and code.co_filename.endswith("board.py"):
            self.published += 1

    def _note_actor(self, frame: FrameType) -> None:
        """Know whose this task is, with those that it starts, and when the scoring of a group begins."""
        if not frame.f_code.co_flags & inspect.CO_COROUTINE or not _name(frame.f_code).startswith("actors/"):
            return
        name = getattr(frame.f_locals.get("self"), "name", "")
        if isinstance(name, str) and name:
            _actor.set(name)
        if frame.f_code.co_filename.endswith("actors/scorer.py") and frame.f_code.co_name == "_score":
            _group.set({})

    def _on_path(self, frame: FrameType) -> bool:
        if self.published != MEASURED:  # the version that a run begins with is published too
            return False
        thread = threading.current_thread()
        if thread is threading.main_thread():
            return _actor.get() in ON_PATH
        return thread.name.startswith(("troupe-generator", "troupe-learner", "troupe call"))

    def _note_calls(self, frame: FrameType) -> None:
        stack: list[FrameType] = []
        caller = frame.f_back
        while caller is not None and caller.f_code.co_filename != asyncio.events.__file__:
            stack.insert(0, caller)
            caller = caller.f_back
        waiting = [each for each in _group.get() or {} if each not in stack]  # for a thread, or a task
        names = [_name(each.f_code) for each in [*waiting, *stack] if each.f_code.co_filename.startswith(HOUSE)]
        # each once: the samples of a group are scored at the same time
        self.calls = [name for name in dict.fromkeys(names) if not name.startswith("actors/")]


def _has_ended(frame: FrameType) -> bool:
    """Whether a function returns for good: a coroutine that waits has a `return` event too."""
    if not frame.f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return True
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")


def _name(code: CodeType) -> str:
    return f"{code.co_filename.removeprefix(HOUSE).lstrip('/')}:{code.co_qualname}"


def trace(reward: str, folder: Path) -> Trace:
    """Run four steps with a reward of this source."""
    file = folder / "own_reward.py"
    file.write_text(reward, encoding="utf-8")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": f"{number}+1="} for number in range(8)]), encoding="utf-8")
    [policy] = [path.parent for path in Path(HOUSE).rglob("demo/policy/config.json")]
    settings: dict[str, Any] = {
        "model": {"path": str(policy)},
        "data": {"path": str(prompts)},
        "generation": {"num_generations": 4, "max_completion_length": 4},
        "rewards": {"functions": [f"{file}:reward"]},
        "learner": {"batch_size": 1, "max_steps": STEPS, "lr": 1e-4},
        "schedule": {"max_staleness": 0, "generator": "thread"},
        "metrics": {"sinks": ["jsonl"]},
        "output": str(folder / "run"),
    }
    config = troupe.load_config(overrides=[settings])
    seen = Trace(file)
    with seen.everywhere():
        result = troupe.train(config)
    assert result.complete, result
    return seen


def traces() -> dict[str, Trace]:
    """One run for each kind of reward."""
    found = {}
    for kind, source in REWARDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = trace(source, Path(folder).resolve())
    return found


def main() -> None:
    """Print both tables."""
    found = traces()
    print("| reward | hops | calls | which, from the Scorer to the user's function |\n|---|---:|---:|---|")
    for kind, seen in found.items():
        calls = " → ".join(f"`{call}`" for call in seen.calls)
        print(f"| {kind} | {len(seen.hops)} | {len(seen.calls)} | {calls} |")
    seen = next(iter(found.values()))
    files = seen.stations
    print(f"\nAt most {MOST_HOPS} hops and {MOST_FILES} files.\n")
    print("| room | files of a group, from prompt to weights |\n|---|---|")
    for room in sorted({file.rpartition("/")[0] for file in files}):
        names = [file.rpartition("/")[2] for file in files if file.rpartition("/")[0] == room]
        print(f"| {room or '.'} ({len(names)}) | {', '.join(names)} |")
    print(f"| all | {len(files)}, and {len(seen.files) - len(files)} of the runtime |")


if __name__ == "__main__":
    main()
