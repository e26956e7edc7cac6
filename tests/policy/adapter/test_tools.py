"""What PEFT and mlx-lm make of an adapter folder of ours: our tensors and scales, and our logits.

Marked slow, and skipped where the `oracle` extra is not installed, unless TROUPE_REQUIRE_ORACLES is set.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.adapter.folders import ADAPTERS, BASE, NETWORK, OF_PEFT, random_weights
from troupe.policy import load_policy, network_fingerprint
from troupe.policy.adapter.files import adapter_files, read_adapter, save_adapter
from troupe.policy.adapter.modules import Adapter
from troupe.policy.adapter.peft import their_name

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = [[11, 77, 260, 17, 152, 9, 300], [431, 145, 364, 510, 178, 423, 458]]


def oracle(name: str) -> Any:
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def written(adapter: Adapter, folder: Path) -> dict[str, mx.array]:
    """Weights that change logits much, and no number past what float32 holds well."""
    weights = {name: 0.2 * array for name, array in random_weights(adapter).items()}
    weights |= {name: 1.0 + array for name, array in weights.items() if "magnitude" in name}
    fingerprint = network_fingerprint(BASE)
    save_adapter(folder, adapter_files(NETWORK, adapter, weights, base_name=str(BASE), base_fingerprint=fingerprint))
    return weights


def our_logits(folder: Path) -> np.ndarray:
    ours = np.array(load_policy(BASE, "float32", adapter=folder).model(mx.array(IDS)))
    assert np.abs(ours - np.array(load_policy(BASE, "float32").model(mx.array(IDS)))).max() > 0.1
    return ours


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max() <= 3e-5


def loaded_by_peft(folder: Path) -> Any:
    peft, transformers = oracle("peft"), oracle("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=oracle("torch").float32)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_our_tensors_and_scales_and_gives_our_logits(name: str, tmp_path: Path) -> None:
    torch, adapter = oracle("torch"), ADAPTERS[name]
    weights = written(adapter, tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = loaded_by_peft(tmp_path)
    of_peft = [str(warning.message) for warning in told if "/peft/" in warning.filename]
    assert all(message.startswith("Unexpected keyword arguments ['fine_tune_type',") for message in of_peft), of_peft
    theirs = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    assert len(theirs) == len(weights)
    for key, array in weights.items():
        place = their_name(key).replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
        stored = theirs[place.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight")]
        assert np.array_equal(np.array(array), stored.numpy())
    for module, adapted in adapter.modules.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        assert layer.r["default"] == adapted.rank
        assert layer.scaling["default"] == pytest.approx(adapted.scale, rel=1e-15)
    with torch.no_grad():
        assert_close(our_logits(tmp_path), model(torch.tensor(IDS)).logits.numpy())


@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_lm_loads_it_and_gives_our_logits(name: str, tmp_path: Path) -> None:
    utils = oracle("mlx_lm.utils")
    written(ADAPTERS[name], tmp_path)
    model, _ = utils.load(str(BASE), adapter_path=str(tmp_path))
    model.eval()
    assert_close(our_logits(tmp_path), np.array(model(mx.array(IDS)).astype(mx.float32)))


def test_what_peft_saves_anew_is_ours(tmp_path: Path) -> None:
    """It writes over the settings, and over its own tensors beside those of mlx-lm."""
    weights = written(ADAPTERS["patterns"], tmp_path)
    model = loaded_by_peft(tmp_path)
    for parameter in model.parameters():
        parameter.data *= 2.0
    (tmp_path / OF_PEFT).unlink()
    model.save_pretrained(str(tmp_path))
    stored = read_adapter(tmp_path, NETWORK)
    assert list(stored.weights) == list(weights)
    for name, array in stored.weights.items():
        assert mx.array_equal(array, 2.0 * weights[name]).item()
