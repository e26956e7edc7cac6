"""What a run takes, counted by hand; what is chosen below a limit, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from troupe import RunConfig, load_config
from troupe.errors import ConfigError
from troupe.grpo import update_bytes
from troupe.policy import (
    PRESETS,
    MicroBatch,
    NetworkConfig,
    decode_memory_bytes,
    fused_copy_bytes,
    gradient_memory_bytes,
    parameter_count,
)
from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.engine import split_into_waves
from troupe.policy.gradient.memory import forward_memory_bytes
from troupe.policy.network import attention
from troupe.policy.network.attention import attention_is_fused
from troupe.run import memory as budget
from troupe.run.memory import Plan, describe, peak_bytes, plan_memory
from troupe.run.workload import TeacherWork, Workload
from troupe.runtime.memory import GB, RESERVE, device_limit_gb, memory_limited

POLICY = NetworkConfig(
    vocab_size=5000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
WORK = Workload(policy=POLICY, dtype=mx.bfloat16, longest_prompt=20, on_cpu=True)
NUMBERS = parameter_count(POLICY)
WEIGHTS = 2 * NUMBERS
STATE = (4 + 4 + 2) * NUMBERS


def config_of(limit_gb: float | None = None, **settings: Any) -> RunConfig:
    """3 prompts × 4 completions of 100 tokens; settings as `section__key=value`."""
    table: dict[str, Any] = {
        "generation": {"num_generations": 4, "max_completion_length": 100},
        "learner": {"batch_size": 3},
    }
    if limit_gb is not None:
        table["memory_limit_gb"] = limit_gb
    for name, value in settings.items():
        section, _, key = name.partition("__")
        table.setdefault(section, {})[key] = value
    return load_config(None, [table])


def choices(plan: Plan) -> tuple[int | None, bool | None, bool | None]:
    learner = plan.config.learner
    return learner.gradient_accumulation_steps, learner.gradient_checkpointing, plan.config.checkpoint.overlap


def usable(limit_gb: float) -> float:
    return (1.0 - RESERVE) * limit_gb


def limit_for(needed_gb: float) -> float:
    """A hair more than the lowest limit that leaves this much."""
    return needed_gb / (1.0 - RESERVE) * (1.0 + 1e-9)


def peak_gb(plan: Plan) -> float:
    return peak_bytes(plan.phases) / GB


def decode_bytes(prompts: int, G: int = 4, **filters: bool) -> int:
    return decode_memory_bytes(POLICY, [20] * prompts, G, 100, mx.bfloat16, **filters)


def test_without_a_limit_nothing_is_spared() -> None:
    plan = plan_memory(config_of(), WORK)
    assert choices(plan) == (1, False, True)
    assert plan.config.generation.memory_limit_gb is None
    assert (plan.limit_gb, plan.notices) == (None, ())


def test_the_phases_of_a_run_by_hand() -> None:
    held = {"policy versions": WEIGHTS, "optimizer state": STATE, "checkpoint being written": WEIGHTS + STATE}
    generating = {
        "weights laid out for decoding": fused_copy_bytes(POLICY, mx.bfloat16),
        "decode": decode_bytes(3),
    }
    whole = MicroBatch(prompts=3, prompt_length=20, rows=12, completion_length=100)
    learning = gradient_memory_bytes(POLICY, mx.bfloat16, whole)
    learn = {"gradients": WEIGHTS, "forward and backward": learning - WEIGHTS}
    update = {"gradients": WEIGHTS, "moving weights": update_bytes(NUMBERS, 5000 * 64, mx.bfloat16)}
    assert plan_memory(config_of(), WORK).phases == {
        "generate": held | generating,
        "learn": held | learn,
        "update": held | update,
    }


def test_a_teacher_is_held_and_works_beside_the_generator() -> None:
    larger = msgspec.structs.replace(POLICY, hidden_size=128)
    teacher = TeacherWork(larger, mx.float32, adapter=None, shares_base=False)
    plan = plan_memory(config_of(), WORK._replace(teachers=(teacher,)))
    assert all(items["teacher"] == 4 * parameter_count(larger) for items in plan.phases.values())
    piece = MicroBatch(prompts=1, prompt_length=20, rows=4, completion_length=100)
    forward = {"teacher's forward pass": forward_memory_bytes(larger, mx.float32, piece)}
    assert plan.phases["generate"].items() >= forward.items()
    assert not plan.phases["learn"].keys() & forward.keys(), "all is taught by then"
    stale = plan_memory(config_of(schedule__max_staleness=1), WORK._replace(teachers=(teacher,)))
    assert stale.phases["learn"].items() >= forward.items()
    shared = plan_memory(config_of(), WORK._replace(teachers=(teacher._replace(shares_base=True),)))
    assert shared.phases["learn"]["teacher"] == 0


def test_with_staleness_versions_are_kept_and_both_work_at_once() -> None:
    plan = plan_memory(config_of(schedule__max_staleness=1, checkpoint__overlap=False), WORK)
    assert plan.phases["learn"]["policy versions"] == 2 * WEIGHTS
    for name in ("decode", "weights laid out for decoding"):
        assert plan.phases["learn"][name] == plan.phases["update"][name] == plan.phases["generate"][name]
    assert not any("checkpoint being written" in items for items in plan.phases.values())


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_a_pinned_run_keeps_every_version_that_it_needs_and_a_free_one_two(staleness: int) -> None:
    pinned, free = (
        plan_memory(config_of(schedule__max_staleness=staleness, schedule__mode=mode), WORK).phases
        for mode in ("pinned", "free")
    )
    assert {items["policy versions"] for items in pinned.values()} == {(staleness + 1) * WEIGHTS}
    assert {items["checkpoint being written"] for items in pinned.values()} == {(staleness + 1) * WEIGHTS + STATE}
    assert {items["policy versions"] for items in free.values()} == {(2 if staleness else 1) * WEIGHTS}
    assert {items["checkpoint being written"] for items in free.values()} == {WEIGHTS + STATE}
    layout = fused_copy_bytes(POLICY, mx.bfloat16)
    assert pinned["generate"]["weights laid out for decoding"] == layout
    assert free["generate"]["weights laid out for decoding"] == (2 if staleness else 1) * layout


def test_what_else_is_counted() -> None:
    plain, more = (
        plan_memory(config_of(**settings), WORK).phases
        for settings in (
            {},
            {"learner__beta": 0.1, "learner__num_iterations": 2, "learner__entropy_coef": 0.1, "generation__top_k": 5},
        )
    )
    assert {items["reference policy"] for items in more.values()} == {WEIGHTS}
    assert more["learn"]["next policy"] == more["update"]["next policy"] == WEIGHTS
    whole = MicroBatch(prompts=3, prompt_length=20, rows=12, completion_length=100)
    learning = gradient_memory_bytes(POLICY, mx.bfloat16, whole, entropy_gradient=True)
    assert more["learn"]["forward and backward"] == learning - WEIGHTS
    assert more["generate"]["decode"] == decode_bytes(3, is_filtering=True) > plain["generate"]["decode"]


def test_histories_told_anew_are_counted_and_gradients_added_up_for_them() -> None:
    config = config_of(checkpoint__overlap=False)

    def learning(longest_history: int | None) -> dict[str, int]:
        return dict(plan_memory(config, WORK._replace(longest_history=longest_history)).phases["learn"])

    plain, short, long = learning(None), learning(120), learning(30_000)
    assert plain["gradients"] == WEIGHTS
    assert short["gradients"] == long["gradients"] == 4 * NUMBERS
    assert sum(plain.values()) < sum(short.values()) < sum(long.values())


def test_micro_batches_are_counted_by_the_prompts_they_may_touch() -> None:
    def expected(prompts: int, rows: int) -> int:
        batch = MicroBatch(prompts=prompts, prompt_length=20, rows=rows, completion_length=100)
        return gradient_memory_bytes(POLICY, mx.bfloat16, batch, adds_up=True) - 4 * NUMBERS

    for micro_batches, prompts, rows in [(3, 1, 4), (2, 3, 6), (5, 2, 3), (6, 2, 2), (12, 1, 1)]:
        plan = plan_memory(config_of(learner__gradient_accumulation_steps=micro_batches), WORK)
        assert plan.phases["learn"]["gradients"] == plan.phases["update"]["gradients"] == 4 * NUMBERS
        assert plan.phases["learn"]["forward and backward"] == expected(prompts, rows)


@pytest.mark.parametrize("staleness", [0, 1])
def test_below_ever_lower_limits_ever_more_is_given_up(staleness: int) -> None:
    most = peak_gb(plan_memory(config_of(schedule__max_staleness=staleness), WORK))
    seen: list[tuple[int | None, bool | None, bool | None]] = []
    limit_gb, refusal = limit_for(most), ""
    while not refusal:
        try:
            plan = plan_memory(config_of(limit_gb, schedule__max_staleness=staleness), WORK)
        except ConfigError as error:
            refusal = str(error)
            continue
        assert peak_gb(plan) <= usable(limit_gb)
        assert plan.limit_gb == limit_gb
        assert plan_memory(plan.config, WORK).config == plan.config, "a resume makes the same choices"
        seen.append(choices(plan))
        limit_gb = limit_for(peak_gb(plan)) * 0.999
    assert refusal.startswith(
        f"memory_limit_gb is {limit_gb:.4g}, of which 5% is kept in reserve, but the run takes {peak_gb(plan):.3g} GB"
    )
    assert seen[:2] == [(1, False, True), (1, False, False)]
    assert seen[-1] == (12, True, False)
    assert (1, True, False) in seen
    numbers = [n or 0 for n, *_ in seen]
    assert staleness or numbers == sorted(numbers)


def test_micro_batches_side_by_side_are_as_many_at_least_and_all_take_memory() -> None:
    alone, beside = (
        plan_memory(config_of(learner__gradient_accumulation_steps=micros, schedule__learner_streams=streams), WORK)
        for micros, streams in [(3, 1), (None, 3)]
    )
    assert choices(beside) == (3, False, True)
    one, three = (plan.phases["learn"]["forward and backward"] for plan in (alone, beside))
    assert three == 3 * one
    assert beside.phases["learn"]["gradients"] == alone.phases["learn"]["gradients"]


def test_lanes_cut_the_batch_and_their_sums_wait_for_each_other() -> None:
    whole, cut = plan_memory(config_of(), WORK), plan_memory(config_of(learner__gradient_accumulation_steps=4), WORK)
    one = plan_memory(config_of(learner__lanes=4), WORK).phases
    waiting = {"sums of lanes": 2 * 4 * NUMBERS}  # of two lanes, and of one, beside that under way
    assert one == {**cut.phases, "learn": {**cut.phases["learn"], **waiting}}
    two = plan_memory(config_of(learner__lanes=4), WORK._replace(ranks=2, on_cpu=False)).phases
    assert two["learn"]["sums of lanes"] == 4 * NUMBERS
    assert two["update"]["gradients of other ranks"] == 4 * 4 * NUMBERS
    assert "sums of lanes" not in plan_memory(config_of(learner__lanes=4), WORK._replace(ranks=4)).phases["learn"]
    assert "sums of lanes" not in whole.phases["learn"]


def test_ranks_on_a_processor_share_its_memory_and_on_cards_have_one_each() -> None:
    config = config_of(learner__lanes=2, learner__beta=0.1)
    alone = plan_memory(config, WORK).phases
    shared = plan_memory(config, WORK._replace(ranks=2)).phases
    assert shared["learn"]["other ranks"] == 2 * WEIGHTS + STATE + sum(
        alone["learn"][name] for name in ("gradients", "forward and backward")
    )
    assert "other ranks" not in plan_memory(config, WORK._replace(ranks=2, on_cpu=False)).phases["learn"]


def test_processes_of_the_generator_on_other_cards_take_nothing_here() -> None:
    config = config_of(schedule__generator="process", schedule__generator_processes=3)
    work = WORK._replace(on_cpu=False)
    versions = [
        plan_memory(config, each).phases["generate"]["policy versions of the generator"]
        for each in (work, work._replace(beside=2), work._replace(beside=1))
    ]
    assert versions == [3 * WEIGHTS, 2 * WEIGHTS, WEIGHTS]
    assert plan_memory(config, work._replace(beside=0)).phases == plan_memory(config_of(), work).phases


def test_streams_that_nobody_asked_for_are_given_up_before_a_run_is_refused() -> None:
    work = WORK._replace(streams=12)
    plan = plan_memory(config_of(), work)
    assert (plan.config.schedule.learner_streams, choices(plan)) == (12, (12, False, True))
    alone = plan_memory(config_of(schedule__learner_streams=1, learner__gradient_accumulation_steps=3), WORK)
    limit_gb = limit_for(peak_gb(alone))
    with pytest.raises(ConfigError, match="the run takes"):
        plan_memory(config_of(limit_gb, schedule__learner_streams=12), work)
    fitted = plan_memory(config_of(limit_gb), work)
    assert fitted.config.schedule.learner_streams == 1
    assert peak_gb(fitted) <= usable(limit_gb)
    assert plan_memory(fitted.config, work).config == fitted.config, "a resume makes the same choices"


def test_what_is_left_goes_to_decoding_and_fits_as_many_prompts_as_were_counted() -> None:
    work = WORK._replace(on_cpu=False)
    settings: dict[str, Any] = {
        "generation__num_generations": 64,
        "learner__gradient_accumulation_steps": 192,
        "learner__gradient_checkpointing": True,
        "checkpoint__overlap": False,
    }
    free = plan_memory(config_of(**settings), work).phases
    assert peak_bytes(free) == sum(free["generate"].values())
    plan = plan_memory(config_of(limit_for(peak_bytes(free) * 0.95 / GB), **settings), work)
    room_gb = plan.config.generation.memory_limit_gb
    assert room_gb is not None

    def cost(lengths: Sequence[int]) -> int:
        writes = not attention_is_fused(16, mx.bfloat16, gradient=False, on_cpu=False)
        return decode_memory_bytes(POLICY, lengths, 64, 100, mx.bfloat16, writes_scores=writes, copies_updates=True)

    assert plan.phases["generate"]["decode"] == cost([20, 20]) <= room_gb * GB < cost([20] * 3)
    assert split_into_waves([20] * 3, cost, room_gb * GB) == [range(2), range(2, 3)]
    others = sum(plan.phases["generate"].values()) - cost([20, 20])
    assert others + room_gb * GB == pytest.approx(0.95 * peak_bytes(free), abs=1e6)
    assert "decoding 2 of 3 prompts at a time" in plan.notices[0]


def test_the_choices_are_told_in_one_line() -> None:
    limit_gb = limit_for(0.999 * peak_gb(plan_memory(config_of(checkpoint__overlap=False), WORK)))
    plan = plan_memory(config_of(limit_gb, checkpoint__overlap=False), WORK)
    assert plan.notices == (
        f"memory: at most {peak_gb(plan):.1f} of {limit_gb:.4g} GB, decoding a step at once, learning at once, "
        "computing layers twice, waiting for checkpoints",
    )
    plan = plan_memory(config_of(10.0, learner__gradient_accumulation_steps=5), WORK)
    assert "learning in 5 micro-batches of 3 rows, keeping what layers compute, learning while" in plan.notices[0]


def test_what_the_config_names_stays() -> None:
    config = config_of(
        10.0,
        learner__gradient_accumulation_steps=2,
        learner__gradient_checkpointing=True,
        checkpoint__overlap=False,
        generation__memory_limit_gb=0.5,
        schedule__learner_streams=2,
    )
    assert plan_memory(config, WORK).config == config
    tight = config_of(0.02, learner__gradient_checkpointing=False)
    with pytest.raises(ConfigError, match=r"memory_limit_gb is 0\.02, of which 5% .* lower generation\.max_"):
        plan_memory(tight, WORK)


def test_a_decode_limit_below_one_group_is_refused() -> None:
    needed = decode_bytes(1)
    config = config_of(generation__memory_limit_gb=needed / GB)
    assert plan_memory(config, WORK).phases["generate"]["decode"] == needed
    with pytest.raises(ConfigError, match=r"but the 4 completions of the longest prompt \(20 tokens\) take"):
        plan_memory(config_of(generation__memory_limit_gb=(needed - 1) / GB), WORK)


def test_a_limit_that_only_the_device_recommends_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def recommend(limit_gb: float) -> Plan:
        monkeypatch.setattr(budget, "device_limit_gb", lambda: limit_gb)
        return plan_memory(config_of(), WORK)

    plan = recommend(10.0)
    assert (choices(plan), plan.limit_gb, plan.notices) == ((1, False, True), 10.0, ())
    assert plan.config.memory_limit_gb is None
    plan = recommend(limit_for(0.999 * peak_gb(plan)))
    assert choices(plan) == (1, False, False)
    assert "waiting for checkpoints" in plan.notices[0]
    plan = recommend(0.001)
    assert (choices(plan), plan.limit_gb) == ((12, True, False), None)
    [notice] = plan.notices
    assert notice.startswith("the device recommends 0.001 GB, of which 5% is kept in reserve, but the run takes")
    assert notice.endswith("it is tried all the same")
    assert plan.config.generation.memory_limit_gb == decode_bytes(3) / GB, "waves would spare nothing"


@pytest.mark.parametrize(
    ("device", "info", "expected"),
    [
        (mx.cpu, {"total_memory": 10**11}, None),
        (mx.gpu, {"max_recommended_working_set_size": 11_840_000_000, "memory_size": 2**34}, 11.8),
        (mx.gpu, {"total_memory": 80_000_000_000}, 72.0),
        (mx.gpu, {}, None),
    ],
)
def test_what_a_device_recommends(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, info: dict[str, int], expected: float | None
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert device_limit_gb() == expected


def test_mlx_is_told_and_gets_its_own_limits_back() -> None:
    before = mx.set_memory_limit(10**12)
    try:
        with memory_limited(0.5):
            assert mx.get_memory_limit() == 475_000_000
        with memory_limited(None):
            assert mx.get_memory_limit() == 10**12
        with pytest.raises(KeyError), memory_limited(0.5):
            raise KeyError
        assert mx.get_memory_limit() == 10**12
    finally:
        mx.set_memory_limit(before)


def test_the_table() -> None:
    phases = {"generate": {"weights": 1_500_000_000, "decode": 250_000_000}, "learn": {"weights": 1_500_000_000}}
    assert describe({"learn": {"weights": 12_345_678}}).splitlines()[1] == "weights                 12.35"
    assert describe(phases).splitlines() == [
        "memory at the most, GB  generate  learn",
        "weights                     1.50   1.50",
        "decode                      0.25",
        "together                    1.75   1.50",
    ]


@pytest.mark.parametrize(("has_card", "dtype"), [(True, mx.bfloat16), (True, mx.float32), (False, mx.bfloat16)])
def test_a_gpu_counts_what_it_writes_out_and_copies(
    has_card: bool, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: has_card)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr(attention, "_has_cudnn_attention", lambda: True)
    policy = msgspec.structs.replace(POLICY, head_dim=128)
    phases = plan_memory(config_of(), WORK._replace(policy=policy, dtype=dtype, on_cpu=False)).phases
    whole = MicroBatch(prompts=3, prompt_length=20, rows=12, completion_length=100)
    is_fused = has_card and dtype == mx.bfloat16
    gradients = phases["learn"]["gradients"]
    learning = gradient_memory_bytes(policy, dtype, whole, on_cpu=False, writes_scores=not is_fused)
    assert phases["learn"]["forward and backward"] == learning - gradients
    assert phases["generate"]["decode"] == decode_memory_bytes(
        policy,
        [20] * 3,
        4,
        100,
        dtype,
        writes_scores=has_card and dtype == mx.float32,  # Metal writes none out forwards
        copies_updates=not has_card,
        in_blocks=False,
    )


def test_qwen3_in_16_gb() -> None:
    """The run that people with 16 GB want: 4 prompts × 8 completions of 512 tokens, on a GPU."""
    work = Workload(policy=PRESETS["Qwen3-0.6B"], dtype=mx.bfloat16, longest_prompt=128, on_cpu=False)
    sizes: dict[str, Any] = {"generation__num_generations": 8, "generation__max_completion_length": 512}
    plan = plan_memory(config_of(16.0, learner__batch_size=4, **sizes), work)
    assert (plan.config.learner.gradient_accumulation_steps, peak_gb(plan) < 16) == (1, True)
    stale = plan_memory(config_of(16.0, learner__batch_size=4, schedule__max_staleness=1, **sizes), work)
    assert stale.config.learner.gradient_checkpointing
    with pytest.raises(ConfigError, match=r"schedule\.max_staleness, or take a smaller model"):
        plan_memory(config_of(12.0, learner__batch_size=4, schedule__max_staleness=1, **sizes), work)


def test_processes_of_the_generator_have_versions_and_decodes_of_their_own() -> None:
    placed = {"schedule__generator": "process", "schedule__generator_processes": 2, "schedule__max_staleness": 1}
    plan = plan_memory(config_of(4.0, **placed), WORK)
    generate = plan.phases["generate"]
    decode = decode_memory_bytes(POLICY, [20] * 2, 4, 100, mx.bfloat16, is_filtering=False, writes_scores=True)
    assert generate["policy versions"] == 2 * WEIGHTS
    assert generate["policy versions of the generator"] == 2 * 2 * WEIGHTS
    assert generate["policy versions on the way"] == 2 * WEIGHTS
    assert generate["weights laid out for decoding"] == 2 * fused_copy_bytes(POLICY, mx.bfloat16)
    assert generate["decode"] == 2 * decode, "each has two of the three prompts at the most"
    assert plan.phases["learn"]["decode"] == 2 * decode
    room_gb, each_gb = plan.config.generation.memory_limit_gb, plan.generator_limit_gb
    assert room_gb is not None
    assert each_gb is not None
    assert plan.limit_gb is not None
    assert room_gb * GB >= decode
    held = 2 * WEIGHTS + fused_copy_bytes(POLICY, mx.bfloat16)
    assert each_gb * (1.0 - RESERVE) * GB == pytest.approx(held + room_gb * GB)
    assert plan.limit_gb == pytest.approx(4.0 - 2 * each_gb - 2 * WEIGHTS / GB)
    training = peak_bytes(plan.phases) - 2 * WEIGHTS - 2 * (held + decode)
    assert plan.limit_gb * (1.0 - RESERVE) * GB >= training - 0.002 * GB


def test_a_process_keeps_what_it_took_while_the_learner_works() -> None:
    plan = plan_memory(config_of(schedule__generator="process"), WORK)
    assert plan.phases["learn"]["decode"] == plan.phases["generate"]["decode"]
    assert plan.generator_limit_gb is None
    assert plan_memory(config_of(4.0), WORK).generator_limit_gb is None
