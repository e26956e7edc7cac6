"""Logits that are not finite end a decode with words, whatever draws from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from click.testing import CliRunner

from tests.support.tiny import CONFIG, write_tiny_model
from troupe.cli.main import main
from troupe.errors import RunError
from troupe.policy import GenerationConfig, Policy, RolloutEngine, RolloutRequest, generate_batch, load_policy, project

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"logit_bias": {3: 2.0}},
]


def engine_of(policy: Policy, **generation: Any) -> RolloutEngine:
    settings = GenerationConfig(**({"num_generations": 2, "max_completion_length": 6} | generation))
    engine = RolloutEngine(policy.config, settings, stop_ids=frozenset())
    engine.load(policy.weights, 3)
    return engine


def overflowing(folder: Path) -> Path:
    """A model of finite weights whose logits are infinite in float32."""
    policy = load_policy(write_tiny_model(folder))
    weights = dict(policy.weights) | {"model.norm.weight": mx.full((CONFIG.hidden_size,), 3e38)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.mark.parametrize("generation", KINDS, ids=str)
def test_nothing_is_drawn_from_them(tmp_path: Path, generation: dict[str, Any]) -> None:
    engine = engine_of(load_policy(overflowing(tmp_path)), **generation)
    with pytest.raises(RunError, match=r"token 0 .* not finite .* float32 with the weights of version 3"):
        list(engine.decode([RolloutRequest(prompt_ids=(1, 2), key=(0,))]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_logit_is_enough_and_the_token_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    calls: list[tuple[int, ...]] = []

    def spoiled(*arguments: Any) -> mx.array:
        logits = project(*arguments)
        calls.append(logits.shape)
        if len(calls) == 3:
            logits[-1, 7] = bad
        return logits

    monkeypatch.setattr("troupe.policy.decode.loop.project", spoiled)
    engine = engine_of(load_policy(tiny_model))
    with pytest.raises(RunError, match="request 0: the logits for token 2"):
        list(engine.decode([RolloutRequest(prompt_ids=(1, 2), key=(0,))]))


def test_what_comes_after_the_end_of_a_completion_does_not_matter(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that has ended may go on in the batch: its tokens are nobody's."""
    policy = load_policy(tiny_model)
    request = RolloutRequest(prompt_ids=(1, 2), key=(0,))
    (whole,) = engine_of(policy).decode([request])
    first, second = (completion.token_ids for completion in whole.completions)
    stop = next(id_ for id_ in first[:3] if id_ not in second)
    place = first.index(stop) + 1
    calls: list[None] = []

    def spoiled(*arguments: Any) -> mx.array:
        logits = project(*arguments)
        if len(calls) == place:
            logits[0, 0] = float("nan")
        calls.append(None)
        return logits

    monkeypatch.setattr("troupe.policy.decode.loop.project", spoiled)
    engine = RolloutEngine(policy.config, engine_of(policy).generation, stop_ids=frozenset({stop}))
    engine.load(policy.weights, 0)
    (group,) = engine.decode([request])
    assert [completion.token_ids for completion in group.completions] == [first[:place], second]


def test_texts_and_commands_say_so(tmp_path: Path) -> None:
    model = overflowing(tmp_path / "model")
    policy = load_policy(model)
    with pytest.raises(RunError, match="not finite"):
        policy.generate_text("abc", 4)
    with pytest.raises(RunError, match="not finite"):
        list(policy.stream_text("abc", 4))
    with pytest.raises(RunError, match="not finite"):
        generate_batch(policy, ["abc"], 2)
    (tmp_path / "rows.jsonl").write_text(msgspec.json.encode({"prompt": "a", "answer": "b"}).decode() + "\n")
    for command in (
        ["generate", "-m", str(model), "-p", "abc"],
        ["generate", "-m", str(model), "-p", "abc", "--json"],
        ["eval", "-m", str(model), "-d", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "4"],
    ):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, result.stdout.strip()) == (3, "")
        assert "not finite" in result.stderr
