"""`troupe cluster`: inviting, revoking and listing, beside a run that is live and one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.nats import ends, server, until
from troupe.cli.cluster import cluster, lines_of
from troupe.cluster.ticket import read_ticket
from troupe.cluster.users import User
from troupe.messages import MemberStatus
from troupe.runtime.lock import RunLock

pytestmark = pytest.mark.anyio


def told(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cluster, list(words))
    assert result.exit_code == code, result.output
    return result.output


async def test_a_live_run_lets_in_who_is_invited_and_cuts_off_who_is_revoked(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert "not been served" in told("list", out, code=2)
    with server(tmp_path) as message_server:
        lock = RunLock(tmp_path)
        lock.take()
        assert "the run lets it in" in told("invite", out, "mini")
        ticket = read_ticket(tmp_path / "join" / "mini.toml")
        async with ends(ticket) as (mini,):
            assert "invited already" in told("invite", out, "mini", code=2)
            assert "mini" in told("list", out)
            assert "mini is cut off" in told("revoke", out, "mini")
            await until(mini, "refused")
        lock.release()
        assert not (tmp_path / "join" / "mini.toml").exists()
        assert "no worker 'mini'" in told("revoke", out, "mini", code=2)
        assert "no name for a worker" in told("invite", out, "../mini", code=2)
        assert ticket.seed not in told("list", out) + message_server.users.folder.joinpath("users.toml").read_text()
    assert "counts from its next start" in told("invite", out, "mini")


def test_a_line_says_what_a_worker_is_doing() -> None:
    users = [User("mini", "U"), User("studio", "U")]
    there = MemberStatus(name="mini", kind="worker", state="working", tokens_per_second=612.0, last_beat_s=0.5)
    first, second = lines_of(users, [there, MemberStatus(name="studio", kind="process", state="working")])
    assert first.startswith("mini    ")
    assert "612" in first
    assert second == "studio  not here"
    assert lines_of(users, None) == ["mini    invited", "studio  invited"]
