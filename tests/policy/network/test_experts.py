"""Mixtures of experts: against every expert of every token, recorded and followed, balanced; and bad input."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.policy.gradient.test_backward import gradients
from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import write_tokenizer
from tests.test_oracles import oracle
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.errors import ConfigError, ModelError
from troupe.grpo import LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.policy import AdapterConfig, GenerationConfig, NetworkConfig, Policy, RolloutEngine, RolloutRequest
from troupe.policy.adapter.modules import resolve_adapter
from troupe.policy.folders import read_model_folder
from troupe.policy.gradient.backward import completion_gradients, completion_statistics, side_by_side
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.experts import Places, Stack, likeliest
from troupe.policy.network.forward import Layer, hidden_states
from troupe.policy.network.head import TokenStatistics
from troupe.policy.network.packing import Packing
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.policy.network.routes import Given, Recorded, Routes, as_bytes, rows_of_tokens
from troupe.policy.network.tensors import as_stored, stacked, stored_shapes

CONFIGS = {name: config for name, config in family_configs(num_hidden_layers=4).items() if config.sparse_layers}
EACH = pytest.mark.parametrize("name", CONFIGS)
ROWS: tuple[list[list[int]], list[list[int]]] = [[1, 2, 3, 4]] * 2 + [[5, 6]], [[7, 8, 9], [10], [11, 12, 13, 14]]


def test_which_layers_are_mixtures() -> None:
    config = CONFIGS["qwen3-moe"]
    assert config.sparse_layers == (0, 1, 2, 3)
    assert CONFIGS["qwen3-moe-mixed"].sparse_layers == (1, 3)
    assert msgspec.structs.replace(config, decoder_sparse_step=2, mlp_only_layers=(3,)).sparse_layers == (1,)
    assert family_configs()["qwen3"].sparse_layers == ()


@EACH
@pytest.mark.parametrize("normalized", [False, True])
def test_experts_against_all_experts_of_every_token(name: str, normalized: bool) -> None:
    config = msgspec.structs.replace(CONFIGS[name], norm_topk_prob=normalized)
    weights = shaken_policy(config).weights
    layer = Layer(config, weights, 3)
    x = mx.random.normal((2, 7, config.hidden_size), key=mx.random.key(1))
    prefix = "model.layers.3.mlp."
    h = np.array(layer.normalized("post_attention_layernorm", x)).reshape(14, -1)
    logits = h @ np.array(weights[f"{prefix}gate.weight"]).T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    stacks = [np.array(weights[f"{prefix}experts.{part}_proj.weight"]) for part in ("gate", "up", "down")]
    expected = np.zeros_like(h)
    for token in range(14):
        best = np.argsort(-p[token])[: config.num_experts_per_tok]
        total = p[token, best].sum() if normalized else 1.0
        for expert in best:
            gate, up = stacks[0][expert] @ h[token], stacks[1][expert] @ h[token]
            y = stacks[2][expert] @ (gate / (1 + np.exp(-gate)) * up)
            expected[token] += p[token, expert] / total * y
    np.testing.assert_allclose(np.array(layer.mlp(x)).reshape(14, -1), expected, atol=2e-5)


def test_rows_come_to_the_product_of_experts_with_the_strides_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs MLX 0.32 reads others where a new axis has a stride of 1, without a word."""
    seen: list[tuple[int, ...] | None] = []

    def noting(rows: mx.array, matrices: mx.array, **ways: Any) -> mx.array:
        mx.eval(rows)
        view: Any = rows
        seen.append(memoryview(view).strides)
        return mx.zeros((len(rows), 1, matrices.shape[-1]))

    monkeypatch.setattr(mx, "gather_mm", noting)
    x, experts = mx.random.normal((6, 32))[mx.array([0, 2, 2, 5])], mx.array([0, 0, 1, 1])
    Stack(mx.zeros((2, 8, 32)))(x, experts)
    Stack(mx.zeros((2, 32, 8))).back(x, experts)
    assert seen == [(128, 128, 4)] * 2


@pytest.mark.skipif(is_on_cpu(), reason="MLX computes on the CPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_products_of_experts_are_the_plain_ones(dtype: mx.Dtype, packed: bool) -> None:
    weight = mx.random.normal((8, 96, 64), key=mx.random.key(1)).astype(dtype)
    stack = Stack(weight)
    if packed:
        parts = mx.quantize(weight, group_size=32, bits=4)
        stack = Stack(parts[0], Quantized(32, 4), *parts[1:])
        weight = mx.dequantize(*parts, group_size=32, bits=4)
    for rows in (5, 300, 700):
        chosen = mx.random.randint(0, 8, (rows, 1), key=mx.random.key(rows))
        places = Places.of(chosen)
        x, y = (mx.random.normal((rows, size), key=mx.random.key(size)).astype(dtype) for size in (64, 96))
        matrices = weight[places.experts].astype(mx.float32)
        for found, product in (
            (stack(x, places.experts), mx.sum(x[:, None].astype(mx.float32) * matrices, axis=-1)),
            (stack.back(y, places.experts), mx.sum(y[:, :, None].astype(mx.float32) * matrices, axis=1)),
        ):
            np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(product), atol=0.5, rtol=0.02)
        of_each = mx.stack(
            [(y * (places.experts == e)[:, None]).astype(mx.float32).T @ x.astype(mx.float32) for e in range(8)]
        )
        sums = places.sums_by_expert(y, x, 8).astype(mx.float32)
        np.testing.assert_allclose(np.array(sums), np.array(of_each), atol=0.6, rtol=0.02)


def balance_of(config: NetworkConfig, weights: dict[str, mx.array]) -> mx.array:
    """The loss of load balancing, differentiable by MLX."""
    logits: list[mx.array] = []

    class Noting(Routes):
        def route(self, layer: int, found: mx.array) -> Any:
            logits.append(found)
            return super().route(layer, found)

    packing, rows = Packing(*ROWS), rows_of_tokens(*ROWS)
    hidden_states(config, weights, packing.ids[None], attention=packing, routes=Noting(config))
    spec = config.layer(config.sparse_layers[0]).experts
    assert spec is not None
    taken, likely = mx.zeros(config.num_experts), mx.zeros(config.num_experts)
    for found in logits:
        own = likeliest(spec, mx.stop_gradient(found))
        taken = taken + ((own[..., None] == mx.arange(config.num_experts)).any(axis=1) * rows[:, None]).sum(axis=0)
        likely = likely + (mx.softmax(found, axis=-1) * rows[:, None]).sum(axis=0)
    total = rows.sum() * len(logits)
    return config.num_experts * mx.sum(mx.stop_gradient(taken / total) * likely / total)


def routed_gradients(config: NetworkConfig, policy: Policy, routes: Routes | None, **ways: Any) -> dict[str, mx.array]:
    def loss(statistics: TokenStatistics) -> tuple[mx.array, tuple[()]]:
        return mx.sum(statistics.log_probs), ()

    found: dict[str, mx.array] = {}
    values: list[Any] = []
    for part in side_by_side(
        [completion_gradients(config, policy.weights, *ROWS, loss, routes=routes, **ways)], (), values
    ):
        found |= part
    return found


@EACH
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_load_balancing_is_mlx_s(name: str, recompute: bool) -> None:
    config = CONFIGS[name]
    policy = shaken_policy(config)
    routes = Routes(config, balance=3.0, rows_of_token=rows_of_tokens(*ROWS))
    balanced = routed_gradients(config, policy, routes, recompute=recompute)
    plain = routed_gradients(config, policy, None)
    with mx.stream(mx.cpu):  # MLX 0.32.4's gradient of products of sorted experts is another on NVIDIA cards
        value, grads = mx.value_and_grad(lambda weights: balance_of(config, weights))(dict(policy.weights))
        mx.eval(value, grads)
    assert float(routes.balance_loss) == pytest.approx(float(value), rel=1e-5)
    for key, grad in grads.items():
        np.testing.assert_allclose(np.array(balanced[key] - plain[key]), 3.0 * np.array(grad), atol=2e-4, err_msg=key)


@pytest.mark.slow
def test_load_balancing_is_that_of_transformers() -> None:
    torch = oracle("torch")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    config = CONFIGS["qwen3-moe"]
    logits = np.random.default_rng(0).normal(size=(4, 11, config.num_experts)).astype(np.float32)
    packed = Routes(config, balance=1.0, rows_of_token=rows_of_tokens(*ROWS))
    for layer in config.sparse_layers:
        packed.route(layer, mx.array(logits[layer]))
    # theirs has the prompt of the first two rows twice, and padding on the right
    tokens = [[0, 1, 2, 3, 6, 7], [0, 1, 2, 3], [4, 5, 8, 9, 10]]
    padded = [row + [0] * (6 - len(row)) for row in tokens]
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in tokens])
    theirs = tuple(torch.tensor(one[list(chain.from_iterable(padded))]) for one in logits)
    expected = load_balancing_loss_func(theirs, config.num_experts, config.num_experts_per_tok, mask)
    assert float(packed.balance_loss) == pytest.approx(float(expected), rel=1e-5)


def recorded_of(routes: Routes) -> list[Recorded]:
    """As a generator hands them over, of `ROWS`."""
    lengths, at, parts = [4, 2, 2, 0, 3], 0, []
    for length in lengths:
        parts.append(as_bytes(mx.contiguous(routes.chosen[at : at + length])))
        at += length
    return [(parts[0], parts[2]), (parts[0], parts[3]), (parts[1], parts[4])]


@EACH
def test_routes_of_another_policy_are_followed_or_only_compared(name: str) -> None:
    config = CONFIGS[name]
    first, second = shaken_policy(config), shaken_policy(config, seed=1)
    theirs = Routes(config)
    completion_statistics(config, first.weights, *ROWS, routes=theirs)
    given = Given.of(config, *ROWS, recorded_of(theirs))
    np.testing.assert_array_equal(np.array(given.experts), np.array(theirs.chosen))
    plain = completion_statistics(config, second.weights, *ROWS).log_probs
    compared, followed = Routes(config, given), Routes(config, given, follows=True)
    assert mx.array_equal(completion_statistics(config, second.weights, *ROWS, routes=compared).log_probs, plain).item()
    assert compared.flips is not None
    flipped, count = np.array(compared.flips).tolist()
    assert count == 11 * len(config.sparse_layers)
    assert 0 < flipped <= count
    other = completion_statistics(config, second.weights, *ROWS, routes=followed).log_probs
    assert not mx.array_equal(other, plain).item()
    assert mx.array_equal(followed.chosen, theirs.chosen).item()
    own = Routes(config)
    completion_statistics(config, second.weights, *ROWS, routes=own)
    same = Routes(config, Given.of(config, *ROWS, recorded_of(own)), follows=True)
    assert mx.array_equal(completion_statistics(config, second.weights, *ROWS, routes=same).log_probs, plain).item()
    nothing = Routes(config, Given.of(config, *ROWS, [(b"", b"")] * 3), follows=True)
    assert mx.array_equal(completion_statistics(config, second.weights, *ROWS, routes=nothing).log_probs, plain).item()


@EACH
@pytest.mark.parametrize("pieces", [False, True])
def test_an_engine_records_the_experts_of_the_forward(name: str, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr("troupe.policy.decode.cache.WHOLE_PROMPT", 2)
        monkeypatch.setattr("troupe.policy.decode.cache.PIECE_TOKENS", 6)
    policy = shaken_policy(CONFIGS[name])
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    generation = GenerationConfig(num_generations=3, max_completion_length=12)
    plain, engine = (
        RolloutEngine(policy.config, generation, stop_ids=frozenset(range(20)), records_experts=records)
        for records in (False, True)
    )
    requests = [RolloutRequest(prompt_ids=tuple(prompt), key=(i,)) for i, prompt in enumerate(prompts)]
    for each in (plain, engine):
        each.load(policy.weights, 0)
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    tokens = [c.token_ids for group in sorted(plain.decode(requests), key=lambda g: g.index) for c in group.completions]
    assert tokens == [completion.token_ids for group in groups for completion in group.completions]
    rows = [prompt for prompt in prompts for _ in range(3)], [list(ids) for ids in tokens]
    recorded = [(group.prompt_experts, completion.experts) for group in groups for completion in group.completions]
    given = Given.of(policy.config, *rows, recorded)
    assert bool(mx.all(given.known).item())
    routes = Routes(policy.config, given)
    completion_statistics(policy.config, policy.weights, *rows, routes=routes)
    assert float(routes.flips[0]) == 0.0  # type: ignore[index]


def test_a_step_counts_both_and_neither_is_for_a_dense_network() -> None:
    policy = shaken_policy(CONFIGS["qwen3-moe"])
    batch = make_batch(*ROWS, [[-3.0] * len(row) for row in ROWS[1]], [1.0, -1.0, 0.5], pad_id=0)
    settings = LearnerConfig(router_aux_loss_coef=0.1, gradient_accumulation_steps=2, max_grad_norm=0.0)
    log_probs = CompletionLogProbs(policy.config, 1.0)
    result = train_on_batch(policy.weights, adamw_init(policy.weights), batch, log_probs, settings, lr=1e-3)
    assert result.metrics["aux_loss"] >= 1.0
    assert "router/flips" not in result.metrics
    plain = msgspec.structs.replace(settings, router_aux_loss_coef=0.0)
    without = train_on_batch(policy.weights, adamw_init(policy.weights), batch, log_probs, plain, lr=1e-3)
    assert result.metrics["loss"] - without.metrics["loss"] == pytest.approx(0.1 * result.metrics["aux_loss"], abs=1e-5)
    assert "aux_loss" not in without.metrics
    dense = shaken_policy(family_configs()["qwen3"])
    with pytest.raises(ValueError, match="router_aux_loss_coef and router_replay are for networks with experts"):
        train_on_batch(
            dense.weights, adamw_init(dense.weights), batch, CompletionLogProbs(dense.config, 1.0), settings, lr=1e-3
        )


@EACH
def test_what_is_stored_one_by_one_is_held_stacked(name: str) -> None:
    config, weights = CONFIGS[name], dict(shaken_policy(CONFIGS[name]).weights)
    stored = as_stored(config, weights)
    assert {key: array.shape for key, array in stored.items()} == stored_shapes(config)
    assert "model.layers.3.mlp.experts.3.down_proj.weight" in stored
    again = stacked(config, dict(stored))
    assert list(again) == list(weights)
    assert all(mx.array_equal(again[key], array).item() for key, array in weights.items())


def changed_folder(folder: Path, change: Any) -> str:
    """What is said of a folder whose tensors or config were changed."""
    shaken_policy(CONFIGS["qwen3-moe"]).save(folder)
    file = folder / "model.safetensors"
    tensors, settings = mx.load(str(file)), json.loads((folder / "config.json").read_text())
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors, settings)
    mx.save_safetensors(str(file), tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder)
    return str(caught.value)


_ONE = "model.layers.1.mlp.experts.2.up_proj.weight"


def lose(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
    del tensors[_ONE]


def reshape(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
    tensors[_ONE] = tensors[_ONE][:5]


def spoil(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
    tensors[_ONE] = tensors[_ONE] * float("nan")


def say(**said: Any) -> Any:
    return lambda tensors, settings: settings.update(said)


def store_both_ways(tensors: dict[str, mx.array], settings: dict[str, Any]) -> None:
    parts = [tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] for expert in range(5)]
    tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"] = mx.stack(parts)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lose, f"1 bad tensor(s) for its config.json:\n  {_ONE}: missing"),
        (reshape, f"{_ONE}: shape [5, 64] in model.safetensors, config.json asks for [32, 64]"),
        (spoil, f"{_ONE}: not finite (in model.safetensors)"),
        (store_both_ways, "stored twice, as model.layers.1.mlp.experts."),
        (say(num_experts=4), "it holds other experts (model.layers.0.mlp.experts.4.down_proj.weight, "),
        (say(num_experts=6), "model.layers.0.mlp.experts.5.down_proj.weight: missing"),
        (say(moe_intermediate_size=16), "config.json asks for [16, 64]"),
        (say(mlp_only_layers=[1]), "that have none by config.json's decoder_sparse_step 1, mlp_only_layers [1]"),
        (say(mlp_only_layers=[9]), "config.json: mlp_only_layers: 9 is refused"),
        (say(num_experts_per_tok=6), "config.json: num_experts_per_tok: 6 is refused; there are 5 experts"),
        (say(num_experts=0), "config.json: num_experts: 0 is too small"),
        (say(num_experts=100_000), "config.json: num_experts: 100000 is too large; it must be at most 1024"),
        (say(decoder_sparse_step=0), "config.json: decoder_sparse_step: 0 is too small"),
        (say(num_experts="five"), "config.json: num_experts: 'five' is refused"),
        (say(model_type="qwen3", architectures=None), "it is another kind of network than config.json says"),
    ],
)
def test_bad_experts_are_told_by_file_and_tensor_or_key(change: Any, told: str, tmp_path: Path) -> None:
    message = changed_folder(tmp_path, change)
    assert message.startswith(str(tmp_path))
    assert told in message


def test_stacks_of_mlx_lm_are_read(tmp_path: Path) -> None:
    policy = shaken_policy(CONFIGS["qwen3-moe"])
    policy.save(tmp_path)
    renamed = {key.replace(".experts.", ".switch_mlp."): array for key, array in policy.weights.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), renamed)
    config, weights = read_model_folder(tmp_path)
    assert config == policy.config
    assert all(mx.array_equal(weights[key], array).item() for key, array in policy.weights.items())


@pytest.mark.parametrize(
    "target", [["gate_proj"], ["gate"], ["q_proj", "experts.2.up_proj"], r".*\.experts\.down_proj"]
)
def test_experts_and_routers_have_no_adapter(target: Any) -> None:
    with pytest.raises(ConfigError, match="names routers or experts, which cannot have an adapter here"):
        resolve_adapter(AdapterConfig(kind="lora", target_modules=target), CONFIGS["qwen3-moe"])
    mixed = resolve_adapter(AdapterConfig(kind="lora"), CONFIGS["qwen3-moe-mixed"])
    assert "model.layers.0.mlp.gate_proj" in mixed.modules
    assert "model.layers.1.mlp.gate_proj" not in mixed.modules


@EACH
def test_recomputing_changes_no_bit(name: str) -> None:
    policy = shaken_policy(CONFIGS[name])
    kept, again = (gradients(policy.config, policy.weights, ROWS, recompute=way)[2] for way in (False, True))
    assert all(mx.array_equal(kept[key], again[key]).item() for key in kept)


def packed_policy() -> Policy:
    """All matrices in 4 bits but those that experts end with."""
    whole = shaken_policy(CONFIGS["qwen3-moe"])
    ends = {f"model.layers.{index}.mlp.experts.down_proj": None for index in range(4)}
    config = msgspec.structs.replace(whole.config, quantization=Quantization(Quantized(32, 4), ends))
    weights: dict[str, mx.array] = {}
    for name, array in whole.weights.items():
        module = name.removesuffix(".weight")
        if array.ndim == 1 or module in ends:
            weights[name] = array
        else:
            parts = zip(("weight", "scales", "biases"), mx.quantize(array, group_size=32, bits=4), strict=True)
            weights |= {f"{module}.{kind}": part for kind, part in parts}
    return whole.having(weights, config=config)


def test_packed_experts_are_stored_as_mlx_lm_has_them_and_computed_as_written_out(tmp_path: Path) -> None:
    policy = packed_policy()
    policy.save(tmp_path)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(stored, dict)
    assert stored["model.layers.0.mlp.switch_mlp.up_proj.scales"].shape == (5, 32, 2)
    said = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert said["model.layers.2.mlp.switch_mlp.down_proj"] is False
    config, weights = read_model_folder(tmp_path, expand=False)
    assert config == policy.config
    assert all(mx.array_equal(weights[key], array).item() for key, array in policy.weights.items())
    ids = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    expanded = read_model_folder(tmp_path, expand=True)
    apart = mx.abs(hidden_states(config, weights, ids) - hidden_states(*expanded, ids)).max()
    assert float(apart) <= 1e-4
    parts = Layer(config, weights, 0).stack("up"), Layer(*expanded, 0).stack("up")
    x, experts = mx.random.normal((6, 32)), mx.array([0, 0, 1, 3, 3, 4])
    ours, theirs = (np.array(part.back(x, experts)) for part in parts)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_mlx_lm_reads_packed_experts_that_we_saved(tmp_path: Path) -> None:
    mlx_lm = oracle("mlx_lm")
    policy = packed_policy()
    policy.save(tmp_path)
    write_tokenizer(tmp_path)
    model, _ = mlx_lm.load(str(tmp_path))
    ids = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_allclose(np.array(model(ids)), np.array(policy.model(ids)), atol=2e-4)


@EACH
def test_few_tokens_are_mixed_one_by_one(name: str) -> None:
    layer = Layer(CONFIGS[name], shaken_policy(CONFIGS[name]).weights, 3)
    rows = mx.random.normal((5, CONFIGS[name].hidden_size), key=mx.random.key(2))
    routed = layer.routed(rows)
    places = Places.of(routed.chosen)
    gate, up = layer.expert_inputs(rows, places)
    sorted_ones = layer.mixed(routed, places, layer.stack("down")(gate * mx.sigmoid(gate) * up, places.experts))
    np.testing.assert_allclose(np.array(layer._mixed_one_by_one(rows, routed)), np.array(sorted_ones), atol=1e-5)
