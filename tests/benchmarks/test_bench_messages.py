"""The arithmetic of the benchmark, and that a hop is measured at all."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from benchmarks.bench_messages import hops_us, step_shares
from troupe.messages import Span


def test_machinery_is_what_neither_device_nor_rewards_cover() -> None:
    spans = [
        Span(actor="learner", name="learn", start_s=0.0, end_s=1.0),
        Span(actor="prompter", name="issue", start_s=1.0, end_s=1.5),
        Span(actor="generator", name="generate", start_s=2.0, end_s=6.0),
        Span(actor="generator", name="decode", start_s=2.0, end_s=5.0),
        Span(actor="scorer", name="score", start_s=4.0, end_s=5.5),
        Span(actor="learner", name="learn", start_s=7.0, end_s=11.0),
    ]
    [step] = step_shares(spans)
    assert step["step_ms"] == pytest.approx(10_000)
    assert step["machinery_ms"] == pytest.approx(2_500)  # 1 to 2, and 5.5 to 7
    assert step["prompter: issue"] == pytest.approx(500)
    assert step["generator: generate"] == pytest.approx(500)
    assert step["generator: decode"] == pytest.approx(0)


@pytest.mark.parametrize("spans", [False, True])
def test_a_hop_takes_time(spans: bool, tmp_path: Path) -> None:
    took_us, dropped = anyio.run(lambda: hops_us(2, 50, spans=spans, burst=5, folder=tmp_path))
    assert took_us > 0.0
    assert dropped == 0
