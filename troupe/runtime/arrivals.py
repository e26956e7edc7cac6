"""The clients of a listening socket: each is served in a task of its own, whatever happens to any other."""

import asyncio
import logging
import math
import socket
from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

import anyio
from anyio.abc import TaskGroup

_LOG = logging.getLogger("troupe.daemon")


class SocketServer(ABC):
    """Base of the servers: `async with` it. Leaving drops everybody and closes the socket."""

    whose: ClassVar[str]
    """Of what they are clients, in words."""
    most: float = math.inf
    """Connections; any further one is dropped unheard."""
    pause_s = 0.1
    """After one who could not be let in: where no descriptors are left, the next could not either."""
    connections = 0
    _tasks: TaskGroup

    @abstractmethod
    def _open(self) -> socket.socket | None:
        """A listening socket that does not block; None where nobody is to be served."""

    @abstractmethod
    async def _serve(self, connection: socket.socket) -> None:
        """One client, to the end of its connection, which is closed then; whatever it does stays in here."""

    def _leave(self) -> None:
        """Before everybody is dropped."""

    async def __aenter__(self) -> Self:
        listener = self._open()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        if listener is not None:
            self._tasks.start_soon(self._accept, listener, name=self.whose)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)  # the body's error goes on as itself, not in a group

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:  # no descriptors left, or the client is gone already
                    _LOG.warning("a client of the %s could not be let in: %s", self.whose, error)
                    await anyio.sleep(self.pause_s)
                    continue
                if self.connections >= self.most:
                    connection.close()
                    continue
                connection.setblocking(False)
                self.connections += 1
                self._tasks.start_soon(self._serve_one, connection, name=f"{self.whose} client")

    async def _serve_one(self, connection: socket.socket) -> None:
        try:
            with connection:
                await self._serve(connection)
        finally:
            self.connections -= 1
