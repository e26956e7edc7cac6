"""The supervised steps of a run: which rows they learn, and how many they are."""

from functools import lru_cache

import msgspec

from troupe.actors.schedule import count_steps
from troupe.actors.supervised import SupervisedSteps, Telling
from troupe.dataset import SupervisedRows
from troupe.errors import ConfigError
from troupe.policy import Policy, Tokenizer
from troupe.run.config import RunConfig

_SHOWN = 400
"""Characters of a text."""


def read_supervised(config: RunConfig, first: int | None) -> SupervisedRows | None:
    """The rows that a run imitates, or the `first` of them; None where it does not. DatasetError for what cannot be
    used."""
    path = config.data.path if config.task == "sft" else config.warm_start.path
    return None if path is None else SupervisedRows.load(path, config.data, config.sft, first=first)


def supervised_steps(rows: SupervisedRows, config: RunConfig, policy: Policy) -> SupervisedSteps:
    """The rows in ids, and how many steps have them. DatasetError for a row that cannot be learned."""
    policy.check_stop_ids()
    telling = Telling(
        policy.tokenizer,
        config.sft,
        end_ids=policy.eos_ids,
        positions=policy.config.max_position_embeddings,
        vocab_size=policy.config.vocab_size,
        variables=config.data.chat_template_kwargs,
    )
    dataset, learner = rows.dataset, config.learner
    if config.task == "sft":
        counted = {"epochs": learner.epochs, "max_steps": learner.max_steps}
    else:
        counted = {"epochs": 1, "max_steps": config.warm_start.steps}
    return SupervisedSteps(
        dataset,
        telling.examples(rows),
        steps=count_steps(dataset.in_all, batch_size=learner.batch_size, **counted),  # type: ignore[arg-type]
        batch_size=learner.batch_size,
        order=lru_cache(maxsize=4)(lambda epoch: dataset.order(config.seed, epoch, shuffle=config.data.shuffle)),
    )


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
    if supervised is None or not supervised.cut:
        return []
    return [
        f"{supervised.cut} of {len(supervised.examples)} rows are longer than sft.max_length, and are cut at their end"
    ]


def describe(supervised: SupervisedSteps, tokenizer: Tokenizer) -> list[str]:
    """How many rows there are, of which lengths, and the first one; in lines."""
    first, count = supervised.examples[0], len(supervised.examples)
    tokens = sum(len(each.token_ids) - sum(b - a for a, b in each.observed) for each in supervised.examples)
    prompt, said = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (first.prompt_ids, first.token_ids))
    return [
        f"{count} row{'s' if count > 1 else ''} to learn from {supervised.source}, {supervised.steps} steps: prompts "
        f"of up to {supervised.longest_prompt} tokens, {tokens} tokens of completions, up to "
        f"{supervised.longest_completion}",
        f"the first one, as the model reads it: {_short(prompt)!r}, and as it learns it: {_short(said)!r}",
    ]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
