"""What actors share besides messages: the newest and pinned weights, and the count of groups still alive.

Both are touched from the event loop only. Weights are handed over by reference: in unified memory publishing copies
nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import anyio

W = TypeVar("W")


class PolicyBoard(Generic[W]):
    """Published policy versions. Keeps the newest and, since step `k` is generated with version
    `max(0, k − max_staleness)`, the `max_staleness` versions before it."""

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._weights: dict[int, W] = {}
        self._held: Mapping[int, W] = {}
        self._published = anyio.Event()

    @property
    def version(self) -> int:
        """The newest version; −1 before the first is published."""
        return max(self._weights, default=-1)

    @property
    def kept(self) -> Mapping[int, W]:
        """Every version that can be had, by number."""
        return {**self._held, **self._weights}

    @property
    def held(self) -> Mapping[int, W]:
        """Those that are there as long as somebody says so."""
        return self._held

    def hold(self, versions: Mapping[int, W]) -> None:
        """Have these versions there besides, whatever is published, in the place of those that were held before."""
        self._held = dict(versions)

    def publish(self, version: int, weights: W) -> None:
        """Make `version` available and let go of the versions that no step can need any more.

        ValueError for a version that is there already or that the board would not keep beside the newest.
        """
        if version in self._weights:
            raise ValueError(f"version {version} was published before; a version's weights never change")
        if version < self.version - self.max_staleness:
            raise ValueError(f"version {version} is older than the board may keep beside {self.version}")
        self._weights[version] = weights
        for old in [v for v in self._weights if v < self.version - self.max_staleness]:
            del self._weights[old]
        self._published.set()
        self._published = anyio.Event()

    async def get(self, version: int) -> W:
        """The weights of exactly `version`, waiting until it is published; LookupError once it has been let go."""
        while version > self.version:
            await self._published.wait()
        kept = self.kept
        if version not in kept:
            raise LookupError(f"policy version {version} is gone; kept are {sorted(kept)}")
        return kept[version]

    async def newer_than(self, version: int) -> tuple[int, W]:
        """The newest version and its weights, waiting until it is newer than `version`; −1 asks for any."""
        while self.version <= version:
            await self._published.wait()
        newest = self.version
        return newest, self._weights[newest]

    def pinned_for(self, step: int) -> int:
        """The version that step `step` is generated with in the pinned schedule."""
        return max(0, step - self.max_staleness)


class Credits:
    """How far generation may run ahead: at most `limit` groups live between prompting and the end of training."""

    def __init__(self, limit: int, live: Iterable[int] = ()) -> None:
        """`live`: gids that hold a credit from the beginning; they may be more than the limit."""
        if limit < 1:
            raise ValueError(f"a credit limit of {limit} would never let a group begin; give at least 1")
        self.limit = limit
        self._live = set(live)

    @property
    def free(self) -> int:
        """Groups that may still begin now."""
        return max(0, self.limit - len(self._live))

    @property
    def live(self) -> frozenset[int]:
        """The gids that hold a credit."""
        return frozenset(self._live)

    def take(self, gid: int) -> None:
        """Spend one credit on a group that begins."""
        if self.free < 1:
            raise ValueError(f"group {gid} has no credit: {self.limit} groups are alive")
        if gid in self._live:
            raise ValueError(f"group {gid} is alive already")
        self._live.add(gid)

    def pass_on(self, gid: int, to: int) -> None:
        """Another group takes over the credit of this one, also where more are alive than may begin."""
        if gid in self._live and to in self._live:
            raise ValueError(f"group {to} is alive already")
        self.give_back(gid)
        self._live.add(to)

    def give_back(self, gid: int) -> None:
        """The group is closed; its credit returns. A group is closed exactly once."""
        if gid not in self._live:
            raise ValueError(f"group {gid} is not alive: it was closed twice or never began")
        self._live.remove(gid)
