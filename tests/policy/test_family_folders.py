"""Folders of every family: saved and read, packed, with an adapter beside them, and by transformers, PEFT and mlx-lm.

What needs other tools is marked slow, and skipped where the `oracle` extra is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.policy.gradient.test_backward import gradients, of_statistics
from tests.support.devices import compute_on
from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import write_tokenizer
from tests.test_oracles import oracle
from troupe.errors import ModelError
from troupe.policy import (
    AdapterConfig,
    Base,
    GenerationConfig,
    Policy,
    RolloutEngine,
    RolloutRequest,
    load_policy,
    random_policy,
)
from troupe.policy.adapter.fuse import fuse
from troupe.policy.adapter.modules import adapter_shapes, resolve_adapter
from troupe.policy.folders import read_model_folder
from troupe.policy.gradient.backward import completion_gradients, completion_statistics, side_by_side
from troupe.policy.network.forward import embedded
from troupe.policy.network.tensors import weights_dtype

CONFIGS = family_configs(vocab_size=260, initializer_range=0.15, eos_token_id=(256,), intermediate_size=96, head_dim=16)
EACH = pytest.mark.parametrize("name", CONFIGS)
IDS = [[72, 101, 108, 108, 111, 44, 32, 119], [49, 50, 43, 51, 52, 61, 10, 10]]
LONG = mx.array([[(3 * i + 7 * row) % 250 for i in range(24)] for row in range(2)])


def logits(policy: Policy, ids: Any = LONG) -> np.ndarray:
    return np.array(policy.model(mx.array(ids)).astype(mx.float32))


def saved(name: str, folder: Path) -> Policy:
    policy = shaken_policy(CONFIGS[name], seed=3)
    policy.save(folder)
    write_tokenizer(folder)
    return policy


def greedy(policy: Policy, count: int = 12) -> list[list[int]]:
    generation = GenerationConfig(num_generations=1, max_completion_length=count, temperature=0.0)
    engine = RolloutEngine(policy.config, generation, stop_ids=frozenset(), base=policy.base)
    engine.load(policy.weights, 0)
    groups = engine.decode([RolloutRequest(prompt_ids=tuple(row), key=(i,)) for i, row in enumerate(IDS)])
    return [list(group.completions[0].token_ids) for group in sorted(groups, key=lambda group: group.index)]


@EACH
def test_what_is_saved_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    policy = saved(name, tmp_path)
    again = load_policy(tmp_path)
    assert again.config == policy.config
    assert again.weights.keys() == policy.weights.keys()
    assert all(mx.array_equal(again.weights[key], array).item() for key, array in policy.weights.items())
    again.save(tmp_path / "anew", max_shard_bytes=20_000)
    assert (tmp_path / "anew" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    assert np.array_equal(logits(load_policy(tmp_path / "anew")), logits(policy))


@EACH
def test_tensors_of_another_family_are_told_by_file_and_name(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    others = [other for other in CONFIGS if set(shapes(other)) != set(shapes(name))]
    assert others
    for other in others:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[other].to_dict()))
        with pytest.raises(ModelError) as caught:
            read_model_folder(tmp_path)
        message = str(caught.value)
        assert message.startswith(str(tmp_path))
        assert "bad tensor(s) for its config.json" in message
        assert "unexpected in model.safetensors" in message or ": missing" in message
        is_told_apart = CONFIGS[other].model_type != CONFIGS[name].model_type
        if is_told_apart and (CONFIGS[other].tie_word_embeddings or not CONFIGS[name].tie_word_embeddings):
            said = f"another kind of network than config.json says (model_type '{CONFIGS[other].model_type}')"
            assert said in message, (name, other, message)


def shapes(name: str) -> list[str]:
    return [key for key in shaken_policy(CONFIGS[name]).weights if key != "lm_head.weight"]


@EACH
def test_a_bias_or_norm_of_another_size_is_told_by_file_and_name(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(tensors, dict)
    key = next((key for key in tensors if key.endswith("bias")), "model.layers.1.post_attention_layernorm.weight")
    wrong = {**tensors, key: mx.zeros(3)}
    mx.eval(wrong)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), wrong)
    with pytest.raises(ModelError, match=rf"{key}: shape \[3\] in model.safetensors, config.json asks for "):
        read_model_folder(tmp_path)


@EACH
def test_sixteen_bits_stay_near_and_are_decoded_as_they_are_computed(name: str) -> None:
    half = shaken_policy(CONFIGS[name], seed=3, dtype="bfloat16")
    full = half.having({key: array.astype(mx.float32) for key, array in half.weights.items()})
    near, exact = logits(half), logits(full)
    assert half.model(LONG).dtype == mx.bfloat16
    assert np.abs(near - exact).mean() < 0.05 * np.abs(exact).max()
    rows = [[1, 2, 3, 4]] * 2, [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    ours = gradients(half.config, half.weights, rows)[2]
    theirs = gradients(full.config, full.weights, rows)[2]
    for key, array in theirs.items():
        assert ours[key].dtype == mx.bfloat16, key
        assert float(mx.abs(ours[key] - array).mean()) < 0.1 * max(float(mx.abs(array).max()), 1e-3), key


def adapted(policy: Policy, **settings: Any) -> Policy:
    """Random numbers in an adapter over all matrices, so that B is not 0."""
    adapter = resolve_adapter(msgspec.convert({"kind": "lora", "rank": 4} | settings, AdapterConfig), policy.config)
    base = Base.of(policy.config, dict(policy.weights), adapter, name="", fingerprint="f")
    weights = {
        key: 0.15 * mx.random.normal(shape, key=mx.random.key(place)) + ("magnitude" in key) * 2.0
        for place, (key, shape) in enumerate(adapter_shapes(policy.config, adapter).items())
    }
    return policy.having(weights, base=base)


@EACH
@pytest.mark.parametrize(
    ("kind", "on_cpu", "dtype"),
    [
        pytest.param(kind, on_cpu, dtype, marks=() if on_cpu == (kind == dtype_s_kind) else pytest.mark.slow)
        for dtype, dtype_s_kind in (("float32", "lora"), ("bfloat16", "dora"))
        for kind in ("lora", "dora")
        for on_cpu in (True, False)
    ],
)
def test_an_adapter_beside_it_is_the_fused_network_and_decoded_as_that(
    name: str, kind: str, on_cpu: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    policy = shaken_policy(CONFIGS[name], seed=3, dtype=dtype)
    beside = adapted(policy, kind=kind)
    adapter = beside.base.adapter
    assert adapter is not None
    config, weights = fuse(policy.config, dict(policy.weights), adapter, beside.weights, dequantize=False)
    fused = Policy(config, weights)
    assert weights.keys() == policy.weights.keys()
    assert weights_dtype(weights) == weights_dtype(policy.weights)
    apart = np.abs(logits(beside) - logits(fused))
    assert np.abs(logits(beside) - logits(policy)).max() > 0.1
    if dtype == "bfloat16":  # where W + BA is rounded in the one and not in the other
        assert apart.mean() <= 0.05 * np.abs(logits(fused)).max()
    else:
        assert apart.max() <= 2e-4
        assert greedy(beside) == greedy(fused)


@EACH
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_gradients_of_an_adapter_are_those_of_mlx(
    name: str, kind: str, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    beside = adapted(shaken_policy(CONFIGS[name], seed=3), kind=kind, dropout=0.0)
    rows = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2, [[9, 10, 11, 12], [13, 14]]
    network = beside.base.completed(beside.config, beside.weights)
    found = gradients(beside.config, network, rows, of_base=False)[2]
    assert {key.rpartition(".")[0] for key in found} == {
        key.rpartition(".")[0] for key in network if ".lora_" in key and "norm" not in key
    }

    def statistics(part: dict[str, mx.array]) -> mx.array:
        return of_statistics(completion_statistics(beside.config, {**network, **part}, *rows))[0]

    expected = mx.grad(statistics)({key: network[key] for key in found})
    for key, array in expected.items():
        assert float(mx.abs(found[key] - array).max()) <= 1e-4 * max(1.0, float(mx.abs(array).max())), key


def packed(name: str, folder: Path) -> None:
    """As mlx-lm packs it, by MLX alone."""
    sizes: dict[str, int] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    if CONFIGS[name].delta_layers:
        sizes["linear_value_head_dim"] = 16
    policy = shaken_policy(msgspec.structs.replace(CONFIGS[name], **sizes), 3)
    tensors: dict[str, mx.array] = {}
    for key, array in policy.weights.items():
        parts = mx.quantize(array, group_size=64, bits=4) if array.ndim == 2 else (array,)
        stem = key.removesuffix(".weight")
        names = [f"{stem}.{part}" for part in ("weight", "scales", "biases")] if array.ndim == 2 else [key]
        tensors |= dict(zip(names, parts, strict=True))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    table = {"group_size": 64, "bits": 4}
    settings = policy.config.to_dict() | {"quantization": table, "quantization_config": table}
    (folder / "config.json").write_text(json.dumps(settings))


@EACH
def test_packed_matrices_are_computed_with_as_with_their_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(name, tmp_path)
    compute_on(monkeypatch, cpu=False)
    held, expanded = (Policy(*read_model_folder(tmp_path, "float32", expand=expand)) for expand in (False, True))
    assert held.config.quantization is not None
    assert expanded.config.quantization is None
    assert np.abs(logits(held) - logits(expanded)).max() <= 1e-4
    assert greedy(held) == greedy(expanded)
    beside = adapted(held)
    other = adapted(expanded).having(beside.weights)
    assert np.abs(logits(beside) - logits(other)).max() <= 2e-4


def test_the_text_part_of_a_folder_for_images_and_text_is_read_and_saved_and_the_rest_told(tmp_path: Path) -> None:
    policy = saved("qwen3_5", tmp_path / "text")
    tensors = mx.load(str(tmp_path / "text" / "model.safetensors"))
    assert isinstance(tensors, dict)
    renamed = {key.replace("model.", "model.language_model.", 1): array for key, array in tensors.items()}
    others = {"model.visual.blocks.0.norm1.weight": mx.ones(3), "mtp.layers.0.input_layernorm.weight": mx.ones(3)}
    whole = tmp_path / "whole"
    whole.mkdir()
    mx.save_safetensors(str(whole / "model.safetensors"), renamed | others)
    text = policy.config.to_dict() | {"mtp_num_hidden_layers": 1}
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    (whole / "config.json").write_text(json.dumps(outer | {"tie_word_embeddings": False}))
    read = load_policy(whole)
    assert np.array_equal(logits(read), logits(policy))
    [notice] = read.notices
    assert "only the part for text" in notice
    assert "images and what foretells several tokens" in notice
    read.save(tmp_path / "again")
    again = load_policy(tmp_path / "again")
    assert again.config == policy.config
    assert np.array_equal(logits(again), logits(policy))
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])


# with other tools


def theirs_by_transformers(folder: Path) -> Any:
    torch, transformers = oracle("torch"), oracle("transformers")
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_transformers_reads_it_computes_the_same_and_writes_what_we_read(name: str, tmp_path: Path) -> None:
    torch = oracle("torch")
    policy = saved(name, tmp_path)
    model = theirs_by_transformers(tmp_path)
    with torch.no_grad():
        theirs = model(torch.tensor(LONG.tolist())).logits.numpy()
        tokens = model.generate(
            torch.tensor(IDS), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[:, len(IDS[0]) :].tolist()
    assert np.abs(logits(policy) - theirs).max() <= 1e-4
    assert greedy(policy) == tokens
    model.save_pretrained(tmp_path / "theirs")
    again = load_policy(tmp_path / "theirs")
    assert msgspec.structs.replace(again.config, initializer_range=0.15) == policy.config
    assert np.array_equal(logits(again), logits(policy))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_cpu", [True, False])
@EACH
def test_gradients_are_those_of_torch(name: str, on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = oracle("torch")
    policy = saved(name, tmp_path)
    model = theirs_by_transformers(tmp_path)
    table = (np.array(LONG) + 1).tolist()  # torch trains no row of padding, which id 0 is for some
    ids = torch.tensor(table)
    log_probs = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    log_probs[:, 8:].sum().backward()
    compute_on(monkeypatch, cpu=on_cpu)
    rows = [row[:9] for row in table], [row[9:] for row in table]
    ours: dict[str, mx.array] = {}
    work: Any = completion_gradients(policy.config, policy.weights, *rows, lambda s: (s.log_probs.sum(), ()))
    for part in side_by_side([work], (), []):
        ours |= part
    theirs: dict[str, Any] = {}
    for key, parameter in model.named_parameters():
        gradient, module = parameter.grad.numpy(), key.rpartition(".")[0]
        if key.endswith("experts.gate_up_proj"):  # all experts of a layer, gate above up
            half = gradient.shape[1] // 2
            theirs |= {f"{module}.gate_proj.weight": gradient[:, :half], f"{module}.up_proj.weight": gradient[:, half:]}
        else:
            theirs[f"{key}.weight" if key.endswith("experts.down_proj") else key] = gradient
    assert ours.keys() == theirs.keys()
    largest = max(float(np.abs(array).max()) for array in theirs.values())
    for key, array in theirs.items():
        assert np.abs(np.array(ours[key]) - array).max() <= 1e-5 * largest, key


def for_mlx_lm(folder: Path) -> None:
    """Call a network as mlx-lm knows it: one for images and text, whatever it is."""
    settings = json.loads((folder / "config.json").read_text())
    if settings["model_type"] == "qwen3_5_text":
        outer = {"model_type": "qwen3_5", "text_config": settings}
        (folder / "config.json").write_text(json.dumps(outer))


def has_same_windows_in_mlx_lm(name: str) -> bool:
    return name != "mistral-window"  # which mlx-lm computes without


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_mlx_lm_reads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    mlx_lm = oracle("mlx_lm")
    policy = saved(name, tmp_path)
    for_mlx_lm(tmp_path)
    model, _ = mlx_lm.load(str(tmp_path))
    ids = LONG if has_same_windows_in_mlx_lm(name) else LONG[:, :5]
    assert np.abs(logits(policy, ids) - np.array(model(ids))).max() <= 1e-4
    if has_same_windows_in_mlx_lm(name):
        rows = [list(row) for row in IDS]
        for row in rows:
            for _ in range(12):
                row.append(int(np.argmax(np.array(model(mx.array([row])))[0, -1])))
        assert greedy(policy) == [row[len(IDS[0]) :] for row in rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_what_mlx_lm_packs_is_read_and_gives_its_logits(name: str, tmp_path: Path) -> None:
    mlx_lm, convert = oracle("mlx_lm"), oracle("mlx_lm.convert").convert
    saved(name, tmp_path / "whole")
    for_mlx_lm(tmp_path / "whole")
    how = {"quantize": True, "q_group_size": 32, "q_bits": 8, "dtype": "float32"}
    convert(str(tmp_path / "whole"), str(tmp_path / "packed"), **how)
    model, _ = mlx_lm.load(str(tmp_path / "packed"))
    ids = LONG if has_same_windows_in_mlx_lm(name) else LONG[:, :5]
    for expand in (False, True):
        config, weights = read_model_folder(tmp_path / "packed", "float32", expand=expand)
        assert np.abs(logits(Policy(config, weights), ids) - np.array(model(ids))).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_peft_and_mlx_lm_read_an_adapter_over_it_and_give_our_logits(name: str, tmp_path: Path) -> None:
    torch, peft, mlx_lm = oracle("torch"), oracle("peft"), oracle("mlx_lm")
    base = load_policy_of(name, tmp_path / "base")
    # PEFT 0.21 takes matrices of that name in the dense layers of such a network for those of experts
    names = [f"{part}_proj" for part in "qkvo"] if base.config.sparse_layers else "all-linear"
    beside = adapted(base, target_modules=names)
    beside.save(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(theirs_by_transformers(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(LONG.tolist())).logits.numpy()
    ours = logits(beside)
    assert (np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max() <= (1e-4 if name != "qwen3_5" else 3e-4)
    if name == "qwen3_5":  # whose parts have other names in mlx-lm, which passes over an adapter of ours
        return
    of_mlx, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))
    ids = LONG if has_same_windows_in_mlx_lm(name) else LONG[:, :5]
    apart = np.abs(logits(beside, ids) - np.array(of_mlx(ids)))
    assert (apart / np.maximum(1.0, np.abs(logits(beside, ids)))).max() <= 1e-4


def load_policy_of(name: str, folder: Path) -> Policy:
    saved(name, folder)
    return load_policy(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embedded_tokens_are_rounded_as_in_transformers(dtype: str, tmp_path: Path) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    policy = random_policy(
        msgspec.structs.replace(CONFIGS["gemma3"], hidden_size=40), 1, dtype
    )  # √40 is no such number
    policy.save(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    with torch.no_grad():
        theirs = model.get_input_embeddings()(torch.tensor(IDS)).float().numpy()
    ours = embedded(policy.config, policy.weights, mx.array(IDS))
    assert ours.dtype == getattr(mx, dtype)
    assert np.array_equal(np.array(ours.astype(mx.float32)), theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_said_of_a_multimodal_folder_makes_one_that_is_read(tmp_path: Path) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    text = {
        key: value
        for key, value in CONFIGS["gemma3"].to_dict().items()
        if key not in ("architectures", "rope_scaling", "rope_local_base_freq", "rope_theta", "sliding_window_pattern")
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"config\.json: model_type: 'gemma3' is not supported: .*save_pretrained"):
        read_model_folder(tmp_path / "whole")
    model = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "text")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(LONG.tolist())).logits.numpy()
    assert np.abs(logits(load_policy(tmp_path / "text")) - theirs).max() <= 1e-4
