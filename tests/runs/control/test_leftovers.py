"""What a run from Python leaves behind in its process: nothing, however it was listened to."""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from tests.support.fakes import tiny_config, weigh_ids
from troupe.run.supervisor import Supervisor

pytestmark = pytest.mark.alone

Body = Callable[[Supervisor], Awaitable[None]]


class Belongings(NamedTuple):
    """What a process has."""

    threads: frozenset[str]
    children: frozenset[str]
    files: frozenset[str]


def belongings() -> Belongings:
    gc.collect()
    told = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    files = set()
    for descriptor in os.listdir("/dev/fd"):  # noqa: PTH208 - some are gone by the time one looks
        try:
            files.add(f"{descriptor} {Path('/dev/fd', descriptor).readlink()}")
        except OSError:
            continue
    return Belongings(
        threads=frozenset(thread.name for thread in threading.enumerate() if "AnyIO worker" not in thread.name),
        children=frozenset(line for line in told.stdout.splitlines() if not line.endswith(" ps")),
        files=frozenset(name for name in files if "pytest" not in name),
    )


async def to_the_end(run: Supervisor) -> None:
    await run.wait()


async def cancelled(run: Supervisor) -> None:
    with anyio.CancelScope() as scope:
        async for _ in run.updates():
            scope.cancel()
    assert scope.cancelled_caught
    run.drain()


async def broken_off(run: Supervisor) -> None:
    async for _ in run.updates():
        break
    run.stop()


async def raising(run: Supervisor) -> None:
    async for _ in run.updates():
        raise LookupError("mine")


@pytest.mark.parametrize("generator", ["thread", pytest.param("process", marks=pytest.mark.slow)])
@pytest.mark.parametrize("body", [to_the_end, cancelled, broken_off, raising], ids=lambda body: body.__name__)
def test_nothing_is_left_behind(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, body: Body, generator: str
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    config = tiny_config(
        ragged_model, tmp_path, schedule__max_staleness=1, schedule__generator=generator, learner__max_steps=4
    )

    async def run_it() -> None:
        async with Supervisor(config, [weigh_ids]) as run:
            await body(run)

    before = belongings()
    if body is raising:
        with pytest.raises(LookupError, match="mine"):
            anyio.run(run_it)
    else:
        anyio.run(run_it)
    assert belongings() == before
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"run.lock", "control.sock", "control.lock"}
    assert [path.name for path in tmp_path.rglob(".*")] == []
