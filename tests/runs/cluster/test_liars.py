"""Workers with a good key and bad intent, in real runs: each is put out and named, and the run comes to what it would
have come to without them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec
import pytest

from tests.support.clusters import Cluster, a_cluster, alone, check_each_once, check_same
from tests.support.runs import incidents
from troupe.actors.generator.cluster_wire import Done, decode_done
from troupe.actors.generator.wire import PackedRollout, pack_rollout, unpack_rollout
from troupe.cluster.connection import connect
from troupe.cluster.link import DeclinedError, Link
from troupe.cluster.ticket import read_ticket
from troupe.messages import Rollout
from troupe.run.worker.generating import Generating
from troupe.run.worker.machine import asked_machine
from troupe.run.worker.session import Worker
from troupe.runtime.frames import encode
from troupe.runtime.roles import decisive_fault

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what is left over is looked for in /proc"),
]


class LyingLink(Link):
    """Changes what is told of the first completion of each group."""

    lie: Callable[[Rollout], Rollout]

    async def ask(self, verb: str, body: bytes = b"", *, wait_s: float = 10.0) -> bytes:
        return await super().ask(verb, self._changed(body) if verb == "done" else body, wait_s=wait_s)

    def _changed(self, body: bytes) -> bytes:
        done = decode_done(body)
        first, *others = done.completed.rollouts
        told: tuple[PackedRollout, ...] = (pack_rollout(type(self).lie(unpack_rollout(first))), *others)
        return encode(Done(part=done.part, completed=msgspec.structs.replace(done.completed, rollouts=told)))


def other_bits(rollout: Rollout) -> Rollout:
    """As a machine whose products are rounded otherwise."""
    told = (rollout.log_probs[0] - 2**-18, *rollout.log_probs[1:])
    return msgspec.structs.replace(rollout, log_probs=told, sampling_log_probs=told)


def rarer(rollout: Rollout) -> Rollout:
    """Whoever wants its tokens to weigh more."""
    told = tuple(each - 4.0 for each in rollout.log_probs)
    return msgspec.structs.replace(rollout, log_probs=told, sampling_log_probs=told)


def lie_to(cluster: Cluster, lie: Callable[[Rollout], Rollout]) -> str:
    """Work for a run with a key of one's own, until it says why no more."""

    class ThisLink(LyingLink):
        pass

    ThisLink.lie = staticmethod(lie)
    cluster.invite("liar")
    ticket = read_ticket(cluster.out / "join" / "liar.toml")

    async def work() -> str:
        here, facts = await asked_machine("cpu")
        async with connect(ticket) as bus:
            link = ThisLink(bus, ticket.run, tell=lambda line: None)
            worker = Worker(link, [Generating(bus, ticket.run, here, tell=lambda line: None)], facts, tell=print)
            try:
                await worker.run()
            except Exception as error:
                fault = decisive_fault(error)
                assert isinstance(fault, DeclinedError), fault
                return str(fault)
        return "the run has ended"

    return anyio.run(work)


def test_other_bits_are_found_and_none_of_them_is_used(tmp_path: Path) -> None:
    whole = alone(tmp_path / "alone")
    with a_cluster(tmp_path / "run", cluster__audit=1.0) as cluster:
        assert "other log-probs than the run's own generator makes" in lie_to(cluster, other_bits)
        cluster.join("worker")
        cluster.finish()
        check_same(cluster.out, whole)
    kinds = [kind for kind, _ in incidents(cluster.out)]
    assert kinds.count("worker_lied") == kinds.count("worker_put_out") == 1


def test_log_probs_that_are_none_of_the_policys_are_found_where_bits_may_differ(tmp_path: Path) -> None:
    free = {"schedule__mode": "free", "schedule__on_stale": "correct"}
    with a_cluster(tmp_path / "run", cluster__audit=1.0, **free) as cluster:
        assert "nats a token" in lie_to(cluster, rarer)
        cluster.join("worker")
        cluster.finish()
        check_each_once(cluster.out)
    assert [message for kind, message in incidents(cluster.out) if kind == "worker_lied"]
