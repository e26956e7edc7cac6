"""BPE of characters with fallback to bytes, as Gemma's tokenizer has it: exactly the merges of the file, in its order.

Nothing splits such a text into words; but where two neighbouring characters are never at the seam of a merge, no merge
ever crosses the place. So a text is cut there, mostly before spaces, and what a piece becomes is remembered.
"""

import re
from heapq import heapify, heappop, heappush
from pathlib import Path

from troupe.errors import ModelError
from troupe.policy.text.vocabulary import Characters, merged_pairs

_SPACE = "▁"
_MOST_REMEMBERED = 1 << 17  # pieces
_LONGEST_REMEMBERED = 64  # characters
_PLACE_BITS = 40


class CharacterPairs:
    """Ids of texts without added tokens. Threads may share one."""

    def __init__(self, characters: Characters, names: dict[str, int], origin: str) -> None:
        """Raises ModelError, naming `origin`, for a merge of what is no token."""
        self._names = names
        self._bytes, self._unknown = characters.bytes_, characters.unknown
        self._fuses_unknown, self._takes_whole = characters.fuses_unknown, characters.takes_whole
        self._stride = 1 + max(names.values(), default=0)
        self._ranks: dict[int, int] = {}
        self._made: list[int] = []
        self._seams: set[str] = set()
        for left, right in merged_pairs(Path(origin), names, characters.merges):
            if left not in names or right not in names:
                raise ModelError(f"{origin}: the merge of {left!r} and {right!r} joins what is not in the vocabulary")
            self._ranks[names[left] * self._stride + names[right]] = len(self._made)
            self._made.append(names[left + right])
            self._seams.add(left[-1:] + right[:1])
        self._splits = self._is_of_text_alone(characters)
        before = "".join(sorted(seam[0] for seam in self._seams if seam[1:] == _SPACE))
        crossed = rf"(?:(?<=[{re.escape(before)}]){_SPACE}[^{_SPACE}]*)*" if before else ""
        self._find_words = re.compile(rf"[\s\S][^{_SPACE}]*{crossed}").findall
        self._remembered: dict[str, list[int]] = {}

    def _is_of_text_alone(self, characters: Characters) -> bool:
        """Whether characters that are no tokens stay out of all merges, and apart from each other."""
        if None in characters.bytes_:
            return False
        substitutes = {*characters.bytes_, characters.unknown}
        return not any(id_ in substitutes for key in self._ranks for id_ in divmod(key, self._stride))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; half a surrogate pair is read as U+FFFD, as tiktoken reads it."""
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _encode(self, text: str) -> list[int]:
        if self._takes_whole and text in self._names:
            return [self._names[text]]
        if not self._splits:
            return self._merge(self._symbols(text))
        ids: list[int] = []
        remembered, encode = self._remembered, self._encode_word
        for word in self._find_words(text):
            ids += remembered.get(word) or encode(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Ids of a piece that no merge leaves; it is cut wherever no merge has a seam."""
        ids: list[int] = []
        seams, begin = self._seams, 0
        for end in range(1, len(word) + 1):
            if word[end - 1 : end + 1] in seams:
                continue
            piece = word[begin:end]
            begin = end
            known = self._remembered.get(piece)
            ids += self._remember(piece, self._merge(self._symbols(piece))) if known is None else known
        return self._remember(word, ids)

    def _remember(self, piece: str, ids: list[int]) -> list[int]:
        if len(piece) <= _LONGEST_REMEMBERED:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[piece] = ids
        return ids

    def _symbols(self, text: str) -> list[int]:
        """Ids of the characters before any merge.

        Unknown ones that wait to be fused stand behind the bytes that come between, as Hugging Face has it.
        """
        ids: list[int] = []
        waiting: list[int] = []
        for character in text:
            if (id_ := self._names.get(character)) is not None:
                ids += waiting
                waiting.clear()
                ids.append(id_)
                continue
            fallback = [id_ for byte in character.encode() if (id_ := self._bytes[byte]) is not None]
            if len(fallback) == len(character.encode()):
                ids += fallback
            elif self._unknown is not None:
                if waiting and not self._fuses_unknown:
                    ids += waiting
                waiting = [self._unknown]
        return ids + waiting

    def _merge(self, ids: list[int]) -> list[int]:
        """All merges, the one of least rank first, and of equal ones the leftmost. `ids` is used up."""
        ranks, stride, end = self._ranks, self._stride, len(ids)
        pairs = ((ranks.get(ids[n] * stride + ids[n + 1]), n) for n in range(end - 1))
        heap = [rank << _PLACE_BITS | n for rank, n in pairs if rank is not None]
        if not heap:
            return ids
        heapify(heap)
        after, before = list(range(1, end + 1)), list(range(-1, end - 1))
        while heap:
            entry = heappop(heap)
            rank, place = entry >> _PLACE_BITS, entry & ((1 << _PLACE_BITS) - 1)
            right = after[place]
            if right >= end or ids[place] < 0 or ranks.get(ids[place] * stride + ids[right]) != rank:
                continue  # one of the two is part of something larger by now
            merged = ids[place] = self._made[rank]
            ids[right] = -1
            follower = after[place] = after[right]
            if follower < end:
                before[follower] = place
                if (next_rank := ranks.get(merged * stride + ids[follower])) is not None:
                    heappush(heap, next_rank << _PLACE_BITS | place)
            leader = before[place]
            if leader >= 0 and (next_rank := ranks.get(ids[leader] * stride + merged)) is not None:
                heappush(heap, next_rank << _PLACE_BITS | leader)
        return [id_ for id_ in ids if id_ >= 0]
