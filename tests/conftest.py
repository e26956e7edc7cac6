"""Fixtures that every room's tests share."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import anyio
import hypothesis
import pytest

os.environ["XDG_CONFIG_HOME"] = str(
    Path(tempfile.gettempdir()) / "troupe-tests"
)  # no run goes by what was measured of the machine that tests
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on a card; before MLX: figures to compare with are float32

import troupe  # noqa: F401 - loads OpenBLAS before anything imports MLX
from tests.support.fakes import OPEN_DEVICES
from tests.support.tiny import write_tiny_model

# A machine may do other things meanwhile, and who changed nothing sees what others saw; to search on with other
# examples: `pytest --hypothesis-profile search`.
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The collector of garbage need not look through thousands of tests, neither while they are found nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def anyio_backend() -> str:
    """MLX's device threads are joined to asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3 folder with a byte-level tokenizer; never written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def closed_devices() -> Iterator[None]:
    """The threads that a test took from `fakes.device_thread` end with it."""
    yield
    while OPEN_DEVICES:
        anyio.run(OPEN_DEVICES.pop().close)


@pytest.fixture
def mlx_waits() -> Iterator[None]:
    """MLX begins nothing ahead of the device, so that a peak of memory is that of the work itself."""
    import mlx.core as mx  # after troupe

    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


_SKIPPED: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _SKIPPED.add(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _SKIPPED.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was left out into the file that TROUPE_SKIPPED names, a line each, for `pytest @FILE`."""
    file = os.environ.get("TROUPE_SKIPPED")
    if file and not hasattr(session.config, "workerinput"):
        Path(file).write_text("".join(f"{name}\n" for name in sorted(_SKIPPED)), encoding="utf-8")
