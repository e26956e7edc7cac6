from __future__ import annotations

import socket
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from troupe.errors import ConfigError
from troupe.records.sinks.base import MetricsConfig, RunInfo, SinkName, check_sinks


def test_all_sinks_are_on_by_default() -> None:
    assert MetricsConfig().sinks == ("console", "jsonl", "trace", "sqlite")


def test_unknown_sinks_are_refused() -> None:
    assert msgspec.convert({"sinks": []}, MetricsConfig).sinks == ()
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'fax'"):
        msgspec.convert({"sinks": ["fax"]}, MetricsConfig)


def test_a_sink_twice_is_refused_for_both_would_write_into_one_file() -> None:
    with pytest.raises(msgspec.ValidationError, match="has jsonl more than once; name each sink once"):
        msgspec.convert({"sinks": ["jsonl", "trace", "jsonl"]}, MetricsConfig)


@pytest.mark.parametrize(
    ("sink", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_package_that_is_missing_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, sink: SinkName, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as refused:
        check_sinks(MetricsConfig(sinks=("jsonl", sink)))
    for part in (f"metrics.sinks has '{sink}'", f"package {package} ", f"pip install -e '.[{sink}]'"):
        assert part in str(refused.value)
    check_sinks(MetricsConfig(sinks=("jsonl",)))


@pytest.mark.parametrize(
    ("logged_in", "mode", "environment", "fine"),
    [
        (False, None, None, False),
        (True, None, None, True),
        (False, "offline", None, True),
        (False, None, "offline", True),
        (False, None, "disabled", True),
        (False, "online", "offline", False),
        (True, "online", "offline", True),
    ],
)
def test_who_is_not_logged_in_is_told_before_training(
    monkeypatch: pytest.MonkeyPatch, logged_in: bool, mode: str | None, environment: str | None, fine: bool
) -> None:
    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return logged_in

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    config = MetricsConfig(sinks=("wandb",), wandb_mode=mode)  # type: ignore[arg-type]
    if fine:
        check_sinks(config)
    else:
        with pytest.raises(ConfigError, match=r'wandb login.*metrics.wandb_mode = "offline"'):
            check_sinks(config)


def test_a_port_that_is_taken_is_named() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics.prometheus_port is {port}.*give another port"):
            check_sinks(MetricsConfig(sinks=("prometheus",), prometheus_port=port))
    check_sinks(MetricsConfig(sinks=("prometheus",), prometheus_port=port))


def test_a_run_below_the_working_directory_is_named_as_one_types_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunInfo(name="a", folder=str(tmp_path / "runs" / "a"), total_steps=1, first_step=0)
    assert run.typed == str(Path("runs", "a"))
    assert msgspec.structs.replace(run, folder="/elsewhere/a").typed == "/elsewhere/a"
