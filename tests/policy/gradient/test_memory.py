"""The formula for the gradient of a micro-batch: by hand, and against the peaks that MLX measures."""

from __future__ import annotations

import gc
import math
import random
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import (
    LearnerConfig,
    adamw_init,
    make_batch,
    optimizer_state_bytes,
    train_on_batch,
    update_bytes,
)
from troupe.policy import (
    MicroBatch,
    NetworkConfig,
    completion_statistics,
    gradient_memory_bytes,
    parameter_count,
    random_policy,
)
from troupe.policy.gradient.memory import forward_memory_bytes
from troupe.policy.network.head import BLOCK_NUMBERS, block_rows


def config_of(**sizes: Any) -> NetworkConfig:
    standard: dict[str, Any] = {
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    return NetworkConfig(**standard | sizes)


BATCH = MicroBatch(prompts=2, prompt_length=30, rows=8, completion_length=51)
N, M = 2 * 30 + 8 * 50, 8 * 51


def test_the_tokens_of_a_micro_batch() -> None:
    assert (BATCH.tokens, BATCH.targets) == (N, M)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_grows_by_layers(recompute: bool) -> None:
    """With a vocabulary so large that the head is the peak, a layer adds what is kept of it."""
    few, many = (
        gradient_memory_bytes(config_of(num_hidden_layers=L, vocab_size=20_000), mx.float32, BATCH, recompute=recompute)
        for L in (2, 4)
    )
    inside = 0 if recompute else 64 + 2 * (4 + 2) * 16 + 2 * 192 + 4  # and a number for each head
    assert many - few == 2 * N * (64 + inside) * 4


def test_the_end_by_hand() -> None:
    """Of one token next to nothing is kept: all gradients, and some tables for the embedding."""
    config, batch = config_of(), MicroBatch(prompts=1, prompt_length=1, rows=1, completion_length=1)
    numbers = parameter_count(config)
    assert gradient_memory_bytes(config, mx.bfloat16, batch, on_cpu=False) == math.ceil(
        numbers * 2 + 3.1 * 2000 * 64 * 2 + 6 * 64 * 4
    )
    assert gradient_memory_bytes(config, mx.bfloat16, batch, adds_up=True, on_cpu=False) == math.ceil(
        numbers * 4 + 7.3 * 2000 * 64 * 2 + 6 * 64 * 4
    )


def test_a_block_of_logits_by_hand() -> None:
    config = config_of(vocab_size=3000, num_hidden_layers=1)
    batch = MicroBatch(prompts=1, prompt_length=1, rows=100, completion_length=2000)
    n, m = 1 + 100 * 1999, 200_000
    kept = n * 64 * 2 + (n * 64 + 3 * m * 64) * 2 + 3 * m * 64 * 4
    rows = block_rows(m, on_cpu=False)
    assert (rows, rows % 256) == (256 * (BLOCK_NUMBERS // m // 256 or 1), 0)
    found = gradient_memory_bytes(config, mx.bfloat16, batch, recompute=True, entropy_gradient=True, on_cpu=False)
    plain = gradient_memory_bytes(config, mx.bfloat16, batch, recompute=True, on_cpu=False)
    assert plain <= found
    assert found >= kept + 14 * min(3000, rows) * m


def test_a_block_of_scores_is_held_where_attention_writes_them_out() -> None:
    config, batch = config_of(vocab_size=100), MicroBatch(prompts=1, prompt_length=1, rows=8, completion_length=12_801)
    on_cpu = gradient_memory_bytes(config, mx.float32, batch, recompute=True)
    block, whole = (8 * 4 * queries * 12_801 * 4 for queries in (64, 12_800))
    assert 4 * block < on_cpu < whole / 4
    again = gradient_memory_bytes(config, mx.float32, msgspec.structs.replace(batch, prompts=8), recompute=True)
    assert 0 <= again - on_cpu < block, "what is seen from a block does not depend on who shares a prompt"


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_that_writes_scores_out_holds_a_portion_of_them(recompute: bool) -> None:
    config = config_of(vocab_size=100)
    batch = MicroBatch(prompts=2, prompt_length=30, rows=8, completion_length=1900)
    fused, written = (
        gradient_memory_bytes(config, mx.bfloat16, batch, recompute=recompute, on_cpu=False, writes_scores=writes)
        for writes in (False, True)
    )
    row = 4 * 2048**2  # 1,929 tokens, filled up
    assert written - fused == 4 * 4 * row * 2, "four arrays of four of the eight rows"
    on_cpu = (gradient_memory_bytes(config, mx.bfloat16, batch, writes_scores=writes) for writes in (False, True))
    assert len(set(on_cpu)) == 1, "a CPU has blocks of its own"


def measured_and_predicted(
    config: NetworkConfig, Q: int, P: int, G: int, T: int, micro_batches: int, recompute: bool, entropy: bool
) -> tuple[int, int]:
    """Bytes at the peak of the second of two steps, all that is held included."""
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(config.vocab_size) for _ in range(n)]

    prompts, completions = [ids(P) for _ in range(Q)], [ids(T) for _ in range(Q * G)]
    batch = make_batch(
        [prompts[row // G] for row in range(Q * G)],
        completions,
        [[-5.0] * T for _ in completions],
        [rng.gauss(0, 1) for _ in completions],
        pad_id=0,
    )
    learner = LearnerConfig(gradient_accumulation_steps=micro_batches, entropy_coef=0.1 if entropy else 0.0)
    log_probs = CompletionLogProbs(config, 1.0, recompute=recompute, entropy_gradient=entropy)
    gc.collect()
    before = mx.get_active_memory()
    weights = random_policy(config).weights
    state = adamw_init(weights)
    mx.eval(state)
    peak = 0
    for _ in range(2):
        mx.reset_peak_memory()
        result = train_on_batch(weights, state, batch, log_probs, learner, lr=1e-6)
        peak = mx.get_peak_memory() - before
        weights, state = result.weights, result.optimizer_state
        del result
    numbers = parameter_count(config)
    rows = Q * G // micro_batches
    micro = MicroBatch(prompts=max(1, rows // G), prompt_length=P, rows=rows, completion_length=T)
    learning = gradient_memory_bytes(
        config, mx.float32, micro, recompute=recompute, entropy_gradient=entropy, adds_up=micro_batches > 1
    )
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    updating = 4 * numbers + update_bytes(numbers, tables, mx.float32)
    return peak, 4 * numbers + optimizer_state_bytes(numbers, mx.float32) + max(learning, updating)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "gemma3": {
        "model_type": "gemma3_text",
        "local_rope_theta": 1e4,
        "sliding_window": 16,
        "layer_types": ("sliding_attention",) * 3 + ("full_attention",),
    },
}
FAMILIES["qwen3_5"] = {
    "model_type": "qwen3_5_text",
    "partial_rotary_factor": 0.5,
    "layer_types": ("linear_attention",) * 3 + ("full_attention",),
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}
SHAPES: list[tuple[dict[str, Any], tuple[int, int, int, int, int, bool, bool]]] = [
    ({}, (2, 32, 8, 96, 1, False, False)),
    ({}, (2, 32, 8, 96, 1, True, False)),
    ({"num_hidden_layers": 8}, (4, 64, 4, 64, 2, False, False)),
    ({"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512}, (2, 16, 8, 64, 1, True, True)),
    ({"num_attention_heads": 16, "num_key_value_heads": 8}, (2, 64, 4, 128, 1, False, False)),
    ({"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32}, (1, 100, 8, 64, 1, True, False)),
    ({"vocab_size": 40_000}, (2, 16, 4, 64, 1, False, False)),
    ({"vocab_size": 40_000}, (2, 16, 4, 64, 2, True, True)),
    ({"vocab_size": 20_000, "tie_word_embeddings": False, "hidden_size": 128}, (2, 16, 4, 32, 1, True, False)),
    ({"intermediate_size": 1024, "num_hidden_layers": 6}, (4, 16, 8, 48, 4, False, False)),
    *((FAMILIES["qwen2"] | {"num_hidden_layers": 6}, (2, 32, 8, 96, 1, again, False)) for again in (False, True)),
    *((FAMILIES["gemma3"], (2, 32, 8, 96, 1, again, False)) for again in (False, True)),
    *((MOE, (2, 32, 8, 96, 1, again, False)) for again in (False, True)),
    *(
        (MOE | {"num_experts": 16, "num_experts_per_tok": 4}, (4, 64, 4, 64, 2, again, False))
        for again in (False, True)
    ),
    (MOE | {"decoder_sparse_step": 2}, (2, 32, 8, 96, 1, False, False)),
    *((FAMILIES["gemma3"] | {"num_key_value_heads": 1}, (1, 200, 8, 200, 1, again, False)) for again in (False, True)),
    *((FAMILIES["qwen3_5"], (2, 100, 4, 200, 1, again, False)) for again in (False, True)),
]


FORWARD = [SHAPES[i] for i in (0, 3, 4, 5, 6, 9, 11, 13, 21)]


@pytest.mark.slow
@pytest.mark.usefixtures("mlx_waits")
@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="the factors of a CPU")
@pytest.mark.parametrize(("sizes", "run"), FORWARD)
def test_a_forward_pass_over_a_group_peaks_below_the_formula_and_not_far_below(
    sizes: dict[str, Any], run: tuple[int, int, int, int, int, bool, bool]
) -> None:
    config, (_, P, G, T, *_) = config_of(**sizes), run
    dice = random.Random(0)
    prompt, *completions = ([dice.randrange(config.vocab_size) for _ in range(n)] for n in (P, *[T] * G))
    weights = random_policy(config).weights
    mx.eval(weights)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(completion_statistics(config, weights, [prompt] * G, completions).log_probs)
    peak = mx.get_peak_memory() - before
    piece = MicroBatch(prompts=1, prompt_length=P, rows=G, completion_length=T)
    # 1.05–1.6: a block of logits more or less may still be there when the next one is made
    assert peak <= forward_memory_bytes(config, mx.float32, piece) <= 1.7 * peak


@pytest.mark.slow
@pytest.mark.usefixtures("mlx_waits")
@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="the factors of a CPU")
@pytest.mark.parametrize(("sizes", "run"), SHAPES)
def test_a_step_peaks_below_the_formula_and_not_far_below(
    sizes: dict[str, Any], run: tuple[int, int, int, int, int, bool, bool]
) -> None:
    peak, predicted = measured_and_predicted(config_of(**sizes), *run)
    # mostly 1.04–1.25; where large tables rule, up to 1.5: their updates may or may not be under way at the same time;
    # with experts, computed again, up to 1.66: MLX that does not wait has twice what they make there, and 1.12
    assert peak <= predicted <= (1.7 if "num_experts" in sizes else 1.6) * peak
