"""What the integration tests share: models, and a working directory as a user has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fakes import write_prompts, write_ragged_model
from tests.support.runs import train


@pytest.fixture(scope="session")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of which completions end early; never written to."""
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run of four steps with a plain function as its reward, and no options named; never written to."""
    return Path(train(ragged_model, tmp_path_factory.mktemp("plain")).folder)


@pytest.fixture
def desk(tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model `m` and prompts `p.json`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(ragged_model)
    write_prompts(tmp_path / "p.json")
    return tmp_path
