"""What a worker that generates has in hand: parts on lease, and which of their groups are still to be made or told."""

from collections.abc import Iterable

import anyio

from troupe.actors.generator.cluster_wire import PartFrame
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import unpack_prompt
from troupe.runtime.frames import MessageError


class InHand:
    """One part, from its pull until the run has all its groups."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.unmade = {prompt.gid for prompt in part.prompts}
        self.untold = set(self.unmade)


class Hands:
    """All parts of a session."""

    def __init__(self) -> None:
        self._parts: dict[str, InHand] = {}
        self._by_gid: dict[int, InHand] = {}
        self._changed = anyio.Event()

    @property
    def names(self) -> list[str]:
        """Of all parts, in the order of their coming."""
        return list(self._parts)

    @property
    def unmade(self) -> int:
        """Parts that are not decoded yet."""
        return sum(bool(each.unmade) for each in self._parts.values())

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def versions(self) -> set[int]:
        """That parts are still to be decoded with."""
        return {each.part.version for each in self._parts.values() if each.unmade and each.part.version is not None}

    def add(self, part: Part) -> bool:
        """A part has come; whether it is new."""
        if part.name in self._parts:
            return False
        each = self._parts[part.name] = InHand(part)
        self._by_gid |= dict.fromkeys(each.unmade, each)
        return True

    def made(self, gid: int) -> str | None:
        """A group is complete → its part; None where nobody wants it any more."""
        each = self._by_gid.get(gid)
        if each is None:
            return None
        each.unmade.discard(gid)
        self._change()
        return each.part.name

    def told(self, gid: int) -> None:
        """The run has a group; a part is over with its last."""
        each = self._by_gid.get(gid)
        if each is not None:
            each.untold.discard(gid)
            if not each.untold:
                self.drop([each.part.name])

    def drop(self, names: Iterable[str]) -> list[str]:
        """Have these parts no more → those of them that were not decoded yet."""
        unmade = []
        for name in names:
            each = self._parts.pop(name, None)
            if each is not None:
                for prompt in each.part.prompts:
                    self._by_gid.pop(prompt.gid, None)
                if each.unmade:
                    unmade.append(name)
        self._change()
        return unmade

    def drop_unmade(self) -> list[str]:
        """Have those no more that are not decoded yet → their names."""
        return self.drop([name for name, each in self._parts.items() if each.unmade])

    async def room(self, most: int) -> int:
        """Wait until fewer than `most` parts are still to be decoded → how many more there may be."""
        while self.unmade >= most:
            await self._changed.wait()
        return most - self.unmade

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def part_of(frame: PartFrame) -> Part:
    """A part as the generator takes it. MessageError where the frame is none."""
    is_of_rows = frame.name.startswith("e.")
    try:
        step, middle, number = map(int, frame.name.removeprefix("e.").split("."))
    except ValueError:
        raise MessageError(f"{frame.name!r} is no name of a part") from None
    prompts = tuple(map(unpack_prompt, frame.prompts))
    if not prompts:
        raise MessageError(f"part {frame.name} has no prompts")
    if not is_of_rows:
        return Part(step=step, attempt=middle, number=number, version=frame.version, prompts=prompts)
    if frame.version != step:
        raise MessageError(f"part {frame.name} is of version {frame.version}")
    return Part(step=step, set=middle, number=number, version=step, prompts=prompts)
