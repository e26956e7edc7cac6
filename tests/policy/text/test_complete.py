"""Text prompts and chats: what the engine is asked, and that streams, batches and single calls say the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.policy.text.test_added_tokens import DECODER, folder_of
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.errors import InputError, ModelError
from troupe.policy import GenerationConfig, NetworkConfig, Policy, RolloutRequest, Weights, load_policy
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.text.complete import (
    complete_texts,
    encode_prompt,
    generate_batch,
    stream_text,
)
from troupe.policy.text.tokenizer import TextPrompt, Tokenizer, opened_thought

SAMPLED = GenerationConfig(num_generations=3, max_completion_length=10)
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return load_policy(tiny_model)


def test_generate_batch_returns_rows_in_prompt_order(policy: Policy) -> None:
    generation = GenerationConfig(max_completion_length=8)
    batch = generate_batch(policy, ["hello", "a"], 3, generation, seed=4)
    assert batch.prompt_ids == [policy.tokenizer.encode("hello")] * 3 + [policy.tokenizer.encode("a")] * 3
    assert batch.texts == [policy.tokenizer.decode(ids) for ids in batch.completion_ids]
    log_probs = np.array(policy.compute_log_probs(batch.prompt_ids, batch.completion_ids))
    for row, ours in enumerate(batch.log_probs):
        np.testing.assert_allclose(ours, log_probs[row][: len(ours)], atol=1e-4)
    assert batch == generate_batch(policy, ["hello", "a"], 3, generation, seed=4)
    assert batch != generate_batch(policy, ["hello", "a"], 3, generation, seed=5)


def test_a_chat_goes_through_the_template(policy: Policy) -> None:
    assert encode_prompt(policy.tokenizer, CHAT) == list(b"[system]Be kind.[user]Hi[assistant]")
    assert encode_prompt(policy.tokenizer, "[user]Hi") == list(b"[user]Hi")


def test_template_options_reach_the_template(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ '' if enable_thinking else '<quiet>' }}")
    tokenizer = load_policy(folder).tokenizer
    assert encode_prompt(tokenizer, CHAT, enable_thinking=False) == list(b"Be kind.<quiet>")
    assert encode_prompt(tokenizer, CHAT, enable_thinking=True) == list(b"Be kind.")


@pytest.mark.parametrize("prompt", ["ab\udcff", [{"role": "user", "content": "\ud800"}]])
def test_half_a_surrogate_pair_is_no_text(policy: Policy, prompt: str) -> None:
    with pytest.raises(InputError, match="is no Unicode text"):
        encode_prompt(policy.tokenizer, prompt)


def test_every_prompt_is_completed_as_often_as_asked(policy: Policy) -> None:
    prompts: list[TextPrompt] = ["hello", CHAT, "x"]
    found = complete_texts(policy, prompts, SAMPLED, seed=5)
    expected = generate_batch(policy, ["hello", "[system]Be kind.[user]Hi[assistant]", "x"], 3, SAMPLED, seed=5)
    assert [sample.text for group in found for sample in group] == expected.texts
    assert [[sample.prompt_tokens for sample in group] for group in found] == [[5] * 3, [35] * 3, [1] * 3]
    lengths = [len(ids) for ids in expected.completion_ids]
    assert [sample.completion_tokens for group in found for sample in group] == lengths
    ends = ["stop" if ids[-1] == 256 else "length" for ids in expected.completion_ids]
    assert [sample.finish_reason for group in found for sample in group] == ends


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_joins_to_the_text(policy: Policy, seed: int) -> None:
    [[expected]] = complete_texts(policy, ["hello"], msgspec.structs.replace(SAMPLED, num_generations=1), seed)
    pieces = list(stream_text(policy, "hello", SAMPLED, seed))
    assert "".join(pieces) == expected.text
    assert all(pieces)


def test_a_stream_never_yields_half_a_character(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids: é in two bytes, a special token, an id of the padded vocabulary, ✓ in three, the first byte of a fourth."""
    taken: list[int] = []

    def scripted(engine: RolloutEngine, request: RolloutRequest) -> Iterator[int]:
        for id_ in (0xC3, 0xA9, 257, 259, 0xE2, 0x9C, 0x93, 0x21, 0xF0):
            taken.append(id_)
            yield id_

    monkeypatch.setattr(RolloutEngine, "stream", scripted)
    pieces = stream_text(policy, "x", SAMPLED, 0)
    assert next(pieces) == "é"
    assert len(taken) == 2, "a character comes as soon as it is whole"
    assert list(pieces) == ["✓", "!", "\N{REPLACEMENT CHARACTER}"]


def test_a_stream_hands_tokens_over_while_it_decodes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = msgspec.structs.replace(SAMPLED, max_completion_length=10_000)
    steps = 0
    current_weights = RolloutEngine.current_weights

    def counted(engine: RolloutEngine, slots: Sequence[int]) -> tuple[Weights, Mapping[int, int]]:
        nonlocal steps
        steps += 1
        return current_weights(engine, slots)

    monkeypatch.setattr(RolloutEngine, "current_weights", counted)
    pieces = stream_text(policy, "hello", endless, seed=1)
    next(pieces)
    assert 1 <= steps < 9, "at most the bytes of a character, and the token on its way"
    assert list(pieces)
    assert steps > 9


def test_what_cannot_be_completed_is_refused_at_the_call(policy: Policy) -> None:
    for prompt in ("", "x" * CONFIG.max_position_embeddings):
        with pytest.raises(ModelError):
            stream_text(policy, prompt, SAMPLED, 0)
        with pytest.raises(ModelError):
            complete_texts(policy, [prompt], SAMPLED, 0)


def test_positions_that_yarn_adds_can_be_used(tmp_path: Path) -> None:
    settings = CONFIG.to_dict() | {
        "rope_parameters": None,
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    }
    folder = write_tiny_model(tmp_path, NetworkConfig.from_dict(settings))
    stretched = load_policy(folder)
    [[sample]] = complete_texts(stretched, ["x" * 100], GenerationConfig(num_generations=1), seed=0)
    assert sample.completion_tokens <= 28
    assert sample.finish_reason == ("length" if sample.completion_tokens == 28 else "stop")


def opened(folder: Path, prompt: TextPrompt, template: str = "", **flags: Any) -> str:
    decoder = {**DECODER, "259": {**DECODER["259"], **flags}}
    config = {"chat_template": template, "added_tokens_decoder": decoder}
    tokenizer = Tokenizer.from_pretrained(folder_of(folder, config))
    return opened_thought(tokenizer, prompt, encode_prompt(tokenizer, prompt))


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("prompt", "begins", "expected"),
    [
        ("Why?\n<think>\n", "", "<think>\n"),
        ("Put it in <think> tags.", "", ""),
        ("<think>a</think><think>", "", "<think>"),
        ("<think>a</think>", "", ""),
        ([{"role": "user", "content": "Why?"}], "<think>\n", "<think>\n"),
        ([{"role": "user", "content": "Why?"}], "<think>\nLet me", "<think>\nLet me"),
        ([{"role": "user", "content": "Why?"}], "<think>\n\n</think>\n\n", ""),
        ([{"role": "user", "content": "Put it in <think> tags."}], "", ""),
        ([{"role": "user", "content": "Why?"}], "", ""),
    ],
)
def test_thoughts_that_a_prompt_has_opened(tmp_path: Path, prompt: TextPrompt, begins: str, expected: str) -> None:
    template = TURNS + f"{{{{ {begins!r} }}}}"  # Jinja drops a line end at the end of its source
    assert opened(tmp_path / "m", prompt, template) == expected
    assert opened(tmp_path / "special", prompt, template, special=True) == expected
