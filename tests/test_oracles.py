"""What others read in our folders: transformers and mlx-lm give our logits.

Marked slow, and skipped where the `oracle` extra is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import troupe
from troupe.policy import load_policy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = [[72, 101, 108, 108, 111, 44, 32, 119], [49, 50, 43, 51, 52, 61, 10, 10]]


def oracle(name: str) -> Any:
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `final/` folder of a short run."""
    out = tmp_path_factory.mktemp("run") / "out"
    prompts = out.parent / "prompts.json"
    prompts.write_text('[{"prompt": "Hello, w"}, {"prompt": "12+34="}]')
    config = troupe.load_config(
        None,
        [
            {
                "model": {"path": str(tiny_model)},
                "data": {"path": str(prompts)},
                "generation": {"max_completion_length": 8},
                "rewards": {"functions": ["diversity"]},
                "learner": {"lr": 1e-3, "max_steps": 3, "batch_size": 2},
                "metrics": {"sinks": []},
                "output": str(out),
            }
        ],
    )
    assert troupe.train(config).steps == 3
    return out / "final"


def test_transformers_loads_the_final_folder_and_gives_our_logits(trained: Path) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits
    ours = load_policy(trained).model(mx.array(IDS))
    assert float(mx.max(mx.abs(ours - mx.array(theirs.tolist())))) <= 1e-4


def test_transformers_loads_the_tokenizer_of_the_final_folder(trained: Path) -> None:
    transformers = oracle("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    ours = load_policy(trained).tokenizer
    for text in ("12+34=", "Grüße, 世界!", "a\n\n b"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_mlx_lm_loads_the_final_folder_and_gives_our_logits(trained: Path) -> None:
    mlx_lm = oracle("mlx_lm")
    model, _ = mlx_lm.load(str(trained))
    ours = load_policy(trained).model(mx.array(IDS))
    assert float(mx.max(mx.abs(ours - model(mx.array(IDS))))) <= 1e-4
