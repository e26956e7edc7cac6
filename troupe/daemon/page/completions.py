"""The completions of a run for its page: lists in pieces, one whole, its tokens, all as a file.

The store is opened for each answer and read in a thread, for as long as a page will wait, so the run is not held up.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from troupe.errors import InputError
from troupe.records.browse import about, line_of, open_completion, run_tokenizer, tokens_of
from troupe.records.export import as_row
from troupe.records.store.completions import Key, Query, StoredCompletion
from troupe.records.store.read import StoredRun, open_store
from troupe.runtime.http import HttpResponse, RefusedError

if TYPE_CHECKING:
    from troupe.policy.text.tokenizer import Tokenizer

PATHS = ("about", "completions", "completion", "tokens", "completions.jsonl")
_A_PIECE, _OF_A_FILE = 50, 200
"""Completions of a piece, and those of a file that are read at once."""
_AT_ONCE = 2
"""Answers that are worked on."""
_CONDITIONS = tuple(name for name in Query.__struct_fields__ if name != "count")


class Completions:
    """Answers what the browser of a page asks of the run in a folder. RefusedError where it cannot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._limiter = anyio.CapacityLimiter(_AT_ONCE)
        self._tokenizer: Tokenizer | None = None

    async def answer(self, path: str, query: Mapping[str, str]) -> HttpResponse:
        """One of PATHS, with the query of its address."""
        if path == "completions.jsonl":
            return HttpResponse(
                kind="application/jsonl",
                headers={"Content-Disposition": 'attachment; filename="completions.jsonl"'},
                body=self._lines(_asked(query)),
            )
        work: Callable[[StoredRun], Any]
        if path == "about":
            work = self._about
        elif path == "completions":
            work = partial(_piece, _asked(query), _after(query))
        else:
            key = _key(query)
            work = partial(_one, key) if path == "completion" else partial(self._tokens, key)
        body = msgspec.json.encode(await self._read(work))
        return HttpResponse(kind="application/json", body=body)

    async def _read(self, work: Callable[[StoredRun], Any]) -> Any:
        def read() -> Any:
            with open_store(self._folder) as run:
                return work(run)

        try:
            return await anyio.to_thread.run_sync(read, limiter=self._limiter)
        except InputError as error:
            raise RefusedError(HTTPStatus.CONFLICT, str(error)) from None
        except OverflowError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a number is larger than any in a store") from None
        except RefusedError:
            raise
        except Exception as error:  # a damaged row, whatever it holds, must not end the daemon
            raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, f"the store cannot be read: {error!r}") from None

    async def _lines(self, query: Query) -> AsyncGenerator[bytes, None]:
        """All of a query as rows of a dataset, each piece of another state of the store; what was there when it was
        asked for is there in each."""
        after: Key | None = None
        while True:
            try:
                lines, after = await self._read(partial(_rows, query, after))
            except RefusedError as refusal:
                raise OSError(refusal) from None  # the file ends here, and its client sees the connection break
            if lines:
                yield lines
            if after is None:
                return

    def _about(self, run: StoredRun) -> dict[str, Any]:
        return {**about(run), "folder": str(self._folder)}

    def _tokens(self, key: Key, run: StoredRun) -> dict[str, Any]:
        completion = _found(run, key)
        self._tokenizer = self._tokenizer or run_tokenizer(self._folder)
        if self._tokenizer is None:
            raise RefusedError(HTTPStatus.CONFLICT, "no tokenizer of the run can be read")
        return tokens_of(completion, self._tokenizer)


def _piece(query: Query, after: Key | None, run: StoredRun) -> dict[str, Any]:
    piece = run.piece(query, _A_PIECE, after)
    lines = [line_of(completion, query.text) for completion in run.load(piece.keys)]
    is_text = query.text or query.prompt
    told = f"looked through {_place(query, piece.after)}" if is_text and piece.after is not None else None
    total = None if is_text or after is not None else run.count(query)
    next_one = None if piece.after is None else msgspec.json.encode(piece.after).decode()
    return {"rows": lines, "after": next_one, "total": total, "told": told}


def _place(query: Query, after: Key) -> str:
    return f"step {after.value:.0f}" if query.choice in ("all", "newest") and after.value is not None else "a part"


def _rows(query: Query, after: Key | None, run: StoredRun) -> tuple[bytes, Key | None]:
    piece = run.piece(query, _OF_A_FILE, after)
    lines = [msgspec.json.encode(as_row(completion)) + b"\n" for completion in run.load(piece.keys)]
    return b"".join(lines), piece.after


def _one(key: Key, run: StoredRun) -> Any:
    return open_completion(_found(run, key))


def _found(run: StoredRun, key: Key) -> StoredCompletion:
    for completion in run.load([key]):
        return completion
    raise RefusedError(HTTPStatus.NOT_FOUND, "this completion is not in the store any more: its step is made again")


def _asked(query: Mapping[str, str]) -> Query:
    """The conditions in an address. RefusedError where they are none."""
    conditions = {name: query[name] for name in _CONDITIONS if query.get(name)}
    try:
        return msgspec.convert(conditions, Query, strict=False)
    except msgspec.ValidationError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"no such completions: {error}") from None


def _after(query: Mapping[str, str]) -> Key | None:
    try:
        return msgspec.json.decode(query["after"], type=Key) if query.get("after") else None
    except msgspec.MsgspecError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"after: {error}") from None


def _key(query: Mapping[str, str]) -> Key:
    try:
        return Key(None, msgspec.convert(query.get("gid"), int, strict=False), int(query.get("sample", "")))
    except (msgspec.ValidationError, ValueError) as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"gid and sample name a completion: {error}") from None
