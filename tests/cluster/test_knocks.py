"""Who is refused at the message server is told of by name, and not for each time."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from tests.support.nats import PATIENCE_S, Raw, published, server, ticket_of
from troupe.cluster.keys import new_seed
from troupe.cluster.knocks import Knocks
from troupe.cluster.users import User, UserList

KEY = "U" + "A" * 55
KNOWN = UserList(run="r1", users=(User("mini", KEY),))
STRANGER = '[7] 2026/11/30 16:00:00.000000 [ERR] 10.0.0.9:4001 - cid:8 - authentication error - Nkey "UB"\n'
WORKER = f'[7] 2026/11/30 [ERR] 10.0.0.7:4001 - cid:9 - "WORKERS/nkey:{KEY}" - Publish Violation - Subject "x"\n'


def test_a_server_says_who_tried_what(tmp_path: Path) -> None:
    told: list[str] = []
    with server(tmp_path, tell=told.append) as message_server:
        ticket = ticket_of(message_server, "worker")
        for _ in range(3):
            with Raw(ticket.addresses[0], ticket.run, ticket.ca) as stranger:
                stranger.join(new_seed())
        with Raw(ticket.addresses[0], ticket.run, ticket.ca) as worker:
            worker.join(ticket.seed)
            worker.told(published(f"{ticket.run}.w.0"), b"SUB > 1\r\n")
        until = time.monotonic() + PATIENCE_S
        while len(told) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    stranger_told, worker_told = sorted(told)
    assert stranger_told.startswith("somebody showed no key that is known")
    assert "127.0.0.1" in stranger_told
    assert worker_told.startswith("worker worker tried what it may not")
    assert ticket.seed not in "".join(told)


def test_the_same_is_told_ever_less_often_and_nothing_else_is_lost_for_it(tmp_path: Path) -> None:
    log, told, now = tmp_path / "nats.log", list[str](), 0.0
    log.write_text(STRANGER)  # of before
    knocks = Knocks(log, told.append, lambda: now)
    times = []
    for second in range(0, 4 * 3600, 10):
        now = float(second)
        with log.open("a") as file:
            file.write("[7] [INF] x\n" + STRANGER * 2)
        knocks.look(KNOWN)
        times += [second] if told and "somebody" in told.pop() else []
    assert times[:5] == [0, 60, 180, 420, 900]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) == 3600
    log.write_text(WORKER)  # a new file
    knocks.look(KNOWN)
    knocks.look(UserList(run="r1"))
    assert told == ['worker mini tried what it may not; the last from 10.0.0.7: Publish Violation - Subject "x"']
    log.write_text(STRANGER.replace("UB", KEY))
    knocks.look(UserList(run="r1"))
    assert told[1].startswith("worker mini, whose key is good no more, asks to be let in; the last from 10.0.0.9")
