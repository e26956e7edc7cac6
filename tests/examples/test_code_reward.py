"""The example that runs generated code: what passes, what does not, and what the code cannot do."""

from __future__ import annotations

import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.examples.running import run_command
from troupe.rewards import RewardManager, RewardsConfig, load_reward

pytestmark = pytest.mark.anyio

FILE = Path(__file__).parents[2] / "examples" / "code_reward.py"
load_reward(f"{FILE}:passes_tests")
EXAMPLE: Any = next(module for name, module in sys.modules.items() if name.startswith("troupe_reward_code_reward_"))


MARK = secrets.token_hex(8)  # others may drive the same tests on this machine
SLEEPS = f"import time; time.sleep(600)  # {MARK}"


async def run(code: str, **limits: Any) -> Any:
    return await EXAMPLE.run_code(code, EXAMPLE.Limits(**{"wall_s": 60.0, **limits}))


async def test_code_that_passes_its_tests_gets_1_and_any_other_0() -> None:
    completions = [
        "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nThat is all.",
        "def add(a, b):\n    return a - b",
        "def add(a, b: return",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
    ]
    manager = RewardManager(f"{FILE}:passes_tests", config=RewardsConfig(timeout_s=120.0))
    manager.check_columns({"tests"})
    result = await manager.compute_rewards(["p"] * 5, completions, tests=["assert add(2, 3) == 5"] * 5)
    assert result.scores == {"passes_tests": (1.0, 0.0, 0.0, 0.0, 0.0)}
    assert result.incidents == ()


async def test_conversations_count_by_their_last_message() -> None:
    completion = [{"role": "assistant", "content": "```\nx = 1\n```"}]
    assert await EXAMPLE.passes_tests(completions=[completion], tests=["assert x == 1"]) == [1.0]


async def test_what_it_prints_and_how_it_ends_is_told() -> None:
    ran = await run("import sys\nprint('out')\nprint('err', file=sys.stderr, flush=True)\nsys.exit(3)")
    assert (ran.exit_code, sorted(ran.output.split())) == (3, ["err", "out"])


async def test_it_sees_no_environment_no_packages_and_an_empty_folder_that_goes_away() -> None:
    ran = await run("import os, sys\nprint(os.getcwd(), os.listdir('.'), len(os.environ) < 3, sys.flags.isolated)")
    folder, rest = ran.output.strip().split(" ", 1)
    assert rest == "['main.py'] True 1"
    assert not await anyio.Path(folder).exists()
    ran = await run("import anyio")
    assert "ModuleNotFoundError" in ran.output


async def test_wall_time_and_output_are_limited() -> None:
    since = time.monotonic()
    ran = await run("import time\nprint('begun', flush=True)\ntime.sleep(600)", wall_s=1.5)
    assert (ran.exit_code, ran.why_killed) == (None, "not done after 1.5 s")
    ran = await run("while True: print('x' * 1000)", output_bytes=5000)
    assert (ran.exit_code, ran.why_killed, len(ran.output)) == (None, "more than 5000 bytes of output", 5000)
    assert time.monotonic() - since < 120


async def test_processor_time_is_limited() -> None:
    assert (await run("while True: pass", cpu_s=1)).exit_code not in (0, None)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce it")
async def test_memory_and_files_are_limited() -> None:
    assert "MemoryError" in (await run("x = bytearray(10**9)", memory_bytes=256 * 2**20)).output
    ran = await run("open('big', 'wb').write(bytes(10**6))", file_bytes=1000)
    assert "File too large" in ran.output or ran.exit_code not in (0, None)


async def test_what_it_starts_ends_with_it(tmp_path: Path) -> None:
    mark = repr(str(tmp_path / "pid"))
    child = f"open({mark}, 'w').close(); {SLEEPS}"
    code = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
while not os.path.exists({mark}):
    time.sleep(0.01)
print("started", flush=True)
"""
    ran = await run(code, wall_s=5.0)
    assert "started" in ran.output
    with anyio.fail_after(30):
        while _sleepers():  # noqa: ASYNC110
            await anyio.sleep(0.01)


def _sleepers() -> set[str]:
    if sys.platform != "linux":
        return set()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


async def test_the_network_is_out_of_sight_where_this_machine_lets_us() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = await run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)\nprint('reached')")
    assert ("reached" in ran.output) == (not EXAMPLE.isolation())


async def test_without_unshare_the_limits_hold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXAMPLE, "isolation", lambda: ())
    assert (await run("print(6 * 7)")).output == "42\n"
    assert (await run("while True: pass", wall_s=1.0)).why_killed
    assert EXAMPLE._rlimits(EXAMPLE.Limits())["RLIMIT_NPROC"] > EXAMPLE.Limits().processes
    monkeypatch.setattr(sys, "platform", "darwin")
    assert EXAMPLE._tasks_of_user() >= 0


async def test_a_cancelled_run_is_killed() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SLEEPS!r}])")
        if sys.platform == "linux":
            with anyio.fail_after(60):
                while not _sleepers():  # noqa: ASYNC110
                    await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    with anyio.fail_after(60):
        while _sleepers():  # noqa: ASYNC110
            await anyio.sleep(0.01)


@pytest.mark.slow
def test_it_shows_what_becomes_of_completions_of_all_kinds(tmp_path: Path) -> None:
    done = run_command("python examples/code_reward.py", tmp_path)
    assert done.returncode == 0, done.stderr
    scores = {line[:18].strip(): line[19] for line in done.stdout.splitlines()[1:]}
    assert len(scores) == 8
    assert [kind for kind, score in scores.items() if score == "1"] == ["right"]
    assert "killed: not done after 5 s" in done.stdout
