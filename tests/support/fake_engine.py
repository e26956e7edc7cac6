"""An OpenAI-compatible server within a test, which fails in every way that it is told to."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import SocketAttribute, SocketStream

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
        self._scope: anyio.CancelScope
        self._back: anyio.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        """While the body goes on, but for `stopped`."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._listen)
            yield self
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """It is gone, with all connections, while the body goes on; then it is back, and has forgotten all."""
        self._back, self._is_back = anyio.Event(), anyio.Event()
        self._scope.cancel()
        self.adapters.clear()
        yield
        self._back.set()
        await self._is_back.wait()

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._is_back = anyio.Event()
        while True:
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self.port)
            self.port = listener.extra(SocketAttribute.local_port)
            async with listener:
                with anyio.CancelScope() as self._scope:
                    self._is_back.set()
                    if self._back is None:
                        task_status.started()
                    await listener.serve(self._serve)
            assert self._back is not None
            await self._back.wait()

    async def _serve(self, stream: SocketStream) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                await self._answer(stream)

    async def _answer(self, stream: SocketStream) -> None:
        read = b""
        while b"\r\n\r\n" not in read:
            read += await stream.receive()
        head, _, body = read.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.headers.append(headers)
        while len(body) < int(headers.get("content-length", "0")):
            body += await stream.receive()
        method, path, _ = first.split(" ")
        if method == "GET":
            models = [{"id": name} for name in sorted(self.adapters)]
            await self._send(stream, 200, json.dumps({"data": models}).encode())
        elif path == "/v1/completions":
            await self._complete(stream, json.loads(body))
        else:
            await self._order(stream, path, json.loads(body))

    async def _order(self, stream: SocketStream, path: str, body: dict[str, Any]) -> None:
        self.told.append((path, body))
        if path == "/v1/load_lora_adapter":
            self.adapters.add(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.discard(body["lora_name"])
        await self._send(stream, 200, b"{}")

    async def _complete(self, stream: SocketStream, body: dict[str, Any]) -> None:
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
                await self._send(stream, fault, b'{"error": "as it was told"}')
                return
            if body["model"].startswith("troupe-") and body["model"] not in self.adapters:
                await self._send(stream, 404, b'{"error": "no such model"}')
                return
            answer = self.change(self._completions(body))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            await self._send(stream, 200, data, cut=fault == "half")
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

    async def _send(self, stream: SocketStream, status: int, body: bytes, *, cut: bool = False) -> None:
        head = f"HTTP/1.1 {status} So\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await stream.send(head.encode() + (body[: len(body) // 2] if cut else body))


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
