"""`troupe fuse`, and commands that take an adapter beside a model."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.runs import call
from troupe.policy import AdapterConfig, load_policy
from troupe.policy.folders import read_model_folder
from troupe.policy.load import begin_policy

DATA = Path(__file__).parents[1] / "data" / "adapters"
ROW = mx.array([[395, 225, 136, 169, 12, 217, 369]])


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    return np.array(load_policy(model, "float32", adapter=adapter).model(ROW))


@pytest.mark.parametrize("name", ["all", "qv", "patterns", "dora"])
def test_a_fused_folder_is_the_base_with_its_adapter(tmp_path: Path, name: str) -> None:
    result = call("fuse", "-m", DATA / "base", "--adapter", DATA / "peft" / name, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "largest difference of a logit, by rounding them" in result.stdout
    np.testing.assert_allclose(
        logits(tmp_path / "out"), logits(DATA / "base", DATA / "peft" / name), atol=2e-5, rtol=2e-5
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (DATA / "base" / "tokenizer.json").read_bytes()


def test_over_a_packed_base_it_says_what_packing_again_costs(tmp_path: Path) -> None:
    base, adapter = DATA / "quantized" / "q4-g64", DATA / "mlx" / "on-q4"
    result = call("fuse", "-m", base, "--adapter", adapter, "-o", tmp_path / "packed")
    assert result.exit_code == 0
    [told] = [line for line in result.stdout.splitlines() if "packing them again" in line]
    assert float(told.split(":")[1].split("(")[0]) > 0.1
    assert "--dequantize" in result.stdout
    config = json.loads((tmp_path / "packed" / "config.json").read_bytes())
    assert config["quantization"]["bits"] == 4
    theirs, _ = read_model_folder(DATA / "mlx" / "on-q4.fused", expand=False)
    ours, _ = read_model_folder(tmp_path / "packed", expand=False)
    assert ours.quantization == theirs.quantization
    np.testing.assert_allclose(logits(tmp_path / "packed"), logits(DATA / "mlx" / "on-q4.fused"), atol=1e-3)
    result = call("fuse", "-m", base, "--adapter", adapter, "-o", tmp_path / "plain", "--dequantize")
    assert result.exit_code == 0
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_bytes())
    np.testing.assert_allclose(logits(tmp_path / "plain"), logits(base, adapter), atol=3e-5, rtol=3e-5)


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    adapter = DATA / "peft" / "all"
    other = call("fuse", "-m", DATA / "quantized" / "q4-g64", "--adapter", tmp_path, "-o", tmp_path / "out")
    assert (other.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "adapter_config.json" in other.stderr
    whole = call("fuse", "--adapter", DATA / "base", "-o", tmp_path / "out")
    assert (whole.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert f"{DATA / 'base'}: holds no adapter; give the folder of one, or a whole model by -m" in whole.stderr
    taken = tmp_path / "taken"
    shutil.copytree(DATA / "base", taken)
    full = call("fuse", "-m", DATA / "base", "--adapter", adapter, "-o", taken)
    assert (full.exit_code, sorted(p.name for p in taken.iterdir())) == (
        2,
        sorted(p.name for p in (DATA / "base").iterdir()),
    )
    assert "not empty" in full.stderr


def test_generate_takes_an_adapter_beside_the_model_or_instead_of_it(tmp_path: Path, tiny_model: Path) -> None:
    adapter = tmp_path / "adapter"
    policy, _ = begin_policy(tiny_model, "float32", AdapterConfig(kind="lora", rank=4), 0)
    policy.having({name: array + 0.3 for name, array in policy.weights.items()}).save(adapter)
    options = ("-p", "ab", "--temperature", "0", "--max-new-tokens", "12", "--json")
    plain, beside, alone, named = (
        json.loads(call("generate", *which, *options).stdout)["completion"]
        for which in (
            ("-m", tiny_model),
            ("-m", tiny_model, "--adapter", adapter),
            ("-m", adapter),
            ("--adapter", adapter),
        )
    )
    assert beside == alone == named != plain
    for command in (("generate", *options), ("eval", "--reward", "length"), ("fuse", "-o", tmp_path / "out")):
        whole = call(command[0], "--adapter", tiny_model, *command[1:])
        assert (whole.exit_code, (tmp_path / "out").exists()) == (2, False)
        assert f"{tiny_model}: holds no adapter; give the folder of one" in whole.stderr
    both = call("generate", "-m", adapter, "--adapter", adapter, *options)
    assert both.exit_code == 2
    assert "is an adapter itself" in both.stderr
