"""The join file: whole, only its owner's, checked when it is read, and its key shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.cluster.ticket import Ticket, check_name, read_ticket, write_ticket
from troupe.errors import ConfigError

SEED = "SU" + "A" * 56
TICKET = Ticket(
    run="k3j2",
    name="worker",
    addresses=("192.168.1.5:4222", "[fe80::1]:4222", "mini.local:4222"),
    ca="-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
    seed=SEED,
)


def test_what_is_written_is_read_and_nobody_else_may(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    draft = tmp_path / ".writing-worker.toml"
    draft.write_text("of a killed one")
    draft.chmod(0o666)
    write_ticket(file, TICKET)
    assert file.stat().st_mode & 0o777 == 0o600
    assert not draft.exists()
    assert read_ticket(file) == TICKET
    assert SEED not in repr(TICKET) + str(TICKET)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        read_ticket(file)
    assert SEED not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('run = "k3j2"', 'run = "k3j2.>"', "run"),
        ('name = "worker"', 'name = "worker.*"', "name"),
        ("192.168.1.5:4222", "192.168.1.5", "addresses"),
        ("192.168.1.5:4222", "nats://192.168.1.5:4222", "addresses"),
        ("192.168.1.5:4222", "192.168.1.5:70000", "addresses"),
        ("CERTIFICATE", "KEY", "ca"),
        (SEED, SEED.lower(), "seed"),
        ('name = "worker"', 'name = "worker"\nmore = 1', "more"),
        ('name = "worker"', "", "name"),
    ],
)
def test_what_a_run_does_not_write_is_refused_by_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    file = tmp_path / "worker.toml"
    write_ticket(file, TICKET)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"`{key}`") as caught:
        read_ticket(file)
    assert str(file) in str(caught.value)
    assert SEED not in str(caught.value)


@pytest.mark.parametrize("name", ["hub", "server", "", "a.b", "A", "../a", "a b", "a*", "-a", "a" * 33, "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="name for a worker"):
        check_name(name)
