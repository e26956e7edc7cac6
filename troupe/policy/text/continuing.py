"""A conversation goes on: which ids a policy reads between its turns. What it sampled is never made from text again.

The row that a policy decodes in is extended by the ids of what the chat template puts between two turns: the rest of
the assistant's turn, what others say, the header of the next one. Where the template tells earlier turns in another
way than they stand in the row, there are two ways, by `history`:

`fork`: the conversation goes on in a new row, whose prompt is the whole conversation as the template tells it now.
`keep`: the row goes on. Nothing that was told or sampled is changed, and only what is new is told.

Both hold for every template that tells what an assistant said, then how its turn ends, then what others say; for
others `Continuer.check` raises ModelError before anything is sampled.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from troupe.policy.text.complete import encode_prompt
from troupe.policy.text.control import ControlTokens
from troupe.policy.text.histories import Histories, kind_of
from troupe.policy.text.seams import Seam, Seams
from troupe.policy.text.template_check import check_template, describe_history
from troupe.policy.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
History: TypeAlias = Literal["keep", "fork"]

_NO_VARIABLES = frozenset({"continue_final_message", "add_generation_prompt", "chat_template", "tools", "messages"})
"""Arguments of a chat template that are about one prompt, or given otherwise."""


class Following(NamedTuple):
    """What a policy reads before its next turn."""

    ids: tuple[int, ...]
    """Behind what stands in its row; none where a new row begins."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt of a new row; None: the row goes on."""


class Continuer:
    """Conversations of one tokenizer, with one set of tools. Threads may share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Message] | None = None,
        history: History = "fork",
        end_ids: Collection[int] = (),
        guards: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`tools`: JSON schemas; where none are given, those of `template_kwargs`, which are as `encode_prompt` takes
        them. `end_ids`: what the policy may end a turn with beside the tokenizer's own end (`Policy.eos_ids`).

        `guards`: text of a message that looks like a control token stays text, but for that of the prompt. Off, it
        becomes the token, as with TRL; of all other texts the ids are the same.

        Raises ModelError where there is no chat template.
        """
        kwargs = dict(template_kwargs or {})
        tools = list(tools or kwargs.get("tools") or ()) or None
        self._tokenizer, self._tools, self._kwargs = tokenizer, tools, kwargs
        self._continued = kwargs.get("continue_final_message")
        self._forks, self._guards = history == "fork", guards
        eos = tokenizer.eos_token_id
        self._end_ids = frozenset(end_ids) | (frozenset() if eos is None else {eos})
        template = tokenizer.chat_template(bool(tools), kwargs.get("chat_template"))
        variables = {name: value for name, value in kwargs.items() if name not in _NO_VARIABLES}
        self._template = template
        self._seams = Seams(tokenizer, template, self._end_ids, variables)
        self._histories = Histories(template, self._tools, variables, self._seams)
        self._control = ControlTokens(tokenizer, template.source)

    def check(self, *, by_tool: bool, by_user: bool) -> None:
        """Raise ModelError, naming the template's file, where the conversations cannot go on: by results of tools, by
        messages of a user."""
        check_template(self._template, self._histories, self._seams, self._tools, by_tool=by_tool, by_user=by_user)

    def notice(self, *, by_tool: bool, by_user: bool) -> str:
        """What becomes of earlier turns with this template, in a line."""
        return describe_history(self._template.origin, self._histories, self._forks, by_tool=by_tool, by_user=by_user)

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt of the first turn: as `encode_prompt` gives it, with the tools. Raises what that raises."""
        asked = {"tools": self._tools} if self._tools else {}
        return tuple(encode_prompt(self._tokenizer, messages, **{**self._kwargs, **asked}))

    def following(
        self,
        messages: Sequence[Message],
        said: Message,
        sampled_ids: Sequence[int],
        new: Sequence[Message],
        *,
        given: int | None = None,
    ) -> Following:
        """What is read after a turn that was sampled as `sampled_ids` and understood as `said`, when `new` follows.

        `messages`: what the turn answered, from the prompt on; `given`: how many of them are the prompt, whose control
        tokens are meant (None: those before the first turn of an assistant). A turn that ended at its limit does not
        go on; do not ask for it. Raises ModelError where the template cannot tell `new`.
        """
        seam = self._seam(new)
        kind = kind_of(messages, said, new)
        if self._forks and not self._histories.keeps(kind):
            told = self._told_anew(messages, said, new, self._prompt_length(messages) if given is None else given)
            if told is not None:
                return Following((), told)
        return Following(joined(tuple(sampled_ids), seam, self._end_ids))

    def _seam(self, new: Sequence[Message]) -> Seam:
        return self._seams.before(*self._control.hide(new)) if self._guards else self._seams.before(new)

    def _told_anew(
        self, messages: Sequence[Message], said: Message, new: Sequence[Message], given: int
    ) -> tuple[int, ...] | None:
        """The whole conversation, where it is told in another way now."""
        whole: list[Any] = [*messages, said, *new]
        stand_ins: dict[str, str] = {}
        if self._guards:
            whole, stand_ins = self._control.hide(whole, given)
        place = len(messages)
        before, turn, after = whole[:place], whole[place], whole[place + 1 :]
        if self._continued and 0 < given <= place and before[given - 1].get("role") == "assistant":
            key = self._continued if isinstance(self._continued, str) else "content"
            before, turn = _completed(before, turn, given, key)
        told = self._histories.rewritten(before, turn, after, self._seams.before(after, stand_ins).text)
        if told is None:
            return None
        return tuple(self._tokenizer.encode_restored(told, stand_ins))

    def _prompt_length(self, messages: Sequence[Message]) -> int:
        turns = (place for place, message in enumerate(messages) if message.get("role") == "assistant")
        place = next(turns, len(messages))
        return min(place + 1, len(messages)) if self._continued else place


def _completed(before: list[Any], turn: Any, given: int, key: str) -> tuple[list[Any], Any]:
    """Messages and turn, with the assistant's message that the prompt has begun as the beginning of the first turn."""
    head, begun, later = before[: given - 1], before[given - 1], before[given:]
    first = later[0] if later else turn
    first = {**first, key: f"{begun.get(key) or ''}{first.get(key) or ''}"}
    return ([*head, first, *later[1:]], turn) if later else (head, first)


def joined(sampled_ids: tuple[int, ...], seam: Seam, end_ids: Collection[int]) -> tuple[int, ...]:
    """What of a seam is still to be read behind a turn.

    All but the token that ends the turn, where the turn ends with it, or with another that the policy may end with; and
    without what the turn says behind that token, where it goes on as the seam does. With the token, where the turn was
    ended in another way, as by a stop string.
    """
    last = sampled_ids[-1] if sampled_ids else None
    if not seam.has_end:
        return seam.ids[1:] if last in end_ids and seam.ids[:1] == (last,) else seam.ids
    end, rest = seam.ids[0], seam.ids[1:]
    for place in range(len(sampled_ids) - 1, -1, -1):
        if sampled_ids[place] == end or sampled_ids[place] in end_ids:
            behind = sampled_ids[place + 1 :]
            return rest[len(behind) :] if rest[: len(behind)] == behind else seam.ids
    return seam.ids
