"""The example that asks a judge over HTTP, with the small judge that comes with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from tests.examples.running import command
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.rewards import RewardManager, RewardsConfig, load_reward

pytestmark = pytest.mark.anyio

FILE = Path(__file__).parents[2] / "examples" / "http_judge.py"
load_reward(f"{FILE}:Judge")
EXAMPLE: Any = next(module for name, module in sys.modules.items() if name.startswith("troupe_reward_http_judge_"))


class Server:
    """Counts connections; answers by the example's server or as told."""

    def __init__(self, answer: Callable[[SocketStream], Awaitable[None]] | None = None) -> None:
        self.connections = 0
        self._answer = answer

    async def handle(self, stream: SocketStream) -> None:
        self.connections += 1
        await (self._answer(stream) if self._answer else EXAMPLE._serve_one(stream, 0.0))

    @asynccontextmanager
    async def at(self, port: int = 0) -> AsyncIterator[int]:
        async with anyio.create_task_group() as tasks:
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
            tasks.start_soon(listener.serve, self.handle)
            yield listener.extra(SocketAttribute.local_port)
            tasks.cancel_scope.cancel()
        await listener.aclose()


def saying(text: bytes) -> Callable[[SocketStream], Awaitable[None]]:
    async def answer(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(text)

    return answer


def manager_of(port: int, **settings: Any) -> RewardManager:
    async def no_sleep(seconds: float) -> None:
        await anyio.lowlevel.checkpoint()

    config = RewardsConfig(**{"breaker_max_wait_s": 0.001, **settings})
    return RewardManager(EXAMPLE.Judge(f"http://127.0.0.1:{port}/score"), config=config, sleep=no_sleep)


async def test_the_judge_scores_over_few_connections() -> None:
    server = Server()
    async with server.at() as port, manager_of(port) as manager:
        texts = ["thank you", "no", "please " + "x" * 93] * 20
        result = await manager.compute_rewards(["p"] * 60, texts)
        assert result.scores["judge"] == (1 - 0.009, -0.002, 0.9) * 20
        await manager.compute_rewards(["p"], [[{"role": "assistant", "content": "thanks"}]])
        assert 1 <= server.connections <= 16


async def test_connections_that_the_judge_has_closed_are_made_anew() -> None:
    judge: Any = EXAMPLE.Judge
    server = Server()
    async with server.at() as port:
        pass
    async with manager_of(port, breaker_failures=0) as manager:
        async with server.at(port):
            assert (await manager.compute_rewards(["p"], ["no"])).rewards == (-0.002,)
        async with server.at(port):
            assert (await manager.compute_rewards(["p"], ["no"])).rewards == (-0.002,)
    assert server.connections == 2
    assert judge.concurrency == 16


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "answered status 503: busy"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", None),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"score": "a"}', "no number as its score"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "no object with a score"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz", "JSONDecodeError"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "no Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "over the limit"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "IncompleteRead"),
        (b"", "IncompleteRead"),
    ],
)
async def test_answers_that_are_none_are_missing_scores(answer: bytes, message: str | None) -> None:
    async with Server(saying(answer)).at() as port, manager_of(port) as manager:
        result = await manager.compute_rewards(["p"], ["a"])
    assert result.rewards == (None,)
    assert [message in incident.message for incident in result.incidents if message] == [True] * bool(message)


@pytest.mark.parametrize(
    "question",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b'POST / HTTP/1.1\r\nContent-Length: 32\r\n\r\n{"prompt": "p", "completion": 1}',
        b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
        b"x" * 70_000,
    ],
)
async def test_a_bad_question_does_not_end_the_small_judge(question: bytes) -> None:
    async with Server().at() as port, manager_of(port) as manager:
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(question)
            assert (await stream.receive()).startswith(b"HTTP/1.1 400 ")
        assert (await manager.compute_rewards(["p"], ["no"])).rewards == (-0.002,)


async def test_groups_wait_while_the_judge_is_away_and_it_is_named() -> None:
    server = Server()
    async with server.at() as port:
        pass
    results = []

    async def score(place: int) -> None:
        results.append(await manager.score_group(make_group(make_prompt(0, place))))

    async with manager_of(port, breaker_failures=1) as manager:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for place in range(4):
                    tasks.start_soon(score, place)
                while not manager.down:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
                assert list(manager.down) == ["judge"]
                async with server.at(port):
                    while len(results) < 4:  # noqa: ASYNC110
                        await anyio.sleep(0.001)
    assert all(None not in result.rewards for result in results)


async def test_a_url_that_is_none_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_URL", "ftp://x")
    with pytest.raises(RewardError, match=r"reward judge did not start: .*JUDGE_URL is 'ftp://x'"):
        await RewardManager(f"{FILE}:Judge").start()


@pytest.mark.slow
async def test_the_small_judge_serves_from_the_command_line() -> None:
    async with await anyio.open_process([sys.executable, str(FILE), "--serve", "0"], stderr=subprocess.STDOUT) as judge:
        assert judge.stdout is not None
        line = (await judge.stdout.receive()).decode()
        port = int(line.split(":")[2].split("/")[0])
        async with manager_of(port) as manager:
            assert (await manager.compute_rewards(["p"], ["thanks"])).rewards == (0.994,)
        judge.terminate()


def test_the_small_judge_marks_sums_and_likes_manners_elsewhere() -> None:
    assert [EXAMPLE.opinion("27+58=", text) for text in ("85", " 85 ", "75", "please")] == [1.0, 1.0, 0.0, 0.0]
    assert EXAMPLE.opinion("Say 1+1=", "2") == -0.001


@pytest.mark.slow
async def test_the_demo_learns_from_the_small_judge(tmp_path: Path) -> None:
    [line] = re.findall(r"^    JUDGE_URL=\S+ (.*) --max-steps 30$", EXAMPLE.__doc__, re.MULTILINE)
    async with await anyio.open_process([sys.executable, str(FILE), "--serve", "0"], stderr=subprocess.STDOUT) as judge:
        assert judge.stdout is not None
        url = (await judge.stdout.receive()).decode().split()[-1]
        words = [*command(line), "--max-steps", "4", "--output", str(tmp_path / "run")]
        done = await anyio.run_process(words, env={**os.environ, "JUDGE_URL": url}, cwd=tmp_path, check=False)
        judge.terminate()
    assert done.returncode == 0, done.stderr
    assert "held-out judge: 0.3" in done.stdout.decode()
