"""The network against transformers' logits, hand-worked sizes and its own other paths."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.policy.forward_vectors import ABOUT, MODELS, SHIPPED, model_folder, tensors
from tests.support.devices import compute_on
from tests.support.tiny import small_network
from tests.test_oracles import oracle
from troupe.policy.decode.cache import DecodingCache, PromptCache
from troupe.policy.folders import read_model_folder
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import WholeRows, hidden_states, project
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.rotary import Rope, YarnScaling, attention_factor
from troupe.policy.network.rotation import Rotation
from troupe.policy.network.tensors import Weights, expected_shapes, init_weights, parameter_count

SMALL = small_network(vocab_size=50, hidden_size=16, intermediate_size=24)


YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16)


def load(name: str) -> tuple[NetworkConfig, Weights, dict[str, mx.array]]:
    return *read_model_folder(model_folder(name), "float32"), tensors()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_those_of_transformers(name: str, fused: bool) -> None:
    config, weights, vectors = load(name)
    network = fuse_projections(config, weights) if fused else weights
    theirs, their_log_probs = (np.array(vectors[f"A/{name}/{what}"]) for what in ("logits", "token_logprobs"))
    starts = (1 - np.array(vectors["A/attention_mask"])).sum(axis=1)
    assert starts.max() > starts.min()
    for row, start in enumerate(starts.tolist()):
        ids = vectors["A/input_ids"][row : row + 1, start:]  # their rows are padded on the left
        logits = project(config, network, hidden_states(config, network, ids))
        assert np.abs(np.array(logits)[0] - theirs[row, start:]).max() < 1e-4
        log_probs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0, :-1]
        ours = np.take_along_axis(log_probs, np.array(ids)[0, 1:, None], axis=-1)[:, 0]
        assert np.abs(ours - their_log_probs[row, start:]).max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    config, weights, vectors = load(name)
    mask = np.array(vectors["A/attention_mask"])
    rows = [ids[seen == 1].tolist() for ids, seen in zip(np.array(vectors["A/input_ids"]), mask, strict=True)]
    width = max(map(len, rows))
    padded = hidden_states(config, weights, mx.array([row + [3] * (width - len(row)) for row in rows]))
    for row, ids in enumerate(rows):
        alone = hidden_states(config, weights, mx.array([ids]))
        assert float(mx.abs(padded[row, : len(ids)] - alone[0]).max()) < 1e-4
    assert mx.all(mx.isfinite(padded)).item()


class FarAlong(WholeRows):
    """Whole rows whose tokens stand at positions of their own."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset


YARNED = msgspec.structs.replace(SMALL, rope_scaling=YARN)
OFFSETS: dict[str, int | mx.array] = {
    "one for all": 7,
    "a row's": mx.array([7, 30], mx.int32),
    "a token's": mx.array([[7, 8, 9, 10], [30, 31, 32, 33]], mx.int32),
    "a token's, out of order": mx.array([[7, 3, 3, 0], [5, 5, 40, 41]], mx.int32),
}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("config", [SMALL, YARNED], ids=["plain", "stretched"])
def test_fused_rotation_kernels_agree_with_the_cpu_path(
    config: NetworkConfig, offset: int | mx.array, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    weights = init_weights(config, mx.random.key(0))

    def forward_and_gradient() -> tuple[mx.array, dict[str, mx.array]]:
        def score(weights: dict[str, mx.array]) -> mx.array:
            hidden = hidden_states(config, weights, ids, attention=FarAlong(offset))
            return (hidden * mx.random.normal(hidden.shape, key=mx.random.key(1))).sum()

        hidden = hidden_states(config, weights, ids, attention=FarAlong(offset))
        return hidden, mx.grad(score)(weights)

    compute_on(monkeypatch, cpu=True)
    here, gradients = forward_and_gradient()
    compute_on(monkeypatch, cpu=False)
    fused, theirs = forward_and_gradient()
    assert float(mx.abs(here - fused).max()) < 1e-5
    for name, gradient in gradients.items():
        assert float(mx.abs(gradient - theirs[name]).max()) < 1e-4 * max(1.0, float(mx.abs(gradient).max())), name


@pytest.mark.parametrize("on_cpu", [True, False])
def test_positions_may_be_given_for_all_for_each_row_or_for_each_token(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    ids = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    weights = init_weights(SMALL, mx.random.key(0))
    of_all, of_rows, of_tokens, apart = (
        hidden_states(SMALL, weights, ids, attention=FarAlong(offset)) for offset in OFFSETS.values()
    )
    assert float(mx.abs(of_all - of_rows)[0].max()) < 1e-5
    assert float(mx.abs(of_rows - of_tokens).max()) < 1e-5
    assert float(mx.abs(of_tokens - apart)[:, 1:].max()) > 1e-2
    plain = hidden_states(SMALL, weights, ids)
    assert float(mx.abs(of_all - plain).max()) < 1e-5, "rotary positions are relative"


def test_bfloat16_stays_near_float32() -> None:
    weights = init_weights(SMALL, mx.random.key(0))
    half = {name: w.astype(mx.bfloat16) for name, w in weights.items()}
    ids = mx.arange(12)[None]
    exact = hidden_states(SMALL, {name: w.astype(mx.float32) for name, w in half.items()}, ids)
    rounded = hidden_states(SMALL, half, ids)
    assert rounded.dtype == mx.bfloat16
    assert float(mx.abs(rounded.astype(mx.float32) - exact).max()) < 0.1


def test_gradient_is_the_slope() -> None:
    weights = init_weights(SMALL, mx.random.key(1))
    ids = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

    def loss(weights: dict[str, mx.array]) -> mx.array:
        logits = project(SMALL, weights, hidden_states(SMALL, weights, ids))
        return mx.mean(mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0])

    gradients = mx.grad(loss)(weights)
    assert gradients.keys() == weights.keys()
    for seed, name in enumerate(sorted(weights)):
        direction = mx.random.normal(weights[name].shape, key=mx.random.key(seed))
        direction = direction / mx.linalg.norm(direction)
        step = 1e-2
        ahead = loss({**weights, name: weights[name] + step * direction}).item()
        behind = loss({**weights, name: weights[name] - step * direction}).item()
        slope = (gradients[name] * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / (2 * step), abs=2e-4, rel=2e-2), name


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_that_of_transformers(name: str) -> None:
    config, _, _ = load(name)
    assert parameter_count(config) == ABOUT["models"][name]["num_parameters"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Qwen2.5-7B", 7_615_616_512),
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM2-360M", 361_821_120),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Mistral-7B-v0.3", 7_248_023_552),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameter_count(NetworkConfig.preset(name)) == count


def test_initial_weights_have_the_shapes_and_spread_they_should() -> None:
    config = NetworkConfig.from_dict(json.loads((SHIPPED / "qwen3-tiny-untied" / "config.json").read_text()))
    weights = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert {name: w.shape for name, w in weights.items()} == expected_shapes(config)
    assert all(w.dtype == mx.bfloat16 for w in weights.values())
    assert mx.std(weights["lm_head.weight"].astype(mx.float32)).item() == pytest.approx(0.02, rel=0.02)
    assert mx.all(weights["model.norm.weight"] == 1).item()
    again = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert all(mx.array_equal(weights[name], again[name]).item() for name in weights)
    assert not mx.array_equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"]).item()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_stretched_positions_decode_as_they_forward(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    config, weights = YARNED, init_weights(YARNED, mx.random.key(0))
    rows = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6]]
    later = [[11, 12, 13], [21, 22, 23]]
    prompts = PromptCache([7, 4])
    hidden_states(config, weights, mx.array([rows[0], [*rows[1], 0, 0, 0]]), attention=prompts)
    cache = DecodingCache(prompts, 1, 3)
    for t in range(3):
        step = hidden_states(config, weights, mx.array([[row[t]] for row in later]), attention=cache)
        cache.advance()
        for row in range(2):
            whole = hidden_states(config, weights, mx.array([[*rows[row], *later[row][: t + 1]]]))
            assert float(mx.abs(step[row, 0] - whole[0, -1]).max()) < 1e-4


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("config", [SMALL, YARNED], ids=["plain", "stretched"])
def test_the_gradient_of_a_rotation_turns_back(
    config: NetworkConfig, offset: int | mx.array, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    rotate = Rotation(config.head_dim, Rope(config.rope_theta, config.rope_scaling), 4, offset)
    y, cotangent = (mx.random.normal((2, 3, 4, config.head_dim), key=mx.random.key(i)) for i in range(2))
    by_mlx = mx.grad(lambda y: (rotate(y) * cotangent).sum())(y)
    assert float(mx.abs(rotate.gradient(cotangent) - by_mlx).max()) < 1e-5
    size = 1.0 if config is SMALL else attention_factor(YARN) ** 2
    assert float(mx.abs(rotate.gradient(rotate(y)) - size * y).max()) < 1e-5


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
def test_a_stretched_rotation_rounds_once(offset: int | mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no tables, too: the factor, 1.1386…, is no number of 16 bits."""
    y = mx.random.normal((2, 3, 4, YARNED.head_dim), key=mx.random.key(0)).astype(mx.bfloat16)
    turned = []
    for on_cpu in (True, False):
        compute_on(monkeypatch, cpu=on_cpu)
        turned.append(Rotation(YARNED.head_dim, Rope(YARNED.rope_theta, YARNED.rope_scaling), 4, offset)(y))
    assert turned[0].dtype == turned[1].dtype == mx.bfloat16
    exact, ours = (x.astype(mx.float32) for x in turned)
    assert float(mx.mean((exact != ours).astype(mx.float32))) < 0.02, "sums of two products may round otherwise"
    assert float(mx.abs(ours - exact).max()) <= 2**-7 * float(mx.abs(exact).max())


def test_stretching_changes_the_network() -> None:
    ids = mx.array([list(range(1, 21)), list(range(21, 41))])
    weights = init_weights(SMALL, mx.random.key(0))
    plain, stretched = (hidden_states(config, weights, ids) for config in (SMALL, YARNED))
    assert float(mx.abs(plain - stretched).max()) > 1e-2


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "truncate": False},
    {"rope_type": "yarn", "factor": 3.0},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_stretched_logits_are_those_of_transformers_at_any_position(rope: dict[str, Any]) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    settings = json.loads((SHIPPED / "qwen3-tiny-tied" / "config.json").read_text())
    settings |= {"rope_parameters": None, "rope_scaling": rope, "rope_theta": 1e6, "max_position_embeddings": 40960}
    config = NetworkConfig.from_dict(settings)
    settings.pop("model_type")
    their_config = transformers.Qwen3Config(**settings | {"rope_scaling": dict(rope)})
    their_config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(their_config).eval()
    state = {name: mx.array(w.tolist()) for name, w in model.state_dict().items()}
    weights = {name: state[name] * (1.0 if w == 1 else 5.0) for name, w in _ranks(config).items()}
    model.load_state_dict({name: torch.tensor(w.tolist()) for name, w in weights.items()}, strict=False)
    model.tie_weights()
    ids, starts = [list(range(40, 100)), list(range(300, 360))], [0, 100_000]
    positions = torch.tensor([[start + i for i in range(60)] for start in starts])
    with torch.no_grad():
        theirs = model(torch.tensor(ids), position_ids=positions).logits
    hidden = hidden_states(config, weights, mx.array(ids), attention=FarAlong(mx.array(starts, mx.int32)))
    ours = project(config, weights, hidden)
    assert float(mx.abs(ours).max()) > 1.0
    slack = 1 if is_on_cpu() else 50  # the sines of MLX's kernel for NVIDIA cards, far from 0
    assert float(mx.abs(ours - mx.array(theirs.tolist())).max()) <= 1e-4 * slack


def _ranks(config: NetworkConfig) -> dict[str, int]:
    return {name: len(shape) for name, shape in expected_shapes(config).items()}


@pytest.mark.parametrize("turned", [4, 64])
def test_more_rows_than_a_small_kernel_takes(turned: int) -> None:
    """On NVIDIA cards MLX 0.32.4's fails at 129 rows and fewer than 32 numbers."""
    y, offsets = mx.random.normal((200, 2, 1, 64), key=mx.random.key(3)), mx.arange(200)
    found = np.array(Rotation(turned, Rope(1e4, None), 1, offsets)(y))
    angles = np.arange(200)[:, None] / 1e4 ** (np.arange(0, turned, 2) / turned)
    a, b, rest = np.split(np.array(y)[:, :, 0], [turned // 2, turned], axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)
    np.testing.assert_allclose(found[:, :, 0], expected, atol=2e-5 if is_on_cpu() else 1e-4)
