"""The agent that writes code: what its tools say, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.running import EXAMPLES, imported, run_command
from troupe.environments.describing import describe

pytestmark = pytest.mark.anyio

AGENT: Any = imported("code_agent/agent.py")
FOLDER = EXAMPLES / "code_agent"
TESTS = "assert f(2, 3) == 5"


async def test_it_runs_code_and_is_worth_what_was_handed_in() -> None:
    agent = AGENT.CodeAgent()
    agent.reset(tests=TESTS, prompt=[])
    assert await agent.get_reward() == 0.0
    assert await agent.run_python("print(6 * 7)") == "42\n"
    assert "ZeroDivisionError" in await agent.run_python("1 / 0")
    for code, worth in [("def f(a, b): return a - b", 0.0), ("def f(a, b): return a + b", 1.0)]:
        assert await agent.submit(code) == "handed in"
        assert await agent.get_reward() == worth
    agent.reset(tests=TESTS)
    assert await agent.get_reward() == 0.0


def test_its_methods_are_two_tools() -> None:
    assert [tool.name for tool in describe(AGENT.CodeAgent()).tools] == ["run_python", "submit"]


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    made = run_command(f"python examples/code_agent/make_policy.py --out {tmp_path}", tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "problems.jsonl").read_bytes() == (FOLDER / "problems.jsonl").read_bytes()
    folders = f"-m {tmp_path / 'policy'} -o {tmp_path / 'run'}"
    done = run_command(f"troupe train examples/code_agent/run.toml {folders} --max-steps 3", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    assert all(step["tools/call_frequency"] > 1 for step in steps)
    assert any(step["reward"] > 0 for step in steps)
