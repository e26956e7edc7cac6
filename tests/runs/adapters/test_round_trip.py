"""An adapter that a run has trained, in transformers with PEFT and in mlx-lm: our logits, and our greedy tokens.

Slow, and skipped where the `oracle` extra is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.adapter.test_tools import oracle
from tests.support.adapters import DORA, LORA, train_adapter, write_base
from troupe.policy import GenerationConfig, Policy, RolloutEngine, RolloutRequest, load_policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = [[11, 77, 260, 17, 152, 9, 44], [131, 145, 364, 10, 178, 23, 58]]
NEW = 16


def greedy(policy: Policy) -> list[list[int]]:
    generation = GenerationConfig(num_generations=1, max_completion_length=NEW, temperature=0.0)
    engine = RolloutEngine(policy.config, generation, stop_ids=frozenset(), base=policy.base)
    engine.load(policy.weights, 0)
    requests = [RolloutRequest(prompt_ids=tuple(ids), key=(i,)) for i, ids in enumerate(PROMPTS)]
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    return [list(group.completions[0].token_ids) for group in groups]


def continued(logits_of: Callable[[list[int]], np.ndarray], ids: list[int]) -> list[int]:
    """The likeliest ids behind `ids`, one by one."""
    row = list(ids)
    for _ in range(NEW):
        row.append(int(logits_of(row)[-1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
def test_what_a_run_has_trained_is_the_same_policy_elsewhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch, peft, transformers = oracle("torch"), oracle("peft"), oracle("transformers")
    utils = oracle("mlx_lm.utils")
    base = write_base(tmp_path / "base")
    final = Path(train_adapter(base, tmp_path, learner__lr=0.05, **settings).folder) / "final"
    policy = load_policy(final, "float32")
    plain = load_policy(base, "float32")
    assert any(ours != without for ours, without in zip(greedy(policy), greedy(plain), strict=True))

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    of_peft = peft.PeftModel.from_pretrained(model, str(final)).eval()
    of_mlx, _ = utils.load(str(base), adapter_path=str(final))
    of_mlx.eval()

    def by_peft(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return np.array(of_peft(torch.tensor([ids])).logits[0].numpy())

    def by_mlx(ids: list[int]) -> np.ndarray:
        return np.array(of_mlx(mx.array([ids]))[0].astype(mx.float32))

    for ids, ours in zip(PROMPTS, greedy(policy), strict=True):
        logits = np.array(policy.model(mx.array([ids]))[0])
        for theirs in (by_peft, by_mlx):
            assert np.abs(logits - theirs(ids)).max() <= 1e-4
            assert continued(theirs, ids) == ours
