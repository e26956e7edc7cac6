"""Members as a status tells of them, made by hand."""

from __future__ import annotations

from troupe.messages import MemberStatus

LAPTOP = MemberStatus(
    name="laptop",
    kind="worker",
    state="working",
    leases=("12.0.1", "12.0.4"),
    tokens_per_second=212.4,
    last_beat_s=1.2,
    version=12,
    device="MacBook Pro, Apple M2",
)
STUDIO = MemberStatus(
    name="studio", kind="worker", state="silent", last_beat_s=12.3, detail="nothing was heard of it for 10 s"
)
STRANGER = MemberStatus(
    name="old-mini",
    kind="worker",
    state="refused",
    last_beat_s=300.0,
    detail="MLX 0.31 gives other bits than the run's",
)
JUDGE = MemberStatus(name="judge", kind="worker", state="idle", offers=("rewards",), last_beat_s=0.4, device="1 × H200")
ALONE = MemberStatus(name="generator 1", kind="process", state="working", tokens_per_second=100.0)
CROWD = (LAPTOP, STUDIO, STRANGER, JUDGE)
