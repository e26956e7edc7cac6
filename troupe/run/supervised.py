"""The supervised steps of a run: which rows they learn, and how many they are."""

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from troupe.actors.schedule import count_steps
from troupe.actors.supervised import Example, SupervisedSteps, Telling
from troupe.dataset import PromptDataset, SupervisedRows
from troupe.errors import ConfigError, DatasetError
from troupe.policy import Policy, Tokenizer
from troupe.run.config import RunConfig

_SHOWN = 400
"""Characters of a text."""


def read_supervised(config: RunConfig, first: int | None) -> SupervisedRows | None:
    """The rows that a run imitates, or the `first` of them; None where it does not. DatasetError for what cannot be
    used."""
    path = config.data.path if config.task == "sft" else config.warm_start.path
    if path is None:
        if config.sft.eval_dataset is not None:
            raise ConfigError(
                f"sft.eval_dataset is {config.sft.eval_dataset!r}, but no step is supervised, so that nothing would be "
                "measured; give warm_start.path, or leave it out (held-out prompts: data.eval_path)"
            )
        return None
    rows = SupervisedRows.load(path, config.data, config.sft, first=first)
    if config.sft.eval_dataset is None:
        return rows
    held_out = SupervisedRows.load(config.sft.eval_dataset, config.data, config.sft, first=first)
    return msgspec.structs.replace(rows, held_out=held_out)


def supervised_steps(rows: SupervisedRows, config: RunConfig, policy: Policy) -> SupervisedSteps:
    """The rows in ids, and how many steps have them. DatasetError for a row that cannot be learned, or where
    there is none."""
    policy.check_stop_ids()
    telling = Telling(
        policy.tokenizer,
        config.sft,
        end_ids=policy.eos_ids,
        positions=policy.config.max_position_embeddings,
        vocab_size=policy.config.vocab_size,
        variables=config.data.chat_template_kwargs,
    )
    learner, examples = config.learner, telling.examples(rows)
    held_out = [] if rows.held_out is None else _held_out(telling.examples(rows.held_out), rows.held_out)
    dataset, told = _kept(rows.dataset, examples), [each for each in examples if each is not None]
    if config.task == "sft":
        counted = {"epochs": learner.epochs, "max_steps": learner.max_steps}
    else:
        counted = {"epochs": 1, "max_steps": config.warm_start.steps}
    return SupervisedSteps(
        dataset,
        told,
        steps=count_steps(dataset.in_all, batch_size=learner.batch_size, **counted),  # type: ignore[arg-type]
        batch_size=learner.batch_size,
        order=lru_cache(maxsize=4)(lambda epoch: dataset.order(config.seed, epoch, shuffle=config.data.shuffle)),
        left_out=len(examples) - len(told),
        held_out=held_out,
    )


def _held_out(examples: Sequence[Example | None], rows: SupervisedRows) -> list[Example]:
    told = [each for each in examples if each is not None]
    if not told:
        raise DatasetError(f"{rows.dataset.source}: nothing that is learned is left within sft.max_length; raise it")
    return told


def _kept(dataset: PromptDataset, examples: Sequence[Example | None]) -> PromptDataset:
    """The rows of which something is learned. DatasetError where there are none."""
    if None not in examples:
        return dataset
    rows = [row for row, example in zip(dataset, examples, strict=True) if example is not None]
    if not rows:
        raise DatasetError(f"{dataset.source}: nothing that is learned is left within sft.max_length; raise it")
    return PromptDataset(rows, dataset.source, dataset.in_all - len(dataset) + len(rows))


def with_warm_steps(config: RunConfig, supervised: SupervisedSteps | None) -> RunConfig:
    """With the number of steps of a warm start, where there is one."""
    if supervised is None or config.task == "sft":
        return config
    return msgspec.structs.replace(
        config, warm_start=msgspec.structs.replace(config.warm_start, steps=supervised.steps)
    )


def all_steps(config: RunConfig, rows: int, supervised: SupervisedSteps | None) -> int:
    """Of the whole run; `rows`: those that are sampled."""
    if supervised is not None and config.task == "sft":
        return supervised.steps
    learner = config.learner
    sampled = count_steps(rows, batch_size=learner.batch_size, epochs=learner.epochs, max_steps=learner.max_steps)
    return sampled + (0 if supervised is None else supervised.steps)


def check_unsampled(config: RunConfig, *, acts: bool) -> None:
    """ConfigError for what a run without sampled steps has no use for."""
    if config.task == "sft" and acts:
        raise ConfigError(
            'task is "sft", in which nothing is sampled, but there is an environment or a tool; leave it out (rows may '
            "have a column `tools`, which the chat template is told)"
        )


def notices(supervised: SupervisedSteps | None) -> list[str]:
    """What to tell of rows that are not learned whole."""
    if supervised is None:
        return []
    told = []
    if supervised.cut:
        told.append(
            f"{supervised.cut} of {len(supervised.examples)} rows are longer than sft.max_length, and are cut at their "
            "end"
        )
    if supervised.left_out:
        told.append(f"{supervised.left_out} rows are left out: nothing of them is learned within sft.max_length")
    learned = {(each.prompt_ids, each.token_ids) for each in supervised.examples} if supervised.held_out else set()
    if known := sum((each.prompt_ids, each.token_ids) in learned for each in supervised.held_out):
        told.append(
            f"{known} of {len(supervised.held_out)} held-out rows (sft.eval_dataset) are learned, too, so that their "
            "loss says nothing of rows that are not; leave them out of one of both"
        )
    return told


def describe(supervised: SupervisedSteps, tokenizer: Tokenizer) -> list[str]:
    """How many rows there are, of which lengths, and the first one; in lines."""
    first, count = supervised.examples[0], len(supervised.examples)
    tokens = sum(len(each.token_ids) - sum(b - a for a, b in each.observed) for each in supervised.examples)
    prompt, said = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (first.prompt_ids, first.token_ids))
    held_out = len(supervised.held_out)
    return [
        f"{count} row{'s' if count > 1 else ''} to learn from {supervised.dataset.source}, {supervised.steps} steps: "
        f"prompts of up to {supervised.longest_prompt} tokens, {tokens} tokens of completions, up to "
        f"{supervised.longest_completion}",
        f"the first one, as the model reads it: {_short(prompt)!r}, and as it learns it: {_short(said)!r}",
        *([f"held out: the loss of {held_out} row{'s' if held_out > 1 else ''} is measured"] if held_out else []),
    ]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
