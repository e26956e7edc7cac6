"""A reward that asks a judge over HTTP: a model server, a grader, anything that answers a POST with a score.

A small judge to try it with, in one terminal, and in another the demo's policy that trains with it for half a minute:

    python examples/http_judge.py --serve 8321
    JUDGE_URL=http://127.0.0.1:8321/score troupe train --reward examples/http_judge.py:Judge --max-steps 30

The judge gives a point for a right sum, so the reward rises as with the demo's own. Stop it for a while: the run says
that the reward is down and waits, and goes on when the judge is back. With `-m MODEL -d PROMPTS.json` it judges your
texts: the small judge then likes short polite ones.

`Judge` keeps its connections open and uses them again, up to `concurrency` at once. What fails (no connection, a status
other than 200, an answer that is no score) is raised: Troupe tries again, then the score is missing, and where call
after call fails (`rewards.breaker_failures`) the reward is taken to be down: its calls wait, no new step is begun, the
status names it, and all goes on when the judge is back.

Only the standard library and anyio. For TLS or a proxy use an HTTP client that you like in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import deque
from contextlib import suppress
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

import troupe

_HEAD_BYTES, _BODY_BYTES = 64 * 1024, 1024 * 1024


class Judge(troupe.RewardActor):
    """Sends {"prompt", "completion"} as JSON to the judge's URL and takes "score" of what it answers."""

    name, concurrency, timeout_s, retries = "judge", 16, 30.0, 2

    def __init__(self, url: str | None = None) -> None:
        self.url = url or os.environ.get("JUDGE_URL", "http://127.0.0.1:8321/score")
        self._idle: deque[Connection] = deque()

    async def start(self) -> None:
        """Refuse a URL that cannot be used. The judge itself may come later."""
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"JUDGE_URL is {self.url!r}; give http://HOST:PORT/PATH")
        self._host, self._port, self._path = parts.hostname, parts.port or 80, parts.path or "/"

    async def score(self, sample: troupe.RewardSample) -> float | None:
        """The judge's score of one completion."""
        question = json.dumps({"prompt": sample.prompt, "completion": sample.completion}).encode()
        answer = await self._post(question)
        score = answer.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"the judge answered {answer!r}, which has no number as its score")
        return score

    async def stop(self) -> None:
        """Close the connections."""
        while self._idle:
            await self._idle.pop().close()

    async def _post(self, body: bytes) -> dict[str, object]:
        while self._idle:
            connection = self._idle.pop()
            try:
                return await self._ask(connection, body)
            except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.IncompleteRead):
                continue  # the judge closed it while nobody used it: no fault, and it had not answered
        return await self._ask(await Connection.open(self._host, self._port), body)

    async def _ask(self, connection: Connection, body: bytes) -> dict[str, object]:
        kept = False
        try:
            status, answer, kept = await connection.post(f"{self._host}:{self._port}", self._path, body)
        finally:
            if kept:
                self._idle.append(connection)
            else:  # also when cancelled: the rest of an answer must not be taken for the next one
                await connection.close()
        if status != 200:
            raise ConnectionError(f"the judge answered status {status}: {answer[:200].decode(errors='replace')}")
        decoded = json.loads(answer)
        if not isinstance(decoded, dict):
            raise TypeError(f"the judge answered {decoded!r}, which is no object with a score")
        return decoded


class Connection:
    """One HTTP/1.1 connection that is used again and again."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._reader = BufferedByteReceiveStream(stream)

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        return cls(await anyio.connect_tcp(host, port))

    async def post(self, host: str, path: str, body: bytes) -> tuple[int, bytes, bool]:
        """Status, body, and whether the connection may be used again."""
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        await self._stream.send(f"{head}\r\n\r\n".encode() + body)
        first, headers = await _read_head(self._reader)
        status = int(first.split(" ", 2)[1])
        if "content-length" not in headers:
            raise ConnectionError("the judge's answer has no Content-Length")
        answer = await self._reader.receive_exactly(_length(headers))
        return status, answer, headers.get("connection", "").lower() != "close"

    async def close(self) -> None:
        """Close it, cancelled or not."""
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)


async def _read_head(reader: BufferedByteReceiveStream) -> tuple[str, dict[str, str]]:
    first, *lines = (await reader.receive_until(b"\r\n\r\n", _HEAD_BYTES)).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first, {name.strip().lower(): value.strip() for name, _, value in pairs}


def _length(headers: dict[str, str]) -> int:
    length = int(headers.get("content-length", "0"))
    if not 0 <= length <= _BODY_BYTES:
        raise ConnectionError(f"a body of {length} bytes is over the limit of {_BODY_BYTES}")
    return length


def opinion(prompt: object, completion: object) -> float:
    """What the small judge thinks: 1 for a right sum, or else for a text with "please" or "thank", less the longer it
    is."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]  # type: ignore[index]
    if isinstance(prompt, str) and (asked := re.fullmatch(r"(\d+)\+(\d+)=", prompt)):
        return float(text.strip() == str(int(asked[1]) + int(asked[2])))
    polite = any(word in text.lower() for word in ("please", "thank"))
    return polite * 1.0 - min(len(text), 1000) / 1000


async def serve(port: int = 0, *, delay_s: float = 0.0, started: anyio.Event | None = None) -> None:
    """The small judge, on 127.0.0.1, until it is cancelled."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port) as listener:
        print(f"judging at http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}/score", flush=True)
        if started is not None:
            started.set()
        await listener.serve(lambda stream: _serve_one(stream, delay_s))


async def _serve_one(stream: SocketStream, delay_s: float) -> None:
    reader = BufferedByteReceiveStream(stream)
    async with stream:
        with suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            while True:
                try:
                    _, headers = await _read_head(reader)
                    asked = json.loads(await reader.receive_exactly(_length(headers)))
                    score = opinion(asked["prompt"], asked["completion"])
                except (anyio.DelimiterNotFound, ConnectionError, LookupError, TypeError, ValueError, AttributeError):
                    await stream.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                    return  # one bad question must not end the judge for the others
                await anyio.sleep(delay_s)
                answer = json.dumps({"score": score}).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
                await stream.send(head.encode() + answer)


def main() -> None:
    """Serve the small judge."""
    parser = argparse.ArgumentParser(description="A small judge to try the reward with.")
    parser.add_argument("--serve", type=int, metavar="PORT", required=True, help="where to listen on 127.0.0.1")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="before each answer")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        anyio.run(lambda: serve(options.serve, delay_s=options.delay))


if __name__ == "__main__":
    main()
