"""What transformers computed for other families: logits, greedy tokens, gradients, and both ages of config.json.

Reads `tests/data/adapters`, or the folder that TROUPE_ADAPTER_VECTORS names, of the same layout: `families.json` lists
the cases. A family that is not known yet is skipped by name.
"""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.devices import compute_on
from troupe.policy import GenerationConfig, RolloutEngine, RolloutRequest, completion_gradients, completion_statistics
from troupe.policy.folders import read_model_folder
from troupe.policy.gradient.backward import side_by_side
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import hidden_states, project
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.tensors import Weights, as_stored

_SHIPPED = Path(__file__).parents[1] / "data" / "adapters"
FOLDER = Path(os.environ.get("TROUPE_ADAPTER_VECTORS") or _SHIPPED)
CASES: dict[str, Any] = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))["models"]
EACH = pytest.mark.parametrize("name", CASES)


@pytest.fixture(params=["cpu", "gpu"])
def device_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed on a CPU and what on a GPU, wherever the tests run."""
    compute_on(monkeypatch, cpu=request.param == "cpu")


def folder_of(name: str) -> Path:
    return FOLDER / "families" / name


def slack_of(name: str, kind: str = "slack") -> float:
    """How many times further apart than with others we may be: norms of what is nearly 0 magnify what float32 rounds;
    "own_slack": measured by a tensor's own largest gradient, of which decays have tiny ones."""
    return float(CASES[name].get(kind, 1.0))


def stored(name: str) -> dict[str, mx.array]:
    tensors = mx.load(str(FOLDER / "families" / f"{name}.safetensors"))
    assert isinstance(tensors, dict)
    return tensors


def logits_of(config: NetworkConfig, weights: Weights, row: mx.array) -> np.ndarray:
    return np.array(project(config, weights, hidden_states(config, weights, row[None]))[0])


@pytest.mark.usefixtures("device_path")
@EACH
@pytest.mark.parametrize("fused", [False, True])
def test_logits(name: str, fused: bool) -> None:
    config, weights = read_model_folder(folder_of(name), "float32")
    network = fuse_projections(config, weights) if fused else weights
    theirs = stored(name)
    for ids, mask, logits in zip(theirs["input_ids"], theirs["attention_mask"], theirs["logits"], strict=True):
        length = int(np.array(mask).sum())
        expected = np.array(logits)[-length:]
        ours = logits_of(config, network, ids[-length:])
        assert (np.abs(ours - expected) / np.maximum(1.0, np.abs(expected))).max() <= 2e-5 * slack_of(name)


@pytest.mark.usefixtures("device_path")
@EACH
def test_greedy_tokens_of_rows_that_are_decoded_together(name: str) -> None:
    config, weights = read_model_folder(folder_of(name), "float32")
    theirs = stored(name)
    lengths = np.array(theirs["attention_mask"]).sum(axis=1).tolist()
    rows = [np.array(ids)[-length:].tolist() for ids, length in zip(theirs["input_ids"], lengths, strict=True)]
    generation = GenerationConfig(num_generations=1, max_completion_length=theirs["greedy"].shape[1], temperature=0.0)
    engine = RolloutEngine(config, generation, stop_ids=frozenset())
    engine.load(weights, 0)
    requests = [RolloutRequest(prompt_ids=tuple(row), key=(i,)) for i, row in enumerate(rows)]
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    assert [list(group.completions[0].token_ids) for group in groups] == theirs["greedy"].tolist()


@pytest.mark.usefixtures("device_path")
@EACH
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_log_probs_and_all_gradients(name: str, recompute: bool) -> None:
    config, weights = read_model_folder(folder_of(name), "float32")
    theirs, grpo = stored(name), CASES[name]["grpo"]
    rows = grpo["prompts"], grpo["completions"]
    ours = completion_statistics(config, weights, *rows).log_probs
    assert np.abs(np.array(ours) - np.array(theirs["log_probs"])).max() <= 5e-6 * slack_of(name)
    mask = mx.array([[t < len(row) for t in range(ours.shape[1])] for row in rows[1]])

    def loss(statistics: TokenStatistics) -> tuple[mx.array, tuple[()]]:
        ratio = mx.exp(statistics.log_probs - mx.stop_gradient(statistics.log_probs))
        advantages = mx.array(grpo["advantages"])[:, None]
        least = mx.minimum(ratio * advantages, mx.clip(ratio, 0.8, 1.2) * advantages)
        return -(least * mask).sum() / mask.sum(), ()

    grads: dict[str, mx.array] = {}
    values: list[Any] = []
    for part in side_by_side([completion_gradients(config, weights, *rows, loss, recompute=recompute)], (), values):
        grads |= part
    assert float(values[0][0]) == pytest.approx(grpo["loss"], abs=2e-6)
    expected = {key.removeprefix("grad/"): np.array(x) for key, x in theirs.items() if key.startswith("grad/")}
    grads = as_stored(config, grads)
    assert grads.keys() == expected.keys() == as_stored(config, weights).keys()
    largest = max(float(np.abs(x).max()) for x in expected.values())
    for key, x in expected.items():
        apart = float(np.abs(np.array(grads[key]) - x).max())
        assert apart <= (1e-5 if is_on_cpu() else 2e-5) * largest, key
        assert apart <= 3e-5 * slack_of(name, "own_slack") * float(np.abs(x).max()), key


@EACH
def test_both_ages_of_config_json_are_the_same_network(name: str, tmp_path: Path) -> None:
    folder = folder_of(name)
    for file in ("model.safetensors", "generation_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.v4.json").read_bytes())
    config, weights = read_model_folder(folder, "float32")
    older, same = read_model_folder(tmp_path, "float32")
    assert older == config
    assert NetworkConfig.from_dict(config.to_dict()) == config
    row = stored(name)["input_ids"][0]
    np.testing.assert_array_equal(logits_of(older, same, row), logits_of(config, weights, row))


@pytest.mark.usefixtures("device_path")
@EACH
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    config, weights = read_model_folder(folder_of(name), "float32")
    row = stored(name)["input_ids"][-1]
    padded = mx.concatenate([row, mx.array([3] * 20, row.dtype)])
    apart = np.abs(logits_of(config, weights, padded)[: row.size] - logits_of(config, weights, row))
    assert apart.max() <= 1e-5
