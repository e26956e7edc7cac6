"""Pool: episodes whose turns are decoded together, in one session of the engine."""

from collections import deque
from collections.abc import Sequence

import anyio

from troupe.actors.generator.episodes import Episodes
from troupe.messages import Prompt, TurnTaken
from troupe.policy import CompletedTurn, TurnRequest, TurnSession


class Pool:
    """Episodes whose turns are decoded together, and what they share."""

    def __init__(self, episodes: Sequence[Episodes] = ()) -> None:
        self.episodes = list(episodes)
        self.prompts: list[Prompt] = []
        """Free schedule: those that are open."""
        self.session: TurnSession | None = None
        """Of the engine; there from the first turn on."""
        self.is_left = False
        """Whether nobody wants what is being decoded."""
        self.over: deque[tuple[int, ...]] = deque()
        """Rows that the session need not keep any more."""
        self._news = anyio.Event()
        self._decoding: dict[tuple[int, ...], Episodes] = {}

    @property
    def under_way(self) -> int:
        """Turns that are being decoded."""
        return len(self._decoding)

    def requests(self, most: int | None = None) -> list[TurnRequest]:
        """All that is ready, which is under way from then on; no more than `most` of the episodes at once."""
        ready: list[TurnRequest] = []
        for episodes in self.episodes:
            at_work = {id(each) for each in self._decoding.values()}
            if most is not None and len(at_work) >= most and id(episodes) not in at_work:
                continue
            found = episodes.requests()
            self._decoding |= {request.row: episodes for request in found}
            ready += found
        return ready

    def forget(self) -> None:
        """Have the session let go of what has ended; for the device's thread."""
        assert self.session is not None
        self.session.forget([self.over.popleft() for _ in range(len(self.over))])

    def add(self, turn: CompletedTurn) -> TurnTaken:
        """A turn has ended; what is to be asked about it."""
        return self._decoding.pop(turn.row).add(turn)

    @property
    def waiting(self) -> bool:
        return any(each.waiting for each in self.episodes)

    @property
    def ready(self) -> bool:
        return any(each.ready for each in self.episodes)

    async def news(self) -> None:
        """Wait until something was heard since the last call."""
        await self._news.wait()
        self._news = anyio.Event()

    def tell(self) -> None:
        self._news.set()
