"""TRL 1.16 and we play the same episodes with the same tools and environments: a policy that says what a script has.

The policy is a tokenizer of bytes and a list of turns for each sample, found again by a mark in its prompt; behind the
list it says that it is done. Compared are messages, ids, masks, rewards, and how often tools are called and fail.
Skipped where TRL (the extra `trl`) is not installed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.extras import extra
from tests.support.handles import PlainHandle
from tests.support.tiny import byte_symbols
from troupe.environments.calls import CallStyle, parse_turn, which_calls
from troupe.environments.turns import answer_turn, open_episode
from troupe.policy import Tokenizer
from troupe.policy.text.continuing import Continuer

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]

END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CALLS = "CALLS"
"""Where the calls of a turn stand, if not at its end."""
MOST_TOKENS, MOST_CALLING_TURNS = 900, 3


def multiply(a: int, b: int) -> int:
    """Multiplies.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


def fail(why: str) -> str:
    """Fails.

    Args:
        why: What to say.
    """
    raise ValueError(why)


def long(size: int) -> str:
    """Answers at length.

    Args:
        size: Letters.
    """
    return "x" * size


async def look_up(word: str) -> dict[str, str]:
    """Looks a word up.

    Args:
        word: Which.
    """
    await asyncio.sleep(0.01)
    return {"word": word}


class Counter:
    """Counts from where its row says."""

    count = 0

    def reset(self, start: int, **columns: Any) -> str:
        self.count = start
        return f" Start at {start}."

    def add(self, amount: int) -> str:
        """Adds to the count.

        Args:
            amount: How much.
        """
        if amount < 0:
            raise ValueError(f"{amount} is less than 0")
        self.count += amount
        return f"It is {self.count}."

    async def read(self) -> int:
        """Reads the count."""
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


Written = tuple[str, dict[str, Any]]
Script = list[tuple[str, list[Written]]]


def hermes(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def xml(name: str, arguments: dict[str, Any]) -> str:
    given = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def turn(style: CallStyle, script: Script, place: int) -> str:
    text, calls = script[place] if place < len(script) else ("Done.", [])
    written = "\n".join((hermes if style == "hermes" else xml)(*call) for call in calls)
    return (text.replace(CALLS, written) if CALLS in text else text + written) + END


FUNCTIONS: dict[str, Script] = {
    "answers at once": [("Four.", [])],
    "one call": [("", [("multiply", {"a": 2, "b": 3})]), ("Six.", [])],
    "thoughts": [("<think>\nhm\n</think>\n\n", [("multiply", {"a": 2, "b": 3})]), ("<think>\nso\n</think>\n\n6", [])],
    "async first": [
        ("Now. ", [("look_up", {"word": "a"}), ("multiply", {"a": 1, "b": 1}), ("look_up", {"word": "b"})])
    ],
    "errors": [("", [("fail", {"why": "it's so"}), ("nothing", {"x": 1}), ("multiply", {"a": 1}), ("look_up", {})])],
    "many turns": [("", [("multiply", {"a": n, "b": n})]) for n in range(6)],
    "too long": [("", [("multiply", {"a": 2, "b": 3})]), ("", [("long", {"size": 2 * MOST_TOKENS})]), ("Never.", [])],
    "cut": [("", [("multiply", {"a": 2, "b": 3})]), ("y" * 2 * MOST_TOKENS, [])],
    "cut behind": [(CALLS + "y" * 2 * MOST_TOKENS, [("multiply", {"a": 2, "b": 3})]), ("Never.", [])],
    "text behind": [(f"So: {CALLS}", [("multiply", {"a": 2, "b": 3})])],
}
ENVIRONMENT: dict[str, Script] = {
    "counts": [("", [("add", {"amount": 2}), ("read", {})]), ("", [("add", {"amount": 1})]), ("Three more.", [])],
    "fails": [
        ("", [("add", {"amount": -1}), ("multiply", {"a": 2, "b": 2})]),
        ("", [("reset", {"start": 9})]),
        ("No.", []),
    ],
}
TEMPLATES = ("qwen3_chat_template", "qwen3_instruct_2507_chat_template", "qwen3_5_nothink_chat_template")


class Played(NamedTuple):
    """What came of one sample."""

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    prompt_ids: list[int]
    ids: list[int]
    mask: list[int]
    reward: float | None


class Figures(NamedTuple):
    """Of all samples."""

    call_frequency: float
    failure_frequency: float


def write_tokenizer(folder: Path, template: str) -> Path:
    """Of bytes, with Qwen's special tokens and tags."""
    added = [
        {"id": 256 + index, "content": text, "special": text in SPECIAL}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for index, text in enumerate((*SPECIAL, *TAGS))
    ]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": bytes_of,
        "decoder": bytes_of,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    config = {"eos_token": END, "pad_token": SPECIAL[0], "chat_template": template}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def rows_of(scripts: dict[str, Script]) -> list[dict[str, Any]]:
    prompts = [[{"role": "system", "content": "S"}, {"role": "user", "content": f"[{name}] Go."}] for name in scripts]
    return [{"prompt": prompt, "start": index} for index, prompt in enumerate(prompts)]


def theirs(
    folder: Path, scripts: dict[str, Script], style: CallStyle, tools: list[Any], environment: Any
) -> tuple[list[Played], Figures]:
    """By a whole GRPOTrainer, whose policy is the script."""
    torch, transformers, trl = extra("torch"), extra("transformers"), pytest.importorskip("trl")
    seen: dict[str, Any] = {}

    def captured(completions: list[Any], **given: Any) -> list[float]:
        seen.update(given, completions=completions)
        return [0.0] * len(completions)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    class Scripted(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            said = []
            for ids in prompt_ids:
                text = tokenizer.decode(ids)
                script = scripts[re.findall(r"\[(.*?)\] Go", text)[-1]]
                place = text.count("<|im_start|>assistant") - 1
                said.append(tokenizer.encode(turn(style, script, place), add_special_tokens=False))
            return [ids[:MOST_TOKENS] for ids in said], [[0.0] * min(len(ids), MOST_TOKENS) for ids in said]

    small = transformers.Qwen3Config(
        vocab_size=272,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=20_000,
    )
    torch.manual_seed(0)
    rows = rows_of(scripts)
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        beta=0.0,
        per_device_train_batch_size=len(rows),
        num_generations=2 if len(rows) % 2 == 0 else len(rows),
        max_completion_length=MOST_TOKENS,
        max_tool_calling_iterations=MOST_CALLING_TURNS,
        gradient_checkpointing=False,
    )
    trainer = Scripted(
        model=transformers.Qwen3ForCausalLM(small),
        reward_funcs=captured,
        args=args,
        train_dataset=extra("datasets").Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=tools or None,
        environment_factory=environment,
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    played = []
    for index in range(len(rows)):
        kept = batch["completion_mask"][index].bool()
        asked = batch["prompt_mask"][index].bool()
        live = seen["environments"][index] if environment else None
        played.append(
            Played(
                seen["prompts"][index],
                seen["completions"][index],
                batch["prompt_ids"][index][asked].tolist(),
                batch["completion_ids"][index][kept].tolist(),
                batch["tool_mask"][index][kept].int().tolist(),
                live.get_reward() if live else None,
            )
        )
    told = trainer._metrics["train"]
    return played, Figures(told["tools/call_frequency"][-1], told["tools/failure_frequency"][-1])


async def ours(
    folder: Path, scripts: dict[str, Script], tools: Sequence[Callable[..., Any]], environment: Any
) -> tuple[list[Played], Figures]:
    tokenizer = Tokenizer.from_pretrained(folder)
    style = which_calls(tokenizer.chat_template(True).source)
    assert style is not None
    played, calls, failures = [], 0, 0
    for row, script in zip(rows_of(scripts), scripts.values(), strict=True):
        live = environment() if environment else None
        handle = PlainHandle(live, tools)
        continuer = Continuer(tokenizer, tools=handle.spec.schemas, history="keep")  # as TRL always does
        columns = {key: value for key, value in row.items() if key != "prompt"}
        opening = await open_episode(handle.spec, handle, row["prompt"], columns)
        prompt = list(opening.messages) or row["prompt"]
        messages, ids, mask = list(prompt), list[int](), list[int]()
        for place in range(MOST_CALLING_TURNS + 1):
            sampled = tokenizer.encode(turn(style, script, place), add_special_tokens=False)
            sampled = sampled[: MOST_TOKENS - len(ids)]
            ids, mask = ids + sampled, mask + [1] * len(sampled)
            text = tokenizer.decode(sampled, skip_special_tokens=True)
            said = parse_turn(text, style, handle.spec.tools)
            if place == MOST_CALLING_TURNS:
                messages.append(said.message)
                break
            answer = await answer_turn(handle.spec, handle, said)
            calls += len(answer.calls)
            failures += sum(bool(call.error) for call in answer.calls)
            between = () if answer.done else continuer.following(messages, said.message, sampled, answer.messages).ids
            messages.append(said.message)
            if answer.done or len(ids) + len(between) > MOST_TOKENS:
                break  # what does not fit is dropped, and so what answers a turn that was cut
            messages += answer.messages
            ids, mask = ids + list(between), mask + [0] * len(between)
        reward = live.get_reward() if live else None
        completion = messages[len(prompt) :]
        played.append(Played(prompt, completion, list(continuer.opening(prompt)), ids, mask, reward))
    return played, Figures(calls / len(played), failures / calls)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["functions", "environment"])
async def test_episodes_are_those_of_trl(
    template: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    source = getattr(pytest.importorskip("trl.chat_template_utils"), template)
    folder = write_tokenizer(tmp_path / "tokenizer", source)
    style = which_calls(source)
    assert style is not None
    scripts, environment = (FUNCTIONS, None) if kind == "functions" else (ENVIRONMENT, Counter)
    tools: list[Any] = [multiply, fail, long, look_up] if environment is None else [multiply]
    their_samples, their_figures = theirs(folder, scripts, style, tools, environment)
    our_samples, our_figures = await ours(folder, scripts, tools, environment)
    with capsys.disabled():
        print(f"\n{template}, {kind}: sampled + read tokens, messages, reward — TRL, ours")
        for name, a, b in zip(scripts, their_samples, our_samples, strict=True):
            told = [(sum(x.mask), len(x.mask) - sum(x.mask), len(x.completion), x.reward) for x in (a, b)]
            print(f"  {name:16} {told[0]} {told[1]} {'equal' if a == b else 'NOT EQUAL'}")
        print(f"  calls a sample, failures a call: {tuple(their_figures)} {tuple(our_figures)}")
    for a, b in zip(their_samples, our_samples, strict=True):
        assert b == a
    assert our_figures == pytest.approx(their_figures)
