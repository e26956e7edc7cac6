"""Supervised steps: rows to imitate as ids, and as groups that nobody samples; and the section `[warm_start]`.

Each turn of the assistant follows on the prompt that the policy will read then: the conversation before it as the chat
template tells it, up to where the assistant begins to speak. Where that begins with what stands in the row already, the
row goes on; where the template tells earlier turns in another way by then, the turn has a row of its own. So what is
learned stands where it will be sampled.
"""

import itertools
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from troupe.dataset import PromptDataset, SftConfig, SupervisedRows
from troupe.dataset.rows import PromptRow
from troupe.dataset.supervised import Said
from troupe.errors import DatasetError, InputError
from troupe.grpo.config import Scheduler
from troupe.messages import Prompt, Rollout, RolloutGroup, RowStart, ScoredGroup
from troupe.policy import Tokenizer, encode_prompt, opened_thought
from troupe.policy.text.chat import REASONING

Told = tuple[int, ...]


class WarmStartConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[warm_start]` section: supervised steps before the first one that is sampled."""

    path: str | None = None
    """Source of the rows that are imitated, with `prompt` and `completion`, or `messages`; None: there is no warm
    start."""
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Supervised steps of `learner.batch_size` rows, which come before those that `learner.max_steps` and
    `learner.epochs` count. None: as many as show every row once."""
    lr: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    """Their peak learning rate. None: 2e-5; of an adapter 2e-4."""
    lr_scheduler: Scheduler = "linear"
    """How it falls after the warm-up, to the last of them; that of the other steps begins after them."""
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Updates over which it rises from 0."""

    def __post_init__(self) -> None:
        if self.path is None and self.steps is not None:
            raise ValueError(f"warm_start.steps is {self.steps}, but warm_start.path names no rows; name some")


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One row in ids."""

    prompt_ids: Told
    tokens: "array[int]"
    """What follows on the prompt; packed, as there may be many rows."""
    observed: tuple[tuple[int, int], ...] = ()
    """Of `token_ids`, what is read and not learned."""
    rows: tuple[RowStart, ...] = ()
    """Where tokens follow another prompt."""
    text: str
    is_cut: bool = False

    @property
    def token_ids(self) -> Told:
        """What follows on the prompt."""
        return tuple(self.tokens)

    @property
    def longest_history(self) -> int:
        """Tokens of the longest prompt amid it; 0: there is none."""
        return max((len(row.prompt_ids) for row in self.rows), default=0)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that it makes, with its prompt."""
        prompts = [self.prompt_ids, *(row.prompt_ids for row in self.rows)]
        return max(len(ids) + length for ids, length in zip(prompts, self._lengths, strict=True))

    @property
    def longest_completion(self) -> int:
        """Tokens that follow on a prompt, in a row of their own."""
        return max(self._lengths)

    @property
    def _lengths(self) -> list[int]:
        edges = [0, *(row.start for row in self.rows), len(self.tokens)]
        return [stop - start for start, stop in itertools.pairwise(edges)]

    def group(self, prompt: Prompt) -> ScoredGroup:
        """The group that has it for its completion."""
        T = len(self.tokens)
        zeros = (0.0,) * T
        rollout = Rollout(
            token_ids=self.token_ids,
            log_probs=zeros,
            sampling_log_probs=zeros,
            versions=(prompt.slot.step,) * T,
            finish_reason="length" if self.is_cut else "stop",
            text=self.text,
            observed=self.observed,
            rows=self.rows,
        )
        return ScoredGroup(group=RolloutGroup(prompt=prompt, rollouts=(rollout,), supervised=True), scores={})


class _Segment(NamedTuple):
    """Tokens behind one prompt."""

    prompt_ids: Told
    token_ids: list[int]
    own: list[bool]
    """Which of them are learned."""

    def goes_on_as(self, ids: Told) -> bool:
        """Whether a prompt begins with all that stands here."""
        start = len(self.prompt_ids)
        return ids[:start] == self.prompt_ids and list(ids[start : start + len(self.token_ids)]) == self.token_ids

    def add(self, ids: Sequence[int], *, own: bool) -> None:
        self.token_ids.extend(ids)
        self.own.extend([own] * len(ids))

    def cut(self, limit: int) -> "_Segment":
        """No longer than that, prompt included."""
        kept = max(0, limit - len(self.prompt_ids))
        return _Segment(self.prompt_ids, self.token_ids[:kept], self.own[:kept])


class Telling:
    """Tells rows in ids."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: SftConfig,
        *,
        end_ids: Collection[int],
        positions: int,
        vocab_size: int,
        variables: Mapping[str, Any],
    ) -> None:
        """`end_ids`: what a policy ends a turn with. `positions`, `vocab_size`: of the model. `variables`: for the chat
        template."""
        self._tokenizer, self._config = tokenizer, config
        self._end_ids, self._vocab_size = end_ids, vocab_size
        self._limit = min(config.max_length or positions, positions)
        self._variables = {name: value for name, value in variables.items() if name != "continue_final_message"}

    def examples(self, rows: SupervisedRows) -> list[Example | None]:
        """One a row; None where nothing that is learned is left of it within `sft.max_length`. DatasetError, naming it,
        for a row that cannot be learned, or is too long."""
        return [
            self._example(row, said, rows.dataset.source) for row, said in zip(rows.dataset, rows.said, strict=True)
        ]

    def _example(self, row: PromptRow, said: Said, source: str) -> Example | None:
        where = f"{source}: row {row.row}" if row.line is None else f"{source}:{row.line}"
        try:
            segments = self._of_text(row, said) if isinstance(said, str) else self._of_messages(row, said)
        except InputError as error:
            raise DatasetError(f"{where}: the row cannot be rendered: {error}") from error
        self._check_ids(segments, where)
        longest = max(len(each.prompt_ids) + len(each.token_ids) for each in segments)
        if longest > self._limit and self._config.max_length is None:
            raise DatasetError(
                f"{where}: the row has {longest} tokens, but the model has {self._limit} positions; shorten it, or "
                "give sft.max_length, at which rows are cut"
            )
        kept = [each for each in (each.cut(self._limit) for each in segments) if any(each.own)]
        return None if not kept else _joined(kept, _text_of(said, self._tokenizer, kept), is_cut=longest > self._limit)

    def _of_text(self, row: PromptRow, said: str) -> list[_Segment]:
        prompt_ids = encode_prompt(self._tokenizer, row.prompt)
        ids = self._ended(self._tokenizer.encode(said, add_special_tokens=False))
        if not self._config.completion_only_loss:
            return [_whole([*prompt_ids, *ids])]
        return [_Segment(tuple(prompt_ids), ids, [True] * len(ids))]

    def _of_messages(self, row: PromptRow, said: Sequence[Mapping[str, Any]]) -> list[_Segment]:
        messages = [*row.prompt, *said]
        variables = {**self._variables, **({"tools": row.columns["tools"]} if row.columns.get("tools") else {})}
        if not self._config.assistant_only_loss:
            told = self._tokenizer.apply_chat_template(messages, add_generation_prompt=False, **variables)
            return [_whole(self._tokenizer.encode(told, add_special_tokens=False))]
        segments: list[_Segment] = []
        for place, message in enumerate(messages):
            if place < len(row.prompt) or message["role"] != "assistant":
                continue
            prompt_ids = tuple(encode_prompt(self._tokenizer, messages[:place], **variables))
            if segments and segments[-1].goes_on_as(prompt_ids):
                last = segments[-1]
                last.add(prompt_ids[len(last.prompt_ids) + len(last.token_ids) :], own=False)
            else:
                segments.append(_Segment(prompt_ids, [], []))
            segments[-1].add(self._turn(messages[:place], message, prompt_ids, variables), own=True)
        return segments

    def _turn(
        self,
        before: Sequence[Mapping[str, Any]],
        message: Mapping[str, Any],
        prompt_ids: Told,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """What the policy is to say in a turn, its end included."""
        tell = self._tokenizer.apply_chat_template
        begun = tell(before, add_generation_prompt=True, **variables)
        told = tell([*before, message], add_generation_prompt=False, **variables)
        if told.startswith(begun):
            text = told[len(begun) :]
        elif message.get("tool_calls"):
            raise InputError(
                "the chat template tells the call of a tool otherwise than where the assistant begins to speak, so "
                "that it is not known what is to be said there; use a template that does not"
            )
        else:
            text = _spoken(message, opened_thought(self._tokenizer, before, prompt_ids))
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        ends = [place for place, id_ in enumerate(ids) if id_ in self._end_ids]
        return ids[: ends[-1] + 1] if ends else self._ended(ids)

    def _ended(self, ids: list[int]) -> list[int]:
        """With what ends a turn."""
        if ids and ids[-1] in self._end_ids:
            return ids
        eos = self._tokenizer.eos_token_id
        return [*ids, eos if eos in self._end_ids and eos is not None else min(self._end_ids)]

    def _check_ids(self, segments: Sequence[_Segment], where: str) -> None:
        for ids in (ids for each in segments for ids in (each.prompt_ids, each.token_ids)):
            if ids and max(ids) >= self._vocab_size:
                raise DatasetError(
                    f"{where}: the row has the token {max(ids)}, but the model's embedding ends at "
                    f"{self._vocab_size - 1}; enlarge the embedding, or leave the token out"
                )


def _spoken(message: Mapping[str, Any], opened: str) -> str:
    """A message as it is said, thoughts first, behind what the prompt has said of them."""
    text: str = message.get("content") or ""
    thoughts = next((message[key] for key in REASONING if message.get(key)), None)
    if thoughts is not None:
        text = f"<think>\n{thoughts}\n</think>\n\n{text}"
    return text.removeprefix(opened) if opened else text


def _whole(ids: Sequence[int]) -> _Segment:
    """All that can be learned of a text: each token but the first."""
    return _Segment(tuple(ids[:1]), list(ids[1:]), [True] * (len(ids) - 1))


def _joined(segments: Sequence[_Segment], text: str, *, is_cut: bool) -> Example:
    tokens: list[int] = []
    observed: list[tuple[int, int]] = []
    rows: list[RowStart] = []
    for number, each in enumerate(segments):
        if number:
            rows.append(RowStart(start=len(tokens), prompt_ids=each.prompt_ids))
        for place, own in enumerate(each.own):
            at = len(tokens) + place
            if not own and observed and observed[-1][1] == at:
                observed[-1] = (observed[-1][0], at + 1)
            elif not own:
                observed.append((at, at + 1))
        tokens += each.token_ids
    return Example(
        prompt_ids=segments[0].prompt_ids,
        tokens=array("i", tokens),
        observed=tuple(observed),
        rows=tuple(rows),
        text=text,
        is_cut=is_cut,
    )


def _text_of(said: Said, tokenizer: Tokenizer, segments: Sequence[_Segment]) -> str:
    """For people."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return said[0].get("content") or ""
    return tokenizer.decode_sampled([id_ for each in segments for id_ in each.token_ids])


class SupervisedSteps:
    """The supervised steps at the beginning of a run: which row stands in which place, and the group that it makes."""

    def __init__(
        self,
        dataset: PromptDataset,
        examples: Sequence[Example],
        *,
        steps: int,
        batch_size: int,
        order: Callable[[int], Sequence[int]],
        left_out: int = 0,
        held_out: Sequence[Example] = (),
    ) -> None:
        """`order`: epoch → permutation of the rows. `left_out`: how many others there are, of which nothing is
        learned. `held_out`: rows that are measured alone."""
        self.steps, self.examples, self.left_out, self.held_out = steps, examples, left_out, held_out
        self.dataset, self._batch_size, self._order = dataset, batch_size, order

    def place(self, number: int) -> tuple[int, int]:
        """Epoch and row of the element of the stream that stands at step · P + place."""
        epoch, position = divmod(number, len(self.dataset))
        return epoch, self._order(epoch)[position]

    def epoch(self, version: int) -> float:
        """How often rows have been seen."""
        return version * self._batch_size / len(self.dataset)

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(each.prompt_ids) for each in self.examples)

    @property
    def longest_completion(self) -> int:
        """Tokens that follow on a prompt, in a row of their own."""
        return max(each.longest_completion for each in self.examples)

    @property
    def longest_history(self) -> int:
        """Tokens of the longest prompt amid an example; 0: each is one row."""
        return max(each.longest_history for each in self.examples)

    @property
    def cut(self) -> int:
        """Rows of which something is missing."""
        return sum(each.is_cut for each in self.examples)
