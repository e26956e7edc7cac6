"""An OpenAI-compatible server within a test, which fails in every way that it is told to."""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel

Change = Callable[[dict[str, Any]], Any]
"""A whole answer → another, or bytes that are sent as they are."""


class FakeServer:
    """Answers as vLLM does, with tokens drawn by its own dice; `faults` and `changes` are used up, one a completion.

    A fault is a status, "cut" (nothing comes), "half" (half of the body comes), or "hang".
    """

    def __init__(self, *, log_prob: float = -1.0, vocab_size: int = 60) -> None:
        self.log_prob = log_prob
        self.vocab_size = vocab_size
        self.asked: list[dict[str, Any]] = []
        """Bodies of all completions that were asked for."""
        self.told: list[tuple[str, dict[str, Any]]] = []
        """Whatever else was posted."""
        self.headers: list[dict[str, str]] = []
        self.faults: deque[Any] = deque()
        self.change: Change = lambda answer: answer
        """Of every completion."""
        self.adapters: set[str] = set()
        self.end_id: int | None = None
        """That ends every completion after three tokens; None: all are as long as they may be."""
        self.most_at_once = self.under_way = 0
        self.port = 0
        self._dice = random.Random(1)
        self._server: asyncio.Server
        self._serving: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        """While the body goes on, but for `stopped`."""
        await self._listen()
        try:
            yield self
        finally:
            await self._leave()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """It is gone, with all connections, while the body goes on; then it is back, and has forgotten all."""
        await self._leave()
        self.adapters.clear()
        yield
        await self._listen()

    async def _listen(self) -> None:
        # asyncio's own: one that awaits an accept cannot be cancelled without a race
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _leave(self) -> None:
        self._server.close()
        for task in tuple(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with suppress(OSError, EOFError, asyncio.CancelledError):
                await self._answer(reader, writer)
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.headers.append(headers)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = first.split(" ")
        if method == "GET":
            models = [{"id": name} for name in sorted(self.adapters)]
            await self._send(writer, 200, json.dumps({"data": models}).encode())
        elif path == "/v1/completions":
            await self._complete(writer, json.loads(body))
        else:
            await self._order(writer, path, json.loads(body))

    async def _order(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> None:
        self.told.append((path, body))
        if path == "/v1/load_lora_adapter":
            self.adapters.add(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.discard(body["lora_name"])
        await self._send(writer, 200, b"{}")

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.asked.append(body)
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            fault = self.faults.popleft() if self.faults else None
            await anyio.lowlevel.checkpoint()
            if fault == "hang":
                await anyio.sleep_forever()
            if fault == "cut":
                return
            if isinstance(fault, int):
                await self._send(writer, fault, b'{"error": "as it was told"}')
                return
            if body["model"].startswith("troupe-") and body["model"] not in self.adapters:
                await self._send(writer, 404, b'{"error": "no such model"}')
                return
            answer = self.change(self._completions(body))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            await self._send(writer, 200, data, cut=fault == "half")
        finally:
            self.under_way -= 1

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index in range(body.get("n", 1)):
            ids = [self._dice.randrange(30, self.vocab_size) for _ in range(body["max_tokens"])]
            if self.end_id is not None:
                ids = [*ids[:2], self.end_id][: body["max_tokens"]]
            log_probs = [self.log_prob] * len(ids)
            choices.append(
                {
                    "index": index,
                    "finish_reason": "length" if self.end_id is None else "stop",
                    "token_ids": ids,
                    "prompt_token_ids": body["prompt"],
                    "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": log_probs},
                }
            )
        return {"object": "text_completion", "choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}}

    async def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes, *, cut: bool = False) -> None:
        head = f"HTTP/1.1 {status} So\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + (body[: len(body) // 2] if cut else body))
        await writer.drain()


def with_choice(**changes: Any) -> Change:
    """The first completion of every answer with other fields; None takes a field away."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        for name, value in changes.items():
            choice.pop(name)
            if value is not None:
                choice[name] = value
        return answer

    return change
