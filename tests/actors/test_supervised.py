"""Rows to imitate as ids, and what is learned of them: as TRL 1.16's SFTTrainer has it."""

from __future__ import annotations

import json
import math
import shutil
from array import array
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support.runs import write_jsonl
from tests.support.trl import assert_close
from troupe.actors.learner.batch import CompletionLogProbs, assemble_given
from troupe.actors.learner.held_out import HeldOutRows
from troupe.actors.supervised import Example, SupervisedSteps, Telling
from troupe.cli.demo import DEMO_CONFIG
from troupe.dataset import DataConfig, SftConfig, SupervisedRows
from troupe.errors import DatasetError
from troupe.grpo import LearnerConfig
from troupe.grpo.batch_gradient import BatchGradient
from troupe.grpo.supervised import Supervision
from troupe.messages import Prompt, ScoredGroup, Slot
from troupe.policy import Policy, load_policy

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "trl" / "sft.json").read_text())
TOLERANCE = 1e-5
ENDS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
NEXT = "{% if add_generation_prompt %}<assistant>{% endif %}"


def demo_with(template: str, folder: Path) -> Policy:
    """The policy of the demo, which has no template, with one."""
    shutil.copytree(DEMO_CONFIG.parent / "policy", folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_policy(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return demo_with(VECTORS["template"], tmp_path_factory.mktemp("demo") / "policy")


def told(
    policy: Policy, rows: list[dict[str, Any]], folder: Path, data: DataConfig | None = None, **settings: Any
) -> list[Example]:
    path = write_jsonl(folder / "rows.jsonl", rows)
    telling = Telling(
        policy.tokenizer,
        SftConfig(**settings),
        end_ids=policy.eos_ids,
        positions=64,
        vocab_size=policy.config.vocab_size,
        variables={},
    )
    examples = telling.examples(SupervisedRows.load(str(path), data or DataConfig()))
    return [each for each in examples if each is not None]


def group_of(example: Example, place: int) -> ScoredGroup:
    return example.group(
        Prompt(
            gid=place,
            slot=Slot(step=0, place=place),
            epoch=0,
            row=place,
            prompt="",
            prompt_ids=example.prompt_ids,
            columns={},
        )
    )


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_loss_and_gradients_are_those_of_trl(case: dict[str, Any], policy: Policy, tmp_path: Path) -> None:
    settings = dict(case["settings"])
    parts = settings.pop("gradient_accumulation_steps", 1)
    examples = told(policy, case["rows"], tmp_path, **settings)
    batch = assemble_given([group_of(each, i) for i, each in enumerate(examples)], pad_id=256).batch
    lines = {
        tuple(line[: len(line) - _padding(line, labels)])
        for line, labels in zip(case["ids"], case["labels"], strict=True)
    }
    assert {(*p, *c) for p, c in zip(batch.prompts, batch.completions, strict=True)} == lines
    learned = sum(label != -100 for labels in case["labels"] for label in labels[1:])
    assert float(batch.completion_mask.sum()) == learned

    config = Supervision(steps=1, max_completion_length=40).config(LearnerConfig(gradient_accumulation_steps=parts))
    gradient = BatchGradient(
        policy.weights,
        batch,
        CompletionLogProbs(policy.config, 1.0, entropy_gradient=False, margins=True),
        config,
        ref_weights=None,
        max_completion_length=40,
        streams=(),
    )
    grads, values = gradient.at(policy.weights, 0.0, 0)
    assert_close(values["loss"].item(), case["loss"], TOLERANCE)
    counts = [
        sum(label != -100 for labels in part for label in labels[1:]) for part in _in_parts(case["labels"], parts)
    ]
    for figure, tolerance in (("mean_token_accuracy", 1e-7), ("entropy", TOLERANCE)):
        theirs = sum(value * count for value, count in zip(case[figure], counts, strict=True)) / learned
        assert_close(values[figure].item(), theirs, tolerance)
    held_out = HeldOutRows(examples, every=None, pad_id=256, most_places=40).measure(
        policy.weights, CompletionLogProbs(policy.config, 0.5)
    )
    assert_close(held_out["eval_loss"], case["loss"], TOLERANCE)
    assert held_out["eval_mean_token_accuracy"] == pytest.approx(values["mean_token_accuracy"].item(), abs=1e-7)
    whole = math.hypot(*case["norms"].values())
    for name, norm in case["norms"].items():
        assert_close(float(mx.linalg.norm(grads[name])), norm, TOLERANCE, scale=whole)
    assert_close(grads[VECTORS["kept"]][:2].tolist(), case["grad"], TOLERANCE, scale=whole)


def _in_parts(rows: list[Any], parts: int) -> list[list[Any]]:
    size = len(rows) // parts
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _padding(ids: list[int], labels: list[int]) -> int:
    """How many tokens at the end are none of the row."""
    count = 0
    while ids[-1 - count] == 256 and labels[-1 - count] == -100:
        count += 1
    return count


def test_a_turn_that_stands_in_the_row_goes_on_and_one_that_is_told_otherwise_has_its_own(tmp_path: Path) -> None:
    """As Qwen3's template does with thoughts: of earlier turns they are left out."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    kept = demo_with(ENDS + NEXT, tmp_path / "kept")
    (example,) = told(kept, [{"messages": messages}], tmp_path)
    text = kept.tokenizer.decode(example.token_ids, skip_special_tokens=False)
    assert text == "b<|endoftext|><user>c<|endoftext|><assistant>d<|endoftext|>"
    assert not example.rows
    ((start, stop),) = example.observed
    assert kept.tokenizer.decode(example.token_ids[start:stop], False) == "<user>c<|endoftext|><assistant>"

    dropping = (
        ENDS.replace("{{ m.content }}", "{% if m.role == 'user' or loop.last %}!{% endif %}{{ m.content }}") + NEXT
    )
    forked = demo_with(dropping, tmp_path / "forked")
    (example,) = told(forked, [{"messages": messages}], tmp_path)
    assert forked.tokenizer.decode(example.token_ids, False) == "!b<|endoftext|>!d<|endoftext|>"
    (row,) = example.rows
    assert (row.start, example.observed) == (3, ())
    assert (
        forked.tokenizer.decode(row.prompt_ids, False)
        == "<user>!a<|endoftext|><assistant>b<|endoftext|><user>!c<|endoftext|><assistant>"
    )
    batch = assemble_given([group_of(example, 0)], pad_id=256).batch
    assert batch.num_rows == 2
    assert float(batch.completion_mask.sum()) == 6


def test_thoughts_that_the_prompt_opens_are_not_said_again(tmp_path: Path) -> None:
    opening = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endfor %}"
    policy = demo_with(opening + "{% if add_generation_prompt %}<assistant><think>\n{% endif %}", tmp_path / "opens")
    rows = [
        {"prompt": [{"role": "user", "content": "1+1"}], "completion": f"{begun}one more</think>2"}
        for begun in ("", "<think>\n")
    ]
    for example in told(policy, rows, tmp_path):
        assert policy.tokenizer.decode(example.token_ids, False) == "one more</think>2<|endoftext|>"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a"}, 'has no "completion"'),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"prompt": "a", "completion": 3}, "the completion is a number"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begins with an answer"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "make both alike"),
        ({"prompt": "a", "completion": "b" * 70}, "has 72 tokens, but the model has 64 positions"),
    ],
)
def test_a_row_of_which_nothing_can_be_learned_is_named(
    row: dict[str, Any], why: str, policy: Policy, tmp_path: Path
) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DatasetError, match=why) as raised:
        told(policy, [good, row], tmp_path)
    assert "rows.jsonl:2" in str(raised.value)


def test_columns_may_have_other_names(policy: Policy, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "1+1=", "solution": "2", "level": 3}])
    rows = SupervisedRows.load(str(path), DataConfig(prompt_column="question"), SftConfig(completion_column="solution"))
    assert (rows.dataset[0].prompt, rows.said) == ("1+1=", ("2",))


def test_each_epoch_has_every_row(policy: Policy, tmp_path: Path) -> None:
    rows = SupervisedRows.load(
        str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": str(i), "completion": "b"} for i in range(5)])),
        DataConfig(),
    )
    examples = [Example(prompt_ids=(i,), tokens=array("i", [1]), text="b") for i in range(5)]
    steps = SupervisedSteps(
        rows.dataset, examples, steps=5, batch_size=2, order=lambda epoch: rows.dataset.order(3, epoch)
    )
    walk = [steps.place(number) for number in range(10)]
    assert [epoch for epoch, _ in walk] == [0] * 5 + [1] * 5
    assert sorted(row for _, row in walk[:5]) == sorted(row for _, row in walk[5:]) == list(range(5))
