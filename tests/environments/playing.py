"""What tests of the manager share: managers of the environments in `acting.py`, and what is said to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec

from tests.environments import acting
from troupe.environments.convention import Call, Said
from troupe.environments.ledger import EpisodeLedger, EpisodeName
from troupe.environments.loading import load_world
from troupe.environments.manager import EnvironmentManager
from troupe.environments.settings import EnvironmentConfig
from troupe.messages import Incident
from troupe.messages.episodes import Answer
from troupe.messages.groups import Slot
from troupe.messages.turns import Answered

FILE = acting.__file__
PROMPT = [{"role": "user", "content": "Count"}]
FIRST = EpisodeName(0, 0)


def saying(text: str = "", **calls: dict[str, Any]) -> Said:
    """A turn that says something, or calls tools; a name may end in `_2` and so on, to be called again."""
    listed = tuple(Call(name=name.rstrip("_0123456789"), arguments=arguments) for name, arguments in calls.items())
    return Said(message={"role": "assistant", "content": text}, calls=listed)


async def no_sleep(seconds: float) -> None:
    await anyio.lowlevel.checkpoint()


def config_of(run: str, factory: str | None, tools: Sequence[str] = (), **settings: Any) -> EnvironmentConfig:
    return msgspec.convert(
        {
            "factory": None if factory is None else f"{FILE}:{factory}",
            "tools": [f"{FILE}:{tool}" for tool in tools],
            "run": run,
            "processes": 1,
            **settings,
        },
        EnvironmentConfig,
    )


@asynccontextmanager
async def playing(
    run: str,
    factory: str | None = "Counter",
    tools: Sequence[str] = (),
    *,
    ledger: EpisodeLedger | None = None,
    wants_attributes: bool = True,
    **settings: Any,
) -> AsyncIterator[tuple[EnvironmentManager, list[Incident]]]:
    """A manager that is started, and the incidents that it tells of."""
    config = config_of(run, factory, tools, **settings)
    incidents: list[Incident] = []
    manager = EnvironmentManager(
        load_world(config),
        config,
        ledger=ledger,
        wants_attributes=wants_attributes,
        sleep=no_sleep,
        jitter=lambda: 0.0,
    )
    manager.listen(incidents.append)
    async with manager:
        yield manager, incidents


async def played(
    manager: EnvironmentManager, *turns: Said, name: EpisodeName = FIRST, first: int = 1, **columns: Any
) -> list[Answer]:
    """The opening, where turns begin at 1, and the answers to turns; turn t has the token ids (t,)."""
    answers = [] if first > 1 else [await manager.open(name, PROMPT, columns)]
    for turn, said in enumerate(turns, first):
        answers.append(await manager.answer(name, turn, (turn,), said))
    return answers


def told(answer: Answer) -> str:
    """The content of the only message."""
    (message,) = answer.messages
    return str(message["content"])


def timeless(answer: Answer) -> Answer:
    """Without what the clock says."""
    calls = tuple(msgspec.structs.replace(call, seconds=0.0) for call in answer.calls)
    return msgspec.structs.replace(answer, seconds=0.0, calls=calls)


def recorded(*answers: Answer, name: EpisodeName = FIRST) -> EpisodeLedger:
    """A ledger as a later start of the run has it, of the opening and turns."""
    return EpisodeLedger(
        Answered(
            gid=name.gid,
            slot=Slot(step=0, place=0),
            sample=name.sample,
            turn=turn,
            token_ids=(turn,) if turn else (),
            answer=answer,
        )
        for turn, answer in enumerate(answers)
    )


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for may be a file
            await anyio.sleep(0.01)
