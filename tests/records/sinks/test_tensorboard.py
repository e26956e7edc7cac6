"""Event files, read back record by record with tensorboardX's own messages."""

from __future__ import annotations

import errno
import math
import struct
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from tests.records.sinks.oracles import package
from tests.records.sinks.steps import closed, evaluated, feed, update
from troupe.messages import Incident
from troupe.records.sinks.base import DurableSink, RunInfo
from troupe.records.sinks.jsonl import AppendedFile
from troupe.records.sinks.tensorboard import TensorBoardSink

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def tensorboard_x() -> Any:
    return package("tensorboardX")


def made(folder: Path, first_step: int = 0, at_s: float = 1000.0, **settings: Any) -> TensorBoardSink:
    run = RunInfo(
        name="run", folder=str(folder), total_steps=9, first_step=first_step, config={"learner": {"lr": 1e-6}}
    )
    return TensorBoardSink(folder, run, clock=lambda: at_s, **settings)


def events_in(path: Path) -> list[Any]:
    Event = package("tensorboardX.proto.event_pb2").Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return events


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value, as TensorBoard shows them: a start mark takes back later steps of files before."""
    shown: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir()):
        for event in events_in(path):
            if event.HasField("session_log"):
                for points in shown.values():
                    for step in [step for step in points if step >= event.step]:
                        del points[step]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    assert event.step not in shown.setdefault(value.tag, {})
                    shown[value.tag][event.step] = value.simple_value
    return shown


def test_scalars_histograms_and_texts_of_a_step(tmp_path: Path) -> None:
    texts = ("46", "</script>\n**not bold**")
    feed(made(tmp_path), closed(1, texts=texts), update(1, {"loss": 0.5, "rewards/a b/mean": math.nan}), update(2))
    [path] = tmp_path.iterdir()
    assert path.name == "events.out.tfevents.0000001000.troupe"
    version, start, config, step, _ = events_in(path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (1, 1)
    assert "    lr = 1e-06" in config.summary.value[0].tensor.string_val[0].decode()
    values = {value.tag: value for value in step.summary.value}
    assert (step.step, step.wall_time) == (1, 1000.0)
    assert values["loss"].simple_value == 0.5
    assert math.isnan(values["rewards/a_b/mean"].simple_value)
    histogram = values["rewards"].histo
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0.5, 1.0, 2, 1.5)
    assert sum(histogram.bucket) == 2
    lengths = values["completions/lengths"].histo
    assert (lengths.min, lengths.max, lengths.sum_squares) == (1.0, 2.0, 5.0)
    text = values["completions/text_summary"].tensor.string_val[0].decode()
    assert "**reward 1, 1 tokens**" in text
    assert "\n    </script>\n    **not bold**" in text


def test_checksums_are_those_of_the_format(tmp_path: Path) -> None:
    masked_crc32c = package("tensorboardX.record_writer").masked_crc32c

    feed(made(tmp_path), update(1, loss=0.5))
    data = next(tmp_path.iterdir()).read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(data[12 : 12 + length])
        data = data[16 + length :]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    feed(made(tmp_path), *(update(step, loss=float(step)) for step in range(1, 8)))
    feed(made(tmp_path, 5), *(update(step, loss=step + 0.5) for step in range(5, 8)))  # within the same second
    feed(made(tmp_path, 7, at_s=3.0), update(8, loss=8.25))  # and with a clock that was set back
    assert curves(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.5, 7: 7.5, 8: 8.25}}
    feed(made(tmp_path, 0), update(1, loss=0.0))  # killed before its first checkpoint: all is made again
    assert curves(tmp_path) == {"loss": {1: 0.0}}


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path) -> None:
    class FullDisk(FileIO):
        full = False

        def write(self, data: Any, /) -> int:
            if FullDisk.full:
                super().write(bytes(data)[:20])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    sink = made(tmp_path, make_file=partial(AppendedFile, kind=FullDisk))
    assert isinstance(sink, DurableSink)
    sink.open()
    sink.write(update(1, loss=1.0))
    sink.flush()
    sink.settle()
    FullDisk.full = True
    for step in (2, 3):
        sink.write(update(step, loss=float(step)))
        with pytest.raises(OSError, match="No space"):
            sink.flush()
    FullDisk.full = False
    sink.flush()
    sink.close()
    assert curves(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 3.0}}


def test_a_folder_that_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "file" / "tensorboard"
    folder.parent.write_text("in the way")
    sink = made(folder)
    with pytest.raises(OSError, match=r"exists|directory"):
        sink.open()
    sink.write(update(1, loss=1.0))
    folder.parent.unlink()
    sink.flush()
    sink.close()
    assert curves(folder) == {"loss": {1: 1.0}}


def test_what_it_does_not_care_for_changes_nothing(tmp_path: Path) -> None:
    sink = made(tmp_path, completions=0)
    sink.flush()
    sink.settle()
    sink.close()
    assert list(tmp_path.iterdir()) == []
    feed(sink, Incident(actor="scorer", kind="odd", message="late"), closed(1), update(1), update(1))
    sink.write(update(2))
    sink.flush()
    steps = [event.step for event in events_in(next(tmp_path.iterdir())) if event.summary.value]
    assert steps == [0, 1]
    tags = {value.tag for event in events_in(next(tmp_path.iterdir())) for value in event.summary.value}
    assert "completions/text_summary" not in tags


def test_evaluations_are_points_at_their_version(tmp_path: Path) -> None:
    feed(made(tmp_path), evaluated(0, 0.25), update(1, loss=1.0), update(2, loss=1.0), evaluated(1, 0.75))
    feed(made(tmp_path, 1, at_s=2000.0), evaluated(2, 1.0))
    assert curves(tmp_path)["eval/held_out/avg_1"] == {0: 0.25, 1: 0.75, 2: 1.0}
