"""Completions over HTTP: who may ask, pieces, files, and questions that mean nothing."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.daemon.page.test_server import Answer, Opened, open_page
from tests.support.many import make_many
from troupe.records.layout import STORE
from troupe.records.store.completions import Query
from troupe.records.store.read import open_store

pytestmark = pytest.mark.anyio


async def asked(opened: Opened, path: str, **query: Any) -> Answer:
    return await opened.visitor.ask(f"{opened.visitor.base}{path}?{urlencode(query)}")


async def told(opened: Opened, path: str, **query: Any) -> Any:
    answer = await asked(opened, path, **query)
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)


async def test_a_list_comes_in_pieces(tmp_path: Path) -> None:
    make_many(tmp_path, 240, letters=20)
    with open_store(tmp_path) as run:
        expected = [(one.gid, one.sample) for one in run.completions(Query(choice="best", least=0.5))]
    async with open_page(tmp_path) as opened:
        assert await told(opened, "about") == {"rewards": ["r", "other"], "folder": str(tmp_path)}
        piece = await told(opened, "completions", choice="best", least=0.5)
        assert piece["total"] == len(expected) > 50
        found = piece["rows"]
        while piece["after"]:
            piece = await told(opened, "completions", choice="best", least=0.5, after=piece["after"])
            found += piece["rows"]
        assert [(int(one["gid"]), one["sample"]) for one in found] == expected
        assert all(len(one["start"]) <= 250 for one in found)


async def test_one_of_them_and_all_as_a_file(tmp_path: Path) -> None:
    everything = make_many(tmp_path, 240, letters=20)
    async with open_page(tmp_path) as opened:
        one = await told(opened, "completion", gid=7, sample=3)
        [same] = [each for each in everything if (each["gid"], each["sample"]) == (7, 3)]
        assert (one["text"], one["prompt"], one["reward"]) == (same["text"], same["prompt"], same["reward"])
        assert one["colours"] == ["log_probs"]
        file = await asked(opened, "completions.jsonl", text="GRÜSSE", choice="newest")
        assert file.headers["content-disposition"] == 'attachment; filename="completions.jsonl"'
        lines = [json.loads(line) for line in file.body.splitlines()]
        assert len(lines) == sum("grüsse" in each["text"].casefold() for each in everything) > 0
        assert [line["step"] for line in lines] == sorted((line["step"] for line in lines), reverse=True)
        tokens = await asked(opened, "tokens", gid=7, sample=3)
        assert (tokens.status, tokens.body) == (409, "no tokenizer of the run can be read\n")


async def test_nobody_without_the_token_reads_them(tmp_path: Path) -> None:
    make_many(tmp_path, 8)
    async with open_page(tmp_path) as opened:
        opened.visitor.cookie = ""
        for path in ("about", "completions", "completion", "tokens", "completions.jsonl"):
            answer = await asked(opened, path, gid=0, sample=0)
            assert answer.status == 403
            assert "answer" not in answer.body
            assert (await opened.visitor.ask(f"/{path}?token={opened.visitor.token}")).status == 404


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("completions", "first_step=x"),
        ("completions", "least=high"),
        ("completions", f"row={2**63}"),
        ("completions", f"row={'9' * 5000}"),
        ("completions", "choice=first"),
        ("completions", f"choice={quote('step; DROP TABLE steps')}"),
        ("completions", "after=%5B1%5D"),
        ("completions", f"after={quote('[1, 2, 3')}"),
        ("completion", "gid=1"),
        ("completion", "gid=1&sample=x"),
        ("completion", f"gid={2**70}&sample=1"),
        ("tokens", "sample=1"),
    ],
)
async def test_what_means_nothing_is_refused(tmp_path: Path, path: str, query: str) -> None:
    make_many(tmp_path, 8)
    async with open_page(tmp_path) as opened:
        answer = await opened.visitor.ask(f"{opened.visitor.base}{path}?{query}")
        assert answer.status == 400, answer.body
        assert (await told(opened, "completions"))["total"] == 8


async def test_damage_is_told_and_ends_nothing(tmp_path: Path) -> None:
    make_many(tmp_path, 240, letters=20)
    with closing(sqlite3.connect(tmp_path / STORE)) as connection, connection:
        connection.execute("UPDATE completions SET scores = '{no JSON' WHERE gid = 20 AND sample = 3")
        connection.execute("UPDATE completions SET versions = '7' WHERE gid = 21 AND sample = 3")
    async with open_page(tmp_path) as opened:
        for gid, status in ((20, 409), (21, 409), (22, 200)):
            assert (await asked(opened, "completion", gid=gid, sample=3)).status == status
        refused = await asked(opened, "completions", gid=20)
        assert (refused.status, "holds what no run wrote" in refused.body) == (409, True)
        file = await asked(opened, "completions.jsonl")
        assert file.body.count("\n") < 240
        assert (await told(opened, "completions", gid=22))["total"] == 8


async def test_a_run_without_a_store_says_so(tmp_path: Path) -> None:
    async with open_page(tmp_path) as opened:
        answer = await asked(opened, "about")
        assert answer.status == 409
        assert "there is no run store" in answer.body
    make_many(tmp_path, 8)
    async with open_page(tmp_path) as opened:
        assert (await asked(opened, "completion", gid=99, sample=0)).status == 404
