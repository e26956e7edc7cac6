"""What the command line of the daemon means."""

from __future__ import annotations

from pathlib import Path

import pytest

from troupe.daemon.orders import Order
from troupe.errors import ConfigError, OutputError
from troupe.run.daemon_settings import DaemonConfig


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_are_absolute_and_settings_lie_over_the_file(workplace: Path) -> None:
    Path("RUN.toml").write_text('seed = 1\noutput = "in-file"\n[learner]\nlr = 1e-6\n')
    order = Order.given(Path("RUN.toml"), "out", ["learner.lr=0.5", "daemon.restarts=2"], ["learner.lr"])
    assert (order.run_toml, order.output) == (workplace / "RUN.toml", workplace / "out")
    assert order.table == {
        "seed": 1,
        "output": "in-file",
        "learner": {"lr": 0.5},
        "daemon": {"restarts": 2},
    }
    assert order.daemon == DaemonConfig(restarts=2)
    assert (order.settings, order.allow_changes) == (("learner.lr=0.5", "daemon.restarts=2"), ("learner.lr",))


@pytest.mark.parametrize(
    ("text", "settings", "output"),
    [('output = "a"\n', (), "a"), ("", ("output=b",), "b"), ('output = "a"\n', ("output=b",), "b")],
)
def test_the_folder_may_be_named_in_the_config(
    workplace: Path, text: str, settings: tuple[str, ...], output: str
) -> None:
    Path("RUN.toml").write_text(text)
    assert Order.given(Path("RUN.toml"), None, settings).output == workplace / output


def test_a_run_folder_is_the_run_that_stands_there(workplace: Path) -> None:
    (workplace / "runs" / "a").mkdir(parents=True)
    (workplace / "runs" / "a" / "run.toml").write_text('seed = 1\noutput = "elsewhere"\n')
    order = Order.given(Path("runs/a"), None, ["learner.lr=0.5"])
    assert (order.run_toml, order.output) == (workplace / "runs" / "a" / "run.toml", workplace / "runs" / "a")
    assert order.table["seed"] == 1
    assert Order.given(Path("runs/a"), "copy").output == workplace / "copy"
    with pytest.raises(ConfigError, match=r"runs: the configuration cannot be read: .*directory"):
        Order.given(Path("runs"), None)


@pytest.mark.parametrize("text", ["", "output = 3\n"])
def test_without_a_folder_there_is_no_daemon(text: str) -> None:
    Path("RUN.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"RUN.toml: a daemon has to know its run folder.*-o OUT_DIR"):
        Order.given(Path("RUN.toml"), None)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        Order.given(Path("RUN.toml"), "out")
    Path("RUN.toml").write_text("[learner")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Order.given(Path("RUN.toml"), "out")
    Path("RUN.toml").write_text("")
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        Order.given(Path("RUN.toml"), "out", ["learner.lr"])
    with pytest.raises(OutputError, match="this is a file"):
        Order.given(Path("RUN.toml"), "RUN.toml")


@pytest.mark.parametrize("section", ["3", '"x"', "{restarts = -1}", "{restart = 1}"])
def test_a_section_that_the_trainer_will_refuse_counts_as_none(section: str) -> None:
    Path("RUN.toml").write_text(f"daemon = {section}\n")
    assert Order.given(Path("RUN.toml"), "out").daemon == DaemonConfig()
