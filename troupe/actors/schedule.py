"""Which prompt stands in which slot, and how many steps a run has: pure functions of the config and the dataset.

The prompts form one endless stream, epoch after epoch, each epoch a permutation of the rows drawn from the seed.
Step k, place j is element k·P + j of that stream, so the cursor of a run is derived from k alone, no row is left out
at the end of an epoch, and every step is full. Replacements (attempt ≥ 1) come from a stream of their own for every
step, so they do not shift the others. With a curriculum that says which rows a step has.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec

from troupe.actors.curriculum import Curriculum
from troupe.actors.generator.engines.settings import EngineConfig, check_engines
from troupe.actors.supervised import SupervisedSteps
from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import ConfigError, DatasetError, InputError
from troupe.messages import Prompt, PromptText, ScoredGroup, Slot
from troupe.policy import Tokenizer, encode_prompt

_ATTEMPT_STRIDE = 1 << 48
_SHOWN = 400  # characters of a prompt

OnStale = Literal["drop", "requeue", "correct"]
"""`drop`: they are left out of the loss, and a step that would have nothing else has a row sampled anew. `requeue`: the
group's prompt is sampled anew in place of the group, once; the second time its old tokens are dropped. `correct`: they
are trained on, and the importance correction weighs them."""


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[schedule]` section: how old the weights may be that a trained token was sampled from."""

    mode: Literal["pinned", "free"] = "pinned"
    """`pinned`: step k is generated with exactly policy version max(0, k − max_staleness), and a seed gives the same
    weights bit for bit. `free`: with the newest weights, which are exchanged amid completions, and a step is made of
    the groups that are scored first; fastest, but not reproducible."""
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 0
    """η, how many versions old the weights may be that a trained token was sampled from; at most (η + 1)·P groups are
    alive. 0 is strictly on-policy; with 1, generation of a step overlaps scoring and learning of the step before."""
    on_stale: OnStale = "drop"
    """In `free`, what becomes of tokens that are older when their step begins."""
    generator: Literal["auto", "thread", "process"] = "auto"
    """Where the generator runs: in a thread of the training process, or in processes of its own. `auto`: a process
    where it works beside the learner (max_staleness ≥ 1) on a CPU, whose threads MLX keeps from overlapping, or where
    several of them share its work; else a thread. Beside the learner it goes, with one device and no `memory_limit_gb`,
    where `troupe doctor --measure` found that the two overlap clearly better, and the run says so."""
    generator_processes: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Processes that decode, where the generator is a process: each takes one part of a step after another. None: 1;
    but on a CPU with max_staleness 0 one a core, where the work is worth it and the weights are light (128 MB), if
    neither `generator`, `blas_threads` nor `memory_limit_gb` is given. How many there are changes no bit of a pinned
    run whose `parts` stay the same."""
    parts: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Into how many parts a pinned step is cut: the prompts whose place is the same modulo `parts` are decoded
    together, beside no others, by whoever is free. It decides bits, as what is decoded together rounds together; who
    decodes does not. At most `batch_size`. None: as many as processes decode. The free schedule has no parts."""
    blas_threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Threads of OpenBLAS, in the training process and in each of the generator's; None: on a CPU as many as it takes
    by itself, divided among the processes that work at the same time, or among `parts` where those are given. Matrix
    products may be rounded differently with another number of them."""
    learner_streams: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Micro-batches that the learner differentiates at a time, each on a core of its own with one thread of OpenBLAS;
    at least as many are made where `gradient_accumulation_steps` is not given. None: on a CPU as many as there are
    cores for it if the work is worth it, but 1 where the generator works in the same process meanwhile. On a GPU it is
    always 1. Give 1 where several runs share one process and are to be reproducible: OpenBLAS belongs to all."""
    learner_ranks: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Processes that learn a batch together, each its share of the `learner.lanes`, a power of two. None: on NVIDIA
    cards as many as there are cards for them; elsewhere 1."""
    devices: tuple[str, ...] = ()
    """Which card does what, as "0:learner,generator": a rank of the learner has a card of its own, processes of the
    generator take theirs in turn. Empty: where `learner.lanes` is above 1, ranks on the first cards, generators on the
    others, or on all of them."""
    rank_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds after which a rank that is not heard of, or ranks that all wait for each other, end the run."""
    engines: tuple[EngineConfig, ...] = ()
    """External engines that complete prompts in the free schedule: one table `[[schedule.engines]]` each; see
    docs/engines.md. With `generator` left out they alone do, with "process" one of ours beside them."""
    watchdog_s: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    """Seconds without movement after which an incident says who waits for what; 0: never."""

    def __post_init__(self) -> None:
        check_engines(self.engines, self.mode, self.generator)
        if self.generator == "thread" and (self.generator_processes or 1) > 1:
            raise ValueError(
                f"schedule.generator_processes is {self.generator_processes}, but schedule.generator is 'thread'; set "
                "it to 'process', or leave one of the two out"
            )
        if self.generator == "thread" and self.max_staleness and (self.learner_streams or 1) > 1:
            raise ValueError(
                f"schedule.learner_streams is {self.learner_streams}, but with max_staleness {self.max_staleness} the "
                "generator works in a thread beside the learner; set schedule.generator to 'process', or leave one out"
            )

    @property
    def engines_alone(self) -> bool:
        """Whether nobody here decodes."""
        return bool(self.engines) and self.generator == "auto"


class PromptSchedule:
    """The endless stream of prompts, addressed by slot."""

    def __init__(
        self,
        dataset: PromptDataset,
        prompt_ids: Sequence[tuple[int, ...]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        opened: Callable[[PromptText, tuple[int, ...]], str] = lambda prompt, ids: "",
        curriculum: Curriculum | None = None,
        supervised: SupervisedSteps | None = None,
    ) -> None:
        """`opened`: what a prompt, with these ids, has written of the thoughts. `curriculum`: chooses the rows, by
        what came of them; None: each epoch has all of them. `supervised`: the steps at the beginning that are not
        sampled; the stream of prompts begins after them."""
        self.batch_size = batch_size
        self.curriculum = curriculum
        self.supervised = supervised
        self._begins = 0 if supervised is None else supervised.steps
        self.rows = len(dataset)
        """Prompts an epoch."""
        self._seed = seed
        self._dataset = dataset
        self._prompt_ids = prompt_ids
        self._opened = opened
        # only the epochs that the live groups touch are asked for, always the newest few
        self._order = lru_cache(maxsize=4)(lambda epoch: dataset.order(seed, epoch, shuffle=shuffle))

    @property
    def end(self) -> int | None:
        """The first step that there are no prompts for; None: there is no end."""
        return None if self.curriculum is None else self.curriculum.end

    def prompt(self, slot: Slot, *, round_size: int | None = None, row: int | None = None) -> Prompt:
        """The prompt of a slot, with the gid that the slot determines.

        `round_size`: prompts of the slot's step and attempt; None for a whole step. `row`: the dataset row where it is
        not the slot that says which, because an earlier attempt is repeated.
        """
        if self.supervised is not None and slot.step < self._begins:
            return self._given_prompt(slot, self.supervised)
        if row is None:
            row = self._row(slot)
        return Prompt(
            gid=self.gid(slot),
            slot=slot,
            epoch=((slot.step - self._begins) * self.batch_size + slot.place) // self.rows,
            row=row,
            prompt=self._dataset[row].prompt,
            prompt_ids=self._prompt_ids[row],
            columns=self._dataset[row].columns,
            opened=self._opened(self._dataset[row].prompt, self._prompt_ids[row]),
            round_size=self.batch_size if round_size is None else round_size,
        )

    def gid(self, slot: Slot) -> int:
        """The unique number of the group in a slot."""
        return slot.step * self.batch_size + slot.place + slot.attempt * _ATTEMPT_STRIDE

    def _given_prompt(self, slot: Slot, supervised: SupervisedSteps) -> Prompt:
        epoch, row = supervised.place(slot.step * self.batch_size + slot.place)
        return Prompt(
            gid=self.gid(slot),
            slot=slot,
            epoch=epoch,
            row=row,
            prompt=supervised.dataset[row].prompt,
            prompt_ids=supervised.examples[row].prompt_ids,
            columns=supervised.dataset[row].columns,
            round_size=self.batch_size,
        )

    def given(self, prompt: Prompt) -> ScoredGroup | None:
        """The group of a prompt whose completion is given; None: it is to be sampled."""
        if self.supervised is None or prompt.slot.step >= self._begins:
            return None
        return self.supervised.examples[prompt.row].group(prompt)

    def epoch(self, version: int) -> float:
        """How often the rows of its kind of step have been seen with a version."""
        if self.supervised is not None and version <= self._begins:
            return self.supervised.epoch(version)
        return (version - self._begins) * self.batch_size / self.rows

    def _row(self, slot: Slot) -> int:
        if self.curriculum is not None:
            return self.curriculum.row(slot)
        return self._replacement(slot) if slot.attempt else self._in_stream(slot.step, slot.place)

    def _in_stream(self, step: int, place: int) -> int:
        """The row of the first attempt."""
        epoch, position = divmod((step - self._begins) * self.batch_size + place, self.rows)
        return self._order(epoch)[position]

    def _replacement(self, slot: Slot) -> int:
        """The row of a later attempt: element (attempt − 1)·P + place of the step's replacements."""
        index = (slot.attempt - 1) * self.batch_size + slot.place
        return next(islice(self._replacements(slot.step), index, None))

    def _replacements(self, step: int) -> Iterator[int]:
        """Rows in random order, without end: none twice, and none of the step itself, before all have been there.

        `random.Random` is seeded by sha256("troupe.schedule/replacements/SEED/STEP") as a big-endian integer; Python
        promises to keep its `random()`.
        """
        key = hashlib.sha256(f"troupe.schedule/replacements/{self._seed}/{step}".encode()).digest()
        dice = random.Random(int.from_bytes(key, "big"))
        shown = {self._in_stream(step, place) for place in range(self.batch_size)}
        while True:
            if len(shown) == self.rows:
                shown = set()
            row = int(dice.random() * self.rows)
            if row not in shown:
                shown.add(row)
                yield row


def count_steps(rows: int, *, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Learner batches of a whole run: enough to show every row `epochs` times; `max_steps` overrides, as in TRL."""
    return math.ceil(rows * epochs / batch_size) if max_steps is None else max_steps


def tokenize_prompts(
    dataset: PromptDataset,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    max_tokens: int,
    vocab_size: int | None = None,
    keeps_unknown: bool = False,
    tell: Callable[[PromptText, Mapping[str, Any]], Sequence[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of every row, all below `vocab_size`, the rows of the model's embedding (None: not looked at).

    Raises DatasetError naming the first row that is longer than `max_tokens` or empty, that the chat template refuses,
    or that has an id which the model does not know; ConfigError for a variable that the template never refers to.
    `keeps_unknown` leaves such a variable out instead, as a run did that was begun when they did nothing. `tell`:
    prompt and columns → ids, where it is not the tokenizer alone that says them.
    """
    variables = dict(config.chat_template_kwargs)
    if "messages" in variables:
        raise ConfigError("data.chat_template_kwargs.messages: the messages are those of the dataset; remove the key")
    if variables and any(not isinstance(row.prompt, str) for row in dataset):
        unknown = tokenizer.unknown_variables(**variables)
        if unknown and not keeps_unknown:
            told = tokenizer.explain_unknown(unknown[0], **variables)
            raise ConfigError(f"data.chat_template_kwargs.{unknown[0]}: {told}")
        variables = {name: value for name, value in variables.items() if name not in unknown}
    encoded = []
    for row in dataset:
        where = f"{dataset.source}: row {row.row}" if row.line is None else f"{dataset.source}:{row.line}"
        try:
            ids = tell(row.prompt, row.columns) if tell else encode_prompt(tokenizer, row.prompt, **variables)
        except InputError as error:
            raise DatasetError(f"{where}: the prompt cannot be rendered: {error}") from error
        if not ids:
            raise DatasetError(f"{where}: the prompt has no tokens; give it some text")
        if vocab_size is not None and max(ids) >= vocab_size:
            unheld = next(id_ for id_ in ids if id_ >= vocab_size)
            token = tokenizer.decode([unheld], skip_special_tokens=False)
            raise DatasetError(
                f"{where}: the prompt has the token {unheld} ({token!r}), but the model's embedding ends at "
                f"{vocab_size - 1} (vocab_size is {vocab_size}); enlarge the embedding, or leave the token out"
            )
        if len(ids) > max_tokens:
            if max_tokens == config.max_prompt_tokens:
                limit, remedy = f"data.max_prompt_tokens allows {max_tokens}", "raise that"
            else:
                limit, remedy = f"at most {max_tokens} fit beside a completion", "use a model with more positions"
            raise DatasetError(
                f"{where}: the prompt has {len(ids)} tokens, {limit}; shorten it, remove the row, or {remedy}"
            )
        encoded.append(tuple(ids))
    return encoded


def describe_prompts(dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> str:
    """How many there are, of which lengths, with which columns, and the first one as the model reads it; two lines."""
    count, lengths = dataset.in_all, [len(ids) for ids in prompt_ids]
    spread = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
    columns = ", ".join(sorted(dataset.columns)) or "none"
    first = tokenizer.decode(prompt_ids[0], skip_special_tokens=False)
    if len(first) > _SHOWN:
        first = f"{first[: _SHOWN // 2]} … {first[-_SHOWN // 2 :]}"
    seen = f" (in the first {len(dataset)}, the others were not made)" if len(dataset) < count else ""
    return (
        f"{count} prompt{'s' if count > 1 else ''} of {spread} tokens{seen} from {dataset.source}; "
        f"columns for rewards: {columns}\nthe first one, as the model reads it: {first!r}"
    )


def think_notices(tokenizer: Tokenizer, opened: str) -> list[str]:
    """What is to be known of how completions think, for the reward `think_format`; `opened` is of the first prompt."""
    if any(tokenizer.decode([id_], skip_special_tokens=False) == "</think>" for id_ in tokenizer.special_ids):
        return [
            "the tokenizer takes </think> for a special token, so completions lose it, and think_format is always 0"
        ]
    if opened:
        return ["the prompts open <think> themselves, and think_format counts that: completions need only </think>"]
    return []
