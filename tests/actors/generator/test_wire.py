"""What goes between the generator and its processes comes out as it went in."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import make_prompt
from troupe.actors.generator.wire import (
    Completed,
    NewWeights,
    PackedRollout,
    Prompts,
    Setup,
    TurnEnded,
    decode_from_process,
    decode_in_process,
    pack_prompt,
    pack_rollout,
    pack_turn,
    unpack_prompt,
    unpack_rollout,
    unpack_turn,
)
from troupe.messages import Incident, Prompt, Rollout, RowStart, Slot, Span, TurnTaken
from troupe.policy import PRESETS, GenerationConfig, NetworkConfig, YarnScaling
from troupe.runtime.frames import MessageError, encode

float32 = st.floats(width=32, allow_nan=False)
TEXTS = st.lists(st.sampled_from('a \x00\n"\\é\u2028漢\ue000\uffff😀\U0010ffff')).map("".join)
"""Of characters of every length in UTF-8. Hypothesis' own texts need a table of all of Unicode, which takes a second to
make where none is kept, and that is held against the test."""


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    length = draw(st.integers(0, 20))
    numbers = st.lists(float32, min_size=length, max_size=length).map(tuple)
    log_probs = draw(numbers)
    ids = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length).map(tuple)
    return Rollout(
        token_ids=draw(ids),
        log_probs=log_probs,
        sampling_log_probs=draw(st.one_of(st.just(log_probs), numbers)),
        versions=draw(ids),
        finish_reason=draw(st.sampled_from(["stop", "length", "repetition", "aborted"])),
        text=draw(TEXTS),
        observed=draw(st.sampled_from([(), ((0, 2), (4, 5))])),
        rows=draw(st.sampled_from([(), (RowStart(start=0, prompt_ids=(1, 2), prompt_experts=b"\x01"),)])),
    )


@given(st.lists(rollouts(), max_size=3).map(tuple))
def test_completions_come_out_as_they_went_in(group: tuple[Rollout, ...]) -> None:
    sent = Completed(gid=2**60, rollouts=tuple(map(pack_rollout, group)))
    came = decode_from_process(encode(sent))
    assert isinstance(came, Completed)
    assert came.gid == 2**60
    assert tuple(map(unpack_rollout, came.rollouts)) == group


def test_a_token_takes_its_numbers_and_no_more() -> None:
    rollout = Rollout(
        token_ids=(1, 2, 3),
        log_probs=(-0.5, -1.0, -2.0),
        sampling_log_probs=(-0.5, -1.0, -2.0),
        versions=(4, 4, 5),
        finish_reason="length",
        text="",
    )
    packed = pack_rollout(rollout)
    assert packed.token_ids == struct.pack("3i", 1, 2, 3)
    assert packed.log_probs == struct.pack("3f", -0.5, -1.0, -2.0)
    assert packed.sampling_log_probs is None
    assert packed.versions == struct.pack("3i", 4, 4, 5)


def test_a_turn_comes_out_as_it_went_in_but_for_its_prompt_which_stays() -> None:
    prompt = make_prompt(1, 0)
    taken = TurnTaken(
        prompt=prompt, sample=2, turn=3, token_ids=(5, 2**31 - 1), finish_reason="length", start=9, room=7, asker=4
    )
    came = decode_from_process(encode(pack_turn(taken)))
    assert isinstance(came, TurnEnded)
    assert came.gid == prompt.gid
    assert unpack_turn(came, prompt) == taken


def test_of_a_prompt_goes_what_completes_it() -> None:
    prompt = make_prompt(3, 1, 2, answer=object())
    message = decode_in_process(encode(Prompts(prompts=(pack_prompt(prompt, round_size=1),))))
    assert isinstance(message, Prompts)
    expected = Prompt(
        gid=prompt.gid,
        slot=Slot(step=3, place=1, attempt=2),
        epoch=0,
        row=0,
        prompt="",
        prompt_ids=prompt.prompt_ids,
        columns={},
        round_size=1,
    )
    assert [unpack_prompt(packed) for packed in message.prompts] == [expected]


YARN = YarnScaling(factor=2.0, original_max_position_embeddings=1024)


@pytest.mark.parametrize(
    "policy",
    [*PRESETS.values(), msgspec.structs.replace(PRESETS["Qwen3-0.6B"], rope_scaling=YARN)],
    ids=[*PRESETS, "yarn"],
)
def test_a_setup_comes_out_as_it_went_in(policy: NetworkConfig) -> None:
    setup = Setup(
        name="generator",
        policy=policy,
        generation=GenerationConfig(stop=("\n",), logit_bias={5: -1.5}, top_k=4),
        stop_ids=(1, 2),
        tokenizer="/some/where",
        seed=2**63 - 1,
        max_staleness=1,
        most_at_once=None,
        live=8,
        on_cpu=True,
        limit_gb=1.5,
    )
    assert decode_in_process(encode(setup)) == setup


@pytest.mark.parametrize(
    "message",
    [
        Span(actor="generator", name="generate", start_s=1.5, end_s=2.5, gids=(1, 2), process=77),
        Incident(actor="generator", kind="k", message="m", gid=3),
    ],
)
def test_reports_pass(message: Any) -> None:
    assert decode_from_process(encode(message)) == message


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"no msgpack", encode({"type": "Stranger"}), encode([1, 2])])
def test_other_frames_are_refused(frame: bytes) -> None:
    for decode in (decode_in_process, decode_from_process):
        with pytest.raises(MessageError, match=rf"a frame of {len(frame)} bytes .* is no message"):
            decode(frame)


def test_what_goes_one_way_is_refused_the_other_way() -> None:
    with pytest.raises(MessageError, match="no message"):
        decode_from_process(encode(NewWeights(version=1, path="/x")))


@pytest.mark.parametrize(
    ("ids", "log_probs", "message"),
    [(b"12345", b"", "an array of 5 bytes is not made of numbers of 4"), (b"1234", b"", "of 1 tokens came with 0 log")],
)
def test_arrays_that_do_not_fit_are_refused(ids: bytes, log_probs: bytes, message: str) -> None:
    packed = PackedRollout(
        token_ids=ids, log_probs=log_probs, sampling_log_probs=None, versions=b"1234", finish_reason="stop", text=""
    )
    with pytest.raises(MessageError, match=message):
        unpack_rollout(packed)
