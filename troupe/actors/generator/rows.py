"""Rows that are evaluated, in a process of the generator: parts by themselves, each with exactly its version."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import anyio

from troupe.actors.evaluator.decoding import Decoder
from troupe.actors.generator.wire import Completed, Rows, pack_group, unpack_prompt
from troupe.messages import Evaluate
from troupe.policy import Weights

_MOST_WAITING = 4096


class RowsDecoding:
    """Decodes parts of evaluations one after another, while training wants the device for nothing."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        *,
        there: Callable[[], Mapping[int, Weights]],
        load: Callable[[Path], Awaitable[Weights]],
        tell: Callable[[Completed], Awaitable[None]],
    ) -> None:
        """`decoders`: of each set. `there`: versions that the process has by itself. `load`: reads another one's
        file. `tell`: is given what is complete."""
        self._decoders, self._there, self._load, self._tell = decoders, there, load, tell
        self._parts, self._coming = anyio.create_memory_object_stream[Rows](_MOST_WAITING)
        self._read: tuple[int, Weights] | None = None

    def add(self, rows: Rows) -> None:
        """One more part."""
        self._parts.send_nowait(rows)

    def forget(self) -> None:
        """Let go of the version that was read last: what comes now needs the room."""
        self._read = None

    async def run(self) -> None:
        """Until cancelled."""
        with self._parts, self._coming:
            async for rows in self._coming:
                await self._decode(rows)

    async def _decode(self, rows: Rows) -> None:
        message = Evaluate(version=rows.version, weights=await self._weights(rows))
        prompts = tuple(map(unpack_prompt, rows.prompts))
        for group in await self._decoders[rows.set].complete(prompts, message, lambda: None):
            await self._tell(pack_group(group))

    async def _weights(self, rows: Rows) -> Weights:
        weights = self._there().get(rows.version)
        if weights is not None:
            return weights
        if self._read is None or self._read[0] != rows.version:
            self._read = None
            self._read = rows.version, await self._load(Path(rows.path))
        return self._read[1]
