"""Charts as PNG files."""

from __future__ import annotations

import importlib
import os
import struct
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.records.report.folders import make_run
from troupe.cli.report import report
from troupe.errors import InputError, OutputError
from troupe.records.report import images as pictures
from troupe.records.report.picture import read_run


@pytest.fixture
def matplotlib() -> None:
    if os.environ.get("TROUPE_REQUIRE_ORACLES"):
        importlib.import_module("matplotlib")
    pytest.importorskip("matplotlib")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height that a PNG file says it has."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.slow
def test_one_picture_a_chart_and_one_of_the_most_telling(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 50)
    before = set(sys.modules)
    result = CliRunner().invoke(report, [str(tmp_path / "run"), "--png"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run" / "report"
    names = "reward reward_parts spread loss kl learning_rate lengths tokens_per_second step_time exposed peak_memory"
    expected = {f"{name}.png" for name in (*names.split(), "logged_1", "overview")}
    assert {path.name for path in folder.iterdir()} == expected
    assert set(result.output.splitlines()) == {
        str(tmp_path / "run" / "report.html"),
        *(str(folder / name) for name in expected),
    }
    assert size_of(folder / "loss.png") == (1120, 576)
    assert size_of(folder / "overview.png")[0] == 1920
    assert "matplotlib.pyplot" not in set(sys.modules) - before  # which would look for a display


@pytest.mark.usefixtures("matplotlib")
def test_names_are_text_and_no_formulas(tmp_path: Path) -> None:
    make_run(tmp_path, 0, store=False)
    (tmp_path / "metrics.jsonl").write_bytes(
        rb'{"step":1,"$\\nothing{":2.0,"rewards/$_^/mean":1,"rewards/b/mean":null}'
    )
    written = pictures.write_pictures(read_run(tmp_path), tmp_path / "pictures")
    assert [path.name for path in written] == ["reward_parts.png", "logged_1.png"]


@pytest.mark.usefixtures("matplotlib")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="pictures cannot be written"):
        pictures.write_pictures(read_run(tmp_path), tmp_path / "file")


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, 1)
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"in its clone: pip install -e '\.\[report\]'$"):
        pictures.require_matplotlib()
    result = CliRunner().invoke(report, [str(tmp_path), "--png"])
    assert result.exit_code == 2
    assert ".[report]" in result.output
    assert not (tmp_path / "report.html").exists()


def test_smoothing_keeps_gaps() -> None:
    smooth = pictures._smoothed([1.0, None, 3.0, 5.0])
    assert smooth[0] == 1.0
    assert smooth[1] != smooth[1]
    assert smooth[2:] == pytest.approx([2.25, 3.653061], rel=1e-6)  # the average freed of its start, as on the page
