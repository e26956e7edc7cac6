"""Generators beside a learner: the frames of one in a process, on weights that are there already."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from tests.support.fakes import device_thread, make_prompt
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.actors.generator.child import GeneratorChild
from troupe.actors.generator.hosted import GeneratorHost, HostedChild, Line
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import Setup
from troupe.errors import ModelError
from troupe.messages import Incident, RolloutGroup, Span, TurnTaken
from troupe.policy import Base, GenerationConfig, Weights, random_policy
from troupe.runtime.board import PolicyBoard
from troupe.runtime.process import ChildEnded

pytestmark = pytest.mark.anyio
GENERATION = GenerationConfig(num_generations=2, max_completion_length=6)


class Heard:
    """What a generator tells."""

    def __init__(self) -> None:
        self.groups: list[RolloutGroup] = []
        self.spans: list[Span] = []

    async def on_group(self, group: RolloutGroup) -> None:
        self.groups.append(group)

    async def on_turn(self, taken: TurnTaken) -> None:
        raise AssertionError

    async def on_incident(self, incident: Incident) -> None:
        raise AssertionError

    def on_span(self, span: Span) -> None:
        self.spans.append(span)

    def on_made(self, tokens: int) -> None: ...


def setup_of(folder: Path) -> Setup:
    rest = {"seed": 7, "max_staleness": 0, "most_at_once": None, "live": 9, "on_cpu": True}
    return Setup(
        name="generator 0",
        policy=CONFIG,
        generation=GENERATION,
        stop_ids=(),
        tokenizer=str(folder),
        **rest,  # type: ignore[arg-type]
    )


async def start(host: GeneratorHost, setup: Setup, heard: Heard) -> GeneratorChild:
    return await GeneratorChild.over(HostedChild(host.open(), os.getpid()), setup, heard, holds_from=0)


@asynccontextmanager
async def hosting(board: PolicyBoard[Weights]) -> AsyncIterator[GeneratorHost]:
    host = GeneratorHost(board, Base(), device_thread("generator"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        yield host
        tasks.cancel_scope.cancel()


async def test_parts_are_decoded_with_what_is_on_the_board_and_nothing_is_read(tmp_path: Path) -> None:
    folder, board = write_tiny_model(tmp_path), PolicyBoard[Weights](0)
    prompts = tuple(make_prompt(1, place) for place in range(2))
    completed: list[list[RolloutGroup]] = []
    async with hosting(board) as host:
        for _ in range(2):  # one after another
            heard = Heard()
            child = await start(host, setup_of(folder), heard)
            assert child.pid == os.getpid()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child.run)
                if board.version < 0:
                    board.publish(1, random_policy(CONFIG, seed=4).weights)
                with anyio.fail_after(20):
                    await child.load(1, None)
                    await child.decode(Part(step=1, attempt=0, number=0, version=1, prompts=prompts))
                    await child.room(1)
                    await child.finish()
            await child.aclose()
            assert [span.step for span in heard.spans if span.name == "decode"]
            completed.append(sorted(heard.groups, key=lambda group: group.prompt.gid))
    assert completed[0] == completed[1]
    assert [set(rollout.versions) for group in completed[0] for rollout in group.rollouts] == [{1}] * 4


async def test_one_that_fails_says_why_and_leaves_its_place(tmp_path: Path) -> None:
    board = PolicyBoard[Weights](0)
    async with hosting(board) as host:
        with pytest.raises(ModelError, match="nowhere"):
            await start(host, setup_of(tmp_path / "nowhere"), Heard())
        line = host.open()
        await line.send(b"no frame")
        with pytest.raises(ChildEnded, match="MessageError"), anyio.fail_after(10):
            await HostedChild(line, 1).receive()
        child = await start(host, setup_of(write_tiny_model(tmp_path)), Heard())
        await child.aclose()


async def test_a_line_that_is_closed_is_read_to_its_end() -> None:
    ours, theirs = Line.pair()
    await theirs.send(b"last")
    theirs.close("out of memory")
    child = HostedChild(ours, 1)
    with pytest.raises(anyio.BrokenResourceError, match="out of memory"):
        await child.send(b"more")
    assert await child.receive() == b"last"
    with pytest.raises(ChildEnded, match="out of memory"):
        await child.receive()
