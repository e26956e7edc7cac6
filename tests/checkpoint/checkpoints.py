"""Checkpoints to write and read, small and different from each other."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import msgspec

from tests.support.fakes import make_scored
from tests.support.tiny import CONFIG
from troupe.checkpoint import Checkpoint, RewardState, RunState
from troupe.grpo import adamw_init
from troupe.messages import CurriculumState, OpenGroup, Past, RowRecord, ScoredGroup, Slot, StepRows, Unfinished
from troupe.policy import Weights, init_weights

ARRAYS = {
    "f32": mx.arange(6, dtype=mx.float32).reshape(2, 3),
    "turned": mx.arange(6, dtype=mx.float32).reshape(2, 3).T,
    "bf16": (mx.arange(5) * 0.3).astype(mx.bfloat16),
    "f16 turned": (mx.arange(6) * 0.3).astype(mx.float16).reshape(3, 2).T,
    "bf16 turned": (mx.arange(6) * 0.3).astype(mx.bfloat16).reshape(3, 2).T,
    "every other": mx.arange(10)[::2],
    "scalar": mx.array(2.5),
    "none": mx.zeros((0, 4)),
    "u16": mx.array([0, 65535], dtype=mx.uint16),
    "bool": mx.array([True, False, True]),
    "i64": mx.array([-(2**40)], dtype=mx.int64),
    "ü": mx.array([1, 2], dtype=mx.uint8),
}
"""Of every kind that a file may hold."""


def weights(seed: int, dtype: mx.Dtype = mx.float32) -> Weights:
    """Of a small policy; evaluated."""
    made_now = init_weights(CONFIG, mx.random.key(seed), dtype)
    mx.eval(list(made_now.values()))
    return made_now


def made(version: int, *, dtype: mx.Dtype = mx.float32, behind: tuple[int, ...] = (), **state: Any) -> Checkpoint:
    """All that a checkpoint holds in any case; `state`: fields of its RunState."""
    held = weights(version, dtype)
    moments = {
        name: array + 0.5 if array.ndim else mx.array(float(version)) for name, array in adamw_init(held).items()
    }
    moments |= {"m.model.norm.weight": weights(version + 100)["model.layers.0.input_layernorm.weight"] * 0.3}
    mx.eval(list(moments.values()))
    return Checkpoint(
        config=CONFIG,
        weights=held,
        optimizer_state=moments,
        behind={number: weights(number, dtype) for number in behind},
        state=msgspec.structs.replace(RunState(version=version, seed=11, dataset="abc"), **state),
    )


def disk_with_room(left: int) -> Callable[[int, memoryview], int]:
    """An `os.write` that takes so many bytes, and then says that the disk is full."""
    write = os.write

    def limited(descriptor: int, block: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, block[:left])
        left -= taken
        return taken

    return limited


def under_way() -> Unfinished:
    """Groups in every rig, with all that they may carry."""
    scored = make_scored(3, 0, (0.5, None, -1.0))
    remarks: dict[str, tuple[Any, ...]] = {"why": ("short", None, {"b": [1, 2.5]}), "raw": (b"\x00\xff", True, "é")}
    return Unfinished(
        next=9,
        open=(OpenGroup(slot=Slot(step=3, place=0)), OpenGroup(slot=Slot(step=3, place=1, attempt=2), row=5)),
        scored=(msgspec.structs.replace(scored, logged={"len": 2.0}, extra=remarks), make_scored(3, 1, attempt=1)),
        collected=(make_scored(2, 1, version=2),),
        states={5: "trained", 2**48 + 7: "stale"},
        replaced=(5,),
        pasts=(Past(step=3, place=1, filtered=1, sent_back=True),),
    )


def whole(version: int) -> Checkpoint:
    """A checkpoint with everything that one can hold."""
    return msgspec.structs.replace(
        made(
            version,
            behind=(version - 1,),
            num_tokens=12345,
            mode="free",
            model="f00d",
            skipped_in_a_row=2,
            rewards={"kind": RewardState(version=3, spec="rewards.py:kind"), "given": RewardState()},
            metrics={"reward": 0.25},
        ),
        reference=weights(version + 50),
        unfinished=under_way(),
        curriculum=CurriculumState(
            records=(RowRecord(row=3, pool="easy", turn=2, visits=4, rates=(0.5, 1.0), step=1),),
            chosen=(StepRows(step=version, rows=(3, 1), replacements=(0, 2)),),
            away=(1, 3),
            turns={"easy": 1, "normal": 0},
            end=9,
        ),
    )


def without_prompts(unfinished: Unfinished) -> Unfinished:
    """As it comes back: a dataset can say the rest."""
    replace = msgspec.structs.replace

    def bare(group: ScoredGroup) -> ScoredGroup:
        prompt = replace(group.group.prompt, prompt="", columns={})
        return replace(group, group=replace(group.group, prompt=prompt))

    return replace(
        unfinished,
        scored=tuple(map(bare, unfinished.scored)),
        collected=tuple(map(bare, unfinished.collected)),
    )


def assert_same_arrays(a: Any, b: Any) -> None:
    """The same names, types, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        left, right = (bytes(memoryview(x[name].reshape(-1).view(mx.uint8))) for x in (a, b))
        assert left == right, name


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """The same in all, bit for bit."""
    assert (a.config, a.state, a.curriculum) == (b.config, b.state, b.curriculum)
    assert without_prompts(a.unfinished) == without_prompts(b.unfinished)
    assert list(a.weights) == list(b.weights)  # sums over all weights add in this order
    assert_same_arrays(a.weights, b.weights)
    assert_same_arrays(a.optimizer_state, b.optimizer_state)
    assert list(a.behind) == list(b.behind)
    for version in a.behind:
        assert list(a.behind[version]) == list(b.behind[version])
        assert_same_arrays(a.behind[version], b.behind[version])
    assert (a.reference is None) == (b.reference is None)
    assert_same_arrays(a.reference or {}, b.reference or {})
