"""The kernel that samples on NVIDIA cards, its true source run on a processor, against the plain path."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support.emulated_cuda import EmulatedKernel
from troupe.policy import Sampler, SamplingConfig
from troupe.policy.decode import cuda_kernels, cuda_sampling
from troupe.policy.decode.loop import draw_tokens

pytestmark = pytest.mark.slow  # the source is compiled

THREADS = 64
EVERYTHING: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.02,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "logit_bias": {7: 1.0, 11: -1.0, 10**6: 5.0},
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "presence_context_size": 5,
    "frequency_penalty": 0.25,
}
CHAINS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.7},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 13},
    {"top_k": 10**6, "min_p": 0.05},
    {"min_p": 0.3, "min_tokens_to_keep": 9},
    {"top_k": 20, "min_p": 0.5, "min_tokens_to_keep": 31},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 30},
    {"logit_bias": {0: 4.0, 3: -math.inf}},
    {"repetition_penalty": 0.6, "frequency_penalty": -0.5, "frequency_context_size": 3},
    EVERYTHING,
]
KINDS = ["normal", "flat", "peaked", "equal", "tied", "banned"]


@cache
def emulated(name: str) -> EmulatedKernel:
    inputs, outputs = cuda_kernels.SIGNATURES[name]
    source = (Path(cuda_kernels.__file__).with_name("cuda") / f"{name}.cu").read_text(encoding="utf-8")
    return EmulatedKernel(name, inputs, outputs, source)


@pytest.fixture(autouse=True)
def on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sampling, "kernel", emulated)


def logits_of(kind: str, B: int, V: int) -> mx.array:
    normal = mx.random.normal((B, V), key=mx.random.key(V))
    if kind == "flat":
        return normal * 0.01
    if kind == "peaked":
        return normal * 12
    if kind == "equal":
        return mx.full((B, V), 2.5)
    if kind == "tied":
        return mx.round(normal * 3)
    if kind == "banned":
        return mx.where(mx.random.uniform(shape=(B, V), key=mx.random.key(3)) < 0.7, -math.inf, normal * 3)
    return normal * 3


def inputs(kind: str, B: int, V: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Logits, uniforms of draw and filter, recent ids."""
    uniforms = mx.random.uniform(shape=(2, B), key=mx.random.key(1))
    recent = mx.random.randint(-1, min(V, 40), (B, 20), key=mx.random.key(2))
    return logits_of(kind, B, V), uniforms[0], uniforms[1], recent


def both(chain: dict[str, Any], logits: mx.array, *rest: mx.array) -> tuple[Any, Any]:
    sampler = Sampler(SamplingConfig(**chain), special_ids=(0, 5))
    uniforms, of_filter, recent = rest
    ours = cuda_sampling.draw_filtered(sampler, logits, uniforms, recent, of_filter, threads=THREADS)
    plain = draw_tokens(sampler, logits, uniforms, recent, of_filter)
    return [x.tolist() for x in ours], [x.tolist() for x in plain]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", range(len(CHAINS)))
@pytest.mark.parametrize("V", [33, 1000])
def test_draws_what_the_plain_path_draws(kind: str, place: int, V: int) -> None:
    ours, plain = both(CHAINS[place], *inputs(kind, 4, V))
    assert ours[0] == plain[0]
    assert ours[1] == pytest.approx(plain[1], abs=2e-5)
    assert ours[2] == pytest.approx(plain[2], abs=2e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_so_it_does_for_16_bits_whose_logits_are_often_equal(dtype: mx.Dtype) -> None:
    logits, *rest = inputs("normal", 3, 3000)
    ours, plain = both(EVERYTHING, logits.astype(dtype), *rest)
    assert ours[0] == plain[0]
    assert ours[1] == pytest.approx(plain[1], abs=2e-5)
    assert ours[2] == pytest.approx(plain[2], abs=2e-5)


def test_bits_are_those_of_any_order_of_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("EMULATED_SEED", seed)
        found.append(both(EVERYTHING, *inputs("normal", 2, 1000))[0])
    assert found[0] == found[1]


def test_more_equal_ones_than_there_is_room_for_are_told_apart_by_their_ids() -> None:
    B, V = 2, 9000
    _, uniforms, of_filter, recent = inputs("equal", B, 40)
    ours, plain = both({"top_k": 8500, "top_p": 0.9}, mx.zeros((B, V)), uniforms, of_filter, recent)
    assert ours[0] == plain[0]
    assert ours[2] == pytest.approx(plain[2], abs=2e-4)


def test_logits_that_are_not_finite_give_log_probs_that_are_not() -> None:
    logits, *rest = inputs("normal", 2, 100)
    for value in (math.nan, math.inf):
        logits[1, 17] = value
        ours, _ = both(EVERYTHING, logits, *rest)
        assert ours[0][1] < 100
        assert math.isfinite(ours[1][0])
        assert not math.isfinite(ours[1][1])
