"""The HTTP client, against servers that answer as they should, and that do not."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute, SocketStream, TaskStatus
from anyio.streams.tls import TLSListener

from troupe.runtime.http_client import HttpClient, HttpError, checked_url, is_in_the_clear, key_from

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(answer: Callable[[SocketStream, bytes], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that gives each connection, with the head of its request, to `answer`."""

    async def serve(stream: SocketStream) -> None:
        async with stream:
            read = b""
            while b"\r\n\r\n" not in read:
                read += await stream.receive()
            await answer(stream, read)

    async def listen(*, task_status: TaskStatus[int]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            task_status.started(listener.extra(SocketAttribute.local_port))
            await listener.serve(serve)

    async with anyio.create_task_group() as tasks:
        port = await tasks.start(listen)
        yield f"http://127.0.0.1:{port}"
        tasks.cancel_scope.cancel()


async def test_a_request_says_what_is_needed_and_no_more() -> None:
    seen = []

    async def answer(stream: SocketStream, read: bytes) -> None:
        seen.append(read)
        await stream.send(b"HTTP/1.0 201 Made\r\nContent-Type: text/plain\r\n\r\nuntil the end")

    async with serving(answer) as url:
        client = HttpClient(f"{url}/base/", key="k3y")
        assert await client.post("/v1/x", b"{}") == (201, b"until the end")
    head, _, body = seen[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/v1/x HTTP/1.1"
    assert sorted(lines[1:]) == [
        "Accept: application/json",
        "Authorization: Bearer k3y",
        "Connection: close",
        "Content-Length: 2",
        "Content-Type: application/json",
        f"Host: {client.place}",
    ]
    assert body == b"{}"


FAULTS = {
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfour", "no HTTP"),
    "nothing": (b"", "no HTTP"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no HTTP"),
    "too long": (b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + b"x" * 200, "more than 100 bytes"),
    "endless head": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 30_000, "no HTTP"),
}


@pytest.mark.parametrize("case", FAULTS)
async def test_what_is_no_whole_answer_is_a_fault_with_its_reason(case: str) -> None:
    said, reason = FAULTS[case]

    async def answer(stream: SocketStream, read: bytes) -> None:
        await stream.send(said)

    async with serving(answer) as url:
        with pytest.raises(HttpError, match=reason) as caught:
            await HttpClient(url, most_bytes=100).get("/")
    assert not caught.value.late


async def test_a_server_that_hangs_is_late_and_one_that_is_not_there_is_not() -> None:
    async def answer(stream: SocketStream, read: bytes) -> None:
        await anyio.sleep_forever()

    async with serving(answer) as url:
        with pytest.raises(HttpError, match=r"within 0\.05 s") as caught:
            await HttpClient(url, timeout_s=0.05).get("/")
    assert caught.value.late
    with pytest.raises(HttpError) as gone:
        await HttpClient(url).get("/")
    assert not gone.value.late


async def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    async def answer(stream: SocketStream, read: bytes) -> None:
        await stream.send(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")

    async with serving(answer) as url:
        assert (await HttpClient(url, key="k3y").get("/")).status == 302


async def test_https_to_a_server_without_a_certificate_that_is_trusted_is_refused() -> None:
    async def answer(stream: SocketStream, read: bytes) -> None:
        raise AssertionError("nothing may be said in the clear")

    async with serving(answer) as url:
        with pytest.raises(HttpError):
            await HttpClient(url.replace("http:", "https:"), key="k3y", timeout_s=0.2).get("/")
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED


async def test_https_to_a_server_that_the_system_trusts_is_read_and_under_another_name_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not there to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    made = [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)  # noqa: ASYNC221 - nothing else goes on
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def serve(stream: ByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes")

    async with anyio.create_task_group() as tasks:
        plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = plain.extra(SocketAttribute.local_port)
        listener = TLSListener(plain, context, standard_compatible=False)
        tasks.start_soon(listener.serve, serve)
        with pytest.raises(HttpError, match="certificate"):
            await HttpClient(f"https://localhost:{port}").get("/")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await HttpClient(f"https://localhost:{port}").get("/") == (200, b"yes")
        with pytest.raises(HttpError, match="certificate"):
            await HttpClient(f"https://127.0.0.1:{port}").get("/")
        tasks.cancel_scope.cancel()
    await listener.aclose()


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://h:1", "http://", "http://u:p@h:1", "http://h:1/?a=b", "http://h:x", "http://h 1"],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        checked_url(url)


def test_who_reads_along() -> None:
    assert is_in_the_clear("http://10.0.0.2:8000")
    assert not is_in_the_clear("https://10.0.0.2:8000")
    assert not is_in_the_clear("http://127.0.0.1:8000")


def test_a_key_is_one_that_a_header_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_TEST_KEY", "two\r\nlines")
    with pytest.raises(ValueError, match="no usable key") as caught:
        key_from("TROUPE_TEST_KEY")
    assert "lines" not in str(caught.value)
    with pytest.raises(ValueError, match="not set"):
        key_from("TROUPE_TEST_NO_KEY")
