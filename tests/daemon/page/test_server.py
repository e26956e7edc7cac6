"""The live page over HTTP: who may see it, what it serves, what those who watch are told, what its buttons do."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec
import pytest
from anyio.abc import SocketStream

from tests.daemon.control.test_protocol import STATUS
from troupe.daemon.control.place import read_address
from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.page.history import History
from troupe.daemon.page.server import Page
from troupe.daemon.trainer.frames import Happened, Started, Stepped
from troupe.errors import ConfigError
from troupe.messages import Checkpoint, Done, Drain, Incident, Pause, Refused, Resume, Status, Step, Stop
from troupe.records.report.static import BROWSER_SCRIPTS, CHART_SCRIPTS, CHART_STYLES
from troupe.runtime.http import HOST, HttpLimits

pytestmark = pytest.mark.anyio
PATIENCE_S = 30.0


HURRY: dict[str, Any] = {"status_s": 0.05, "gathers_s": 0.01}


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what is waited for tells nobody
        await anyio.sleep(0.005)


class FakeDaemon:
    """A daemon that remembers what it was asked."""

    def __init__(self) -> None:
        self.heard: list[tuple[Request, str]] = []
        self.looks = 0

    async def answer(self, request: Request, who: str) -> Reply:
        self.heard.append((request, who))
        return Refused(message="no brakes") if isinstance(request, Stop) else Done(message="heard")

    async def status(self) -> Status:
        self.looks += 1
        return msgspec.structs.replace(STATUS, step=self.looks)


class Answer(NamedTuple):
    """What the page says."""

    status: int
    headers: dict[str, str]
    body: str


class Visitor:
    """A browser of sorts."""

    def __init__(self, page: Page) -> None:
        self.port = int(page.address.split(":")[2].split("/")[0])
        self.token = page.address.partition("token=")[2]
        self.cookie = ""
        self.base = ""

    async def arrive(self) -> None:
        """Open the address: the token goes into a cookie."""
        answer = await self.ask(f"/?token={self.token}")
        assert answer.status == 303, answer
        self.base = answer.headers["location"]
        self.cookie = answer.headers["set-cookie"].partition(";")[0]

    def request(self, path: str, method: str = "GET", body: str = "", **headers: str) -> bytes:
        said = {"host": f"{HOST}:{self.port}", "cookie": self.cookie, **headers}
        if body:
            said["content-length"] = str(len(body.encode()))
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name.replace('_', '-')}: {text}" for name, text in said.items() if text),
        ]
        return "\r\n".join([*lines, "", body]).encode("latin-1")

    async def ask(self, path: str, method: str = "GET", body: str = "", **headers: str) -> Answer:
        async with await anyio.connect_tcp(HOST, self.port) as stream:
            await stream.send(self.request(path, method, body, **headers))
            told = b"".join([chunk async for chunk in stream])
        head, _, rest = told.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        named = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Answer(int(first.split()[1]), named, rest.decode())

    async def press(self, kind: str, **headers: str) -> Answer:
        return await self.post(json.dumps({"type": kind}), **headers)

    async def post(self, body: str, query: str = "", **headers: str) -> Answer:
        said = {"origin": f"http://{HOST}:{self.port}", "content_type": "application/json"} | headers
        return await self.ask(f"{self.base}ask{query}", "POST", body, **said)


class Watching:
    """The events that one who watches is told."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = stream
        self._read = b""
        self.ended = False

    async def next(self) -> tuple[str, Any]:
        while True:
            while b"\n\n" not in self._read:
                self._read += await self._stream.receive()
            block, _, self._read = self._read.partition(b"\n\n")
            lines = dict(line.split(": ", 1) for line in block.decode().split("\n") if ": " in line)
            if "event" in lines and "data" in lines:
                return lines["event"], json.loads(lines["data"])

    async def until(self, kind: str, **figures: Any) -> Any:
        """The data of the next event of this kind which has these."""
        while True:
            told, data = await self.next()
            if told == kind and all(data.get(name) == value for name, value in figures.items()):
                return data


class Opened:
    """A page, its run and a visitor who has arrived."""

    def __init__(self, page: Page, daemon: FakeDaemon, history: History) -> None:
        self.page, self.daemon, self.history = page, daemon, history
        self.visitor = Visitor(page)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watching]:
        async with await anyio.connect_tcp(HOST, self.visitor.port) as stream:
            await stream.send(self.visitor.request(f"{self.visitor.base}events"))
            yield Watching(stream)


@asynccontextmanager
async def open_page(folder: Path, **limits: float) -> AsyncIterator[Opened]:
    daemon, history = FakeDaemon(), History("kind", str(folder))
    with anyio.fail_after(PATIENCE_S):
        async with Page(daemon, history, folder, limits=HttpLimits(**limits), **HURRY) as page:  # type: ignore[arg-type]
            opened = Opened(page, daemon, history)
            await opened.visitor.arrive()
            yield opened


async def test_the_token_moves_into_a_cookie(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        answer = await visitor.ask(f"/?token={visitor.token}")
        name = f"troupe-{visitor.port}"
        assert answer.headers["set-cookie"] == f"{name}={visitor.token}; Path={visitor.base}; HttpOnly; SameSite=Strict"
        assert len(visitor.base) > 12, "others cannot guess it"
        page = await visitor.ask(visitor.base)
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert visitor.token not in page.body


async def test_every_answer_keeps_the_page_to_itself(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        for path in (visitor.base, f"{visitor.base}live.js", "/nowhere", "/metrics", f"/?token={visitor.token}"):
            headers = (await visitor.ask(path)).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert headers["cache-control"] == "no-store"
            assert not any(name.startswith("access-control") for name in headers)


async def test_its_files_have_no_script_and_no_style_within(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        for name, kind in (("style.css", "css"), ("live.css", "css"), ("charts.js", "javascript"), ("live.js", "java")):
            answer = await visitor.ask(visitor.base + name)
            assert answer.status == 200
            assert kind in answer.headers["content-type"]
            assert "http" not in answer.body, "nothing comes from elsewhere"
        page = (await visitor.ask(visitor.base)).body
        scripts, styles = (
            re.findall('<script src="(.*?)"', page),
            re.findall('<link rel="stylesheet" href="(.*?)"', page),
        )
        assert scripts[:-5] == [Path(name).name for name in (*CHART_SCRIPTS, *BROWSER_SCRIPTS)]
        assert styles == [*(Path(name).name for name in CHART_STYLES), "live.css", "completions.css"]
        assert len(scripts) == page.count("<script") - 1, "the other one is data"
        for name in (*scripts, *styles):
            assert (await visitor.ask(visitor.base + name)).status == 200
        assert "style=" not in page
        assert "onclick" not in page
        assert (await visitor.ask(f"{visitor.base}report.html")).status == 404
        assert (await visitor.ask(f"{visitor.base}../../pyproject.toml")).status == 404


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/?token=", {}),
        ("/?token=wrong", {}),
        ("/?token=%ff", {}),
        ("BASE", {}),
        ("BASEevents", {}),
        ("BASElive.js", {}),
        ("/metrics", {}),
        ("BASE", {"cookie": "troupe-1=x"}),
        ("BASE", {"cookie": "NAME=wrong"}),
        ("BASE", {"cookie": "NAME="}),
        ("BASE", {"cookie": "; = ;;\x80"}),
        ("BASE", {"authorization": "Bearer wrong"}),
        ("BASE", {"authorization": "Basic TOKEN"}),
    ],
)
async def test_without_its_token_there_is_one_sentence(tmp_path: Path, path: str, headers: dict[str, str]) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        visitor.cookie = ""
        named = {
            key: value.replace("NAME", f"troupe-{visitor.port}").replace("TOKEN", visitor.token)
            for key, value in headers.items()
        }
        answer = await visitor.ask(path.replace("BASE", visitor.base), **named)
        assert (answer.status, answer.body.count("\n")) == (403, 1)
        assert "this page is for those who have its token" in answer.body
        assert opened.daemon.heard == []


@pytest.mark.parametrize(
    "header",
    [
        "OURS; NAME=of-a-server-at-another-port",
        "NAME=of-a-server-at-another-port; OURS",
        'settings={"theme": "dark", "n": [1]}; OURS',
        "OURS; a=x y; junk; b\xe9=\xff",
        "ids[]=2;OURS;",
    ],
)
async def test_cookies_of_other_servers_lock_nobody_out(tmp_path: Path, header: str) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        header = header.replace("OURS", visitor.cookie).replace("NAME", f"troupe-{visitor.port}")
        assert (await visitor.ask(visitor.base, cookie=header)).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:PORT", 200),
        ("localhost:PORT", 200),
        ("LOCALHOST:9", 200),
        ("evil.example:PORT", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil@127.0.0.1.nip.example", 403),
        ("[::1", 403),
    ],
)
async def test_a_name_that_points_here_is_not_enough(tmp_path: Path, host: str, status: int) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        answer = await visitor.ask(visitor.base, host=host.replace("PORT", str(visitor.port)))
        assert answer.status == status
        assert status == 200 or "localhost only" in answer.body
        assert (await visitor.ask(visitor.base, host="")).status == 400


async def test_the_figures_for_prometheus(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        visitor.cookie = ""
        for answer in (
            await visitor.ask("/metrics", authorization=f"Bearer {visitor.token}"),
            await visitor.ask(f"/metrics?token={visitor.token}"),
        ):
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/plain")
            assert "troupe_step" in answer.body


async def test_the_buttons(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        for kind in ("Pause", "Resume", "Step", "Checkpoint", "Drain"):
            answer = await opened.visitor.press(kind)
            assert answer.status == 200
            assert json.loads(answer.body) == {"type": "Done", "message": "heard"}
        answer = await opened.visitor.press("Stop")
        assert json.loads(answer.body) == {"type": "Refused", "message": "no brakes"}
        asked = [Pause(), Resume(), Step(), Checkpoint(), Drain(), Stop()]
        assert opened.daemon.heard == [(request, "the page") for request in asked]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": ""}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "https://127.0.0.1:PORT"}, 403),
        ({"origin": "http://localhost:PORT"}, 403),
        ({"origin": "http://localhost:PORT", "host": "localhost:PORT"}, 200),
        ({"cookie": ""}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": ""}, 415),
        ({"content_type": "application/json; charset=utf-8"}, 200),
    ],
)
async def test_buttons_of_other_pages_do_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        visitor.cookie = headers.pop("cookie", visitor.cookie)
        named = {name: value.replace("PORT", str(visitor.port)) for name, value in headers.items()}
        answer = await visitor.press("Drain", **named)
        assert answer.status == status, answer
        assert len(opened.daemon.heard) == (status == 200)


async def test_a_token_in_the_address_presses_no_button(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        visitor = opened.visitor
        visitor.cookie = ""
        assert (await visitor.post('{"type":"Drain"}', f"?token={visitor.token}")).status == 403
        assert opened.daemon.heard == []


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ('{"type":"Set","key":"learner.lr","value":1}', 200, "no button for Set"),
        ('{"type":"Reload"}', 200, "no button for Reload"),
        ('{"type":"Fly"}', 400, "not a request"),
        ("nonsense", 400, "not a request"),
        ("[" * 20_000, 400, "not a request"),
    ],
)
async def test_what_no_button_says(tmp_path: Path, body: str, status: int, said: str) -> None:
    async with open_page(tmp_path) as opened:
        answer = await opened.visitor.post(body)
        assert answer.status == status
        reply = json.loads(answer.body)
        assert reply["type"] == "Refused"
        assert said in reply["message"]
        assert opened.daemon.heard == []


@pytest.mark.parametrize(("method", "status"), [("PUT", 405), ("HEAD", 405), ("OPTIONS", 405), ("POST", 404)])
async def test_other_methods(tmp_path: Path, method: str, status: int) -> None:
    async with open_page(tmp_path) as opened:
        answer = await opened.visitor.ask(opened.visitor.base, method)
        assert answer.status == status


async def test_one_who_watches_is_told_as_it_happens(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened, opened.watching() as watching:
        assert await watching.next() == ("about", {"run": "kind", "folder": str(tmp_path)})
        assert await watching.next() == ("curves", {"step": []})
        first = await watching.until("status")
        assert first["step"] >= 1
        opened.history.add(Started(notices=(), step=0, total_steps=9, speaks=False))
        opened.history.add(Stepped(step=1, total_steps=9, metrics={"reward": 0.5}, incidents={}))
        await watching.until("curves", step=[1], reward=[0.5])
        opened.history.add(Stepped(step=2, total_steps=9, metrics={"reward": 0.75}, incidents={}))
        await watching.until("step", step=2, figures={"reward": 0.75})
        late = Incident(actor="scorer", kind="reward_timeout", message="the <judge> is late\n")
        opened.history.add(Happened(incidents=(late,)))
        assert (await watching.until("incident"))["message"] == "the <judge> is late\n"
        again = await watching.until("status")
        assert again["step"] > first["step"], "the run is looked at again and again"


async def test_nobody_watches_and_the_run_is_left_alone(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        assert opened.daemon.looks == 0
        async with opened.watching() as watching:
            await watching.until("status")
        await until(lambda: not opened.page._watchers)


async def test_after_a_restart_steps_that_are_made_again_are_drawn_once(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened, opened.watching() as watching:
        for step in (1, 2, 3):
            opened.history.add(Stepped(step=step, total_steps=9, metrics={"reward": step}, incidents={}))
        opened.history.failed("the process ended by SIGKILL")
        assert (await watching.until("incident"))["message"] == "the process ended by SIGKILL"
        opened.history.add(Started(notices=(), step=1, total_steps=9, speaks=False))
        opened.history.add(Stepped(step=2, total_steps=9, metrics={"reward": 20}, incidents={}))
        await watching.until("curves", step=[1, 2], reward=[1.0, 20.0])


async def test_one_who_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async with (
        open_page(tmp_path, write_s=0.3) as opened,
        await anyio.connect_tcp(HOST, opened.visitor.port) as deaf,
    ):
        await deaf.send(opened.visitor.request(f"{opened.visitor.base}events"))
        await until(lambda: opened.page._watchers == 1)
        long = Incident(actor="scorer", kind="odd", message="x" * 100_000)
        while opened.page._watchers:  # until what the system buffers for it is full
            opened.history.add(Happened(incidents=(long,) * 64))
            await anyio.sleep(0.01)
        async with opened.watching() as watching:
            assert await watching.until("status")


async def test_so_many_pages_and_no_more(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        opened.page._watchers = 16
        answer = await opened.visitor.ask(f"{opened.visitor.base}events")
        assert answer.status == 503
        assert "16 pages are open already" in answer.body
        opened.page._watchers = 0


async def test_the_end_is_told_and_the_page_is_gone(tmp_path: Path) -> None:
    page = Page(FakeDaemon(), history := History("kind", "kind"), tmp_path, **HURRY)
    with anyio.fail_after(PATIENCE_S):
        async with page:
            opened = Opened(page, FakeDaemon(), history)
            await opened.visitor.arrive()
            stream = await anyio.connect_tcp(HOST, opened.visitor.port)
            await stream.send(opened.visitor.request(f"{opened.visitor.base}events"))
            watching = Watching(stream)
            await watching.until("about")
            history.end("the run is complete", well=True)
        assert await watching.until("end") == {"message": "the run is complete", "well": True}
        with pytest.raises(anyio.EndOfStream):
            await watching.next()
        await stream.aclose()
        with pytest.raises(OSError, match=r"."):
            await anyio.connect_tcp(HOST, opened.visitor.port)


async def test_one_who_watches_and_does_not_read_cannot_hold_up_the_end(tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE_S):
        page = Page(FakeDaemon(), history := History("kind", "kind"), tmp_path, **HURRY)
        async with page:
            opened = Opened(page, FakeDaemon(), history)
            await opened.visitor.arrive()
            stream = await anyio.connect_tcp(HOST, opened.visitor.port)
            await stream.send(opened.visitor.request(f"{opened.visitor.base}events"))
            await until(lambda: page._watchers > 0)
            history.end("x" * 50_000_000, well=True)
        await stream.aclose()


async def test_the_address_is_for_its_user_only(tmp_path: Path) -> None:
    left = tmp_path / "page.url"
    left.write_text("http://127.0.0.1:1/?token=old\n")
    left.chmod(0o644)
    async with open_page(tmp_path) as opened:
        assert read_address(tmp_path) == opened.page.address
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert read_address(tmp_path) is None
    assert not left.exists()


async def test_two_pages_have_two_tokens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with open_page(tmp_path / "a") as one, open_page(tmp_path / "b") as other:
        assert one.visitor.token != other.visitor.token
        assert one.visitor.base != other.visitor.base
        stolen = one.visitor.cookie.partition("=")[2]
        answer = await other.visitor.ask(other.visitor.base, cookie=f"troupe-{other.visitor.port}={stolen}")
        assert answer.status == 403


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        port = opened.visitor.port
        with pytest.raises(ConfigError, match=rf"daemon.page: port {port} of 127.0.0.1 cannot be had"):
            await Page(FakeDaemon(), History("b", "b"), tmp_path, port).__aenter__()


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    async with open_page(tmp_path / "gone") as opened:
        assert (await opened.visitor.ask(opened.visitor.base)).status == 200
