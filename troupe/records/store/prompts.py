"""Which prompts a store has completions of, and where each was answered first and last."""

import hashlib
import sqlite3

import msgspec

_GROUPS = "SELECT gid, step, prompt FROM groups WHERE prompt IS NOT NULL AND step > 0 ORDER BY step, gid"
_SAMPLES = (
    "SELECT c.text, c.reward, c.finish_reason, length(c.token_ids) / 4 FROM completions c WHERE c.gid = ?"
    " ORDER BY c.sample LIMIT ?"
)


class PromptEnds(msgspec.Struct, kw_only=True):
    """The groups in which a prompt was answered first and last; the same where there is one."""

    first: int
    first_step: int
    last: int
    last_step: int


class AnsweredSample(msgspec.Struct, frozen=True, kw_only=True):
    """A completion as far as it is compared."""

    text: str
    reward: float | None
    finish_reason: str
    tokens: int


def prompt_ends(connection: sqlite3.Connection) -> dict[bytes, PromptEnds]:
    """A sum of each prompt → where it was answered; in the order in which they came first."""
    found: dict[bytes, PromptEnds] = {}
    for gid, step, prompt in connection.execute(_GROUPS):
        key = hashlib.blake2b(prompt.encode(), digest_size=12).digest()
        if (ends := found.get(key)) is None:
            found[key] = PromptEnds(first=gid, first_step=step, last=gid, last_step=step)
        else:
            ends.last, ends.last_step = gid, step
    return found


def prompt_of(connection: sqlite3.Connection, gid: int) -> str | list[dict[str, object]]:
    """The prompt of a group."""
    (prompt,) = connection.execute("SELECT prompt FROM groups WHERE gid = ?", (gid,)).fetchone()
    return msgspec.json.decode(prompt, type=str | list[dict[str, object]])


def samples_of(connection: sqlite3.Connection, gid: int, most: int) -> list[AnsweredSample]:
    """The first completions of a group."""
    names = AnsweredSample.__struct_fields__
    order = ("text", "reward", "finish_reason", "tokens")
    assert names == order
    return [AnsweredSample(**dict(zip(order, row, strict=True))) for row in connection.execute(_SAMPLES, (gid, most))]
