"""What a machine gives: the file of figures, the table, and the course that makes them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.support.fakes import tiny_config, weigh_ids
from tests.support.tiny import CONFIG
from troupe.cli.doctor import tell_measured
from troupe.errors import InputError
from troupe.run.measure.course import ROWS, Course
from troupe.run.measure.figures import (
    Figures,
    Measurement,
    Overlap,
    Place,
    check_writable,
    machine_file,
    overlaps_better,
    read_measurement,
    write_measurement,
)
from troupe.run.measure.table import describe
from troupe.run.measure.work import LARGE, SMALL, Size, size_for
from troupe.run.placement import Machine
from troupe.run.prepare import prepare
from troupe.runtime.machine import arithmetic, memory_gb, processors
from troupe.runtime.terminal import EXIT_INTERRUPTED

TINY = Size(
    name="tiny",
    policy=CONFIG,
    dtype="float32",
    prompt_tokens=8,
    new_tokens=4,
    learn_tokens=16,
    overlap_tokens=16,
    copy_bytes=2**12,
)
FIGURES = Figures(
    model=SMALL.name,
    parameters=SMALL.parameters,
    dtype="float32",
    prompt_tokens=128,
    new_tokens=32,
    decode={1: 70.25, 64: 1400.0},
    overlap=Overlap(threads=0.9),
    same_decode=True,
    same_learner=False,
    lacking=("the learner: it would take longer",),
)


def measured(**changes: object) -> Measurement:
    machine = Measurement(
        troupe="0.1.0",
        made="2026-01-02T03:04:05+00:00",
        seconds=100.0,
        chip="a chip",
        backend="cpu",
        system="Linux",
        mlx="0.32.4",
        processors=processors(),
        memory_gb=memory_gb(),
        limit_gb=None,
        wired="nothing",
        largest={"LoRA": "Qwen3-4B", "QLoRA": None},
        figures=FIGURES,
        environment=arithmetic(),
    )
    return msgspec.structs.replace(machine, **changes)


def test_the_file_lies_in_the_users_folder_and_counts_for_this_machine_and_this_mlx_alone(tmp_path: Path) -> None:
    path = machine_file({"XDG_CONFIG_HOME": str(tmp_path)})
    assert path == tmp_path / "troupe" / "machine.json"
    assert machine_file({"XDG_CONFIG_HOME": "relative"}) == Path.home() / ".config" / "troupe" / "machine.json"
    assert read_measurement(path) is None
    check_writable(path)
    write_measurement(path, measured())
    read = read_measurement(path)
    assert read == measured()
    assert read.is_of_this_machine
    assert not measured(environment=arithmetic() | {"mlx": "0.1"}).is_of_this_machine
    assert not measured(processors=processors() + 1).is_of_this_machine
    path.write_bytes(path.read_bytes()[:100])  # half a file
    assert read_measurement(path) is None
    path.write_text(json.dumps({"format": 2}))
    assert read_measurement(path) is None


def test_where_no_file_can_be_written_nothing_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "machine.json"):
        with pytest.raises(InputError, match="name a"):
            tell_measured(path, as_json=True, size=TINY)


def test_one_way_overlaps_better_only_where_both_were_measured_and_it_does_clearly() -> None:
    assert Overlap(threads=1.0, processes=1.5).better == "process"
    assert Overlap(threads=1.5, processes=1.0).better == "thread"
    assert Overlap(threads=1.0, processes=1.05).better is None
    assert Overlap(threads=1.0).better is None


def test_the_measured_place_is_taken_where_it_is_left_open_and_told(tiny_model: Path, tmp_path: Path) -> None:
    def placed(better: Place | None, **settings: Any) -> tuple[str, int]:
        machine = Machine(on_cpu=True, cores=4, better=better)
        config = tiny_config(tiny_model, tmp_path, **{"schedule__generator": "auto"} | settings)
        found = prepare(config, [weigh_ids], machine=machine)
        return found.config.schedule.generator, sum("as measured" in line for line in found.notices)

    late = {"schedule__max_staleness": 1}
    assert placed(None, **late) == ("process", 0)
    assert placed("process", **late) == ("process", 0)
    assert placed("thread", **late) == ("thread", 1)
    assert placed("thread", schedule__max_staleness=0, schedule__generator_processes=1) == ("thread", 0)
    assert placed("thread", **late, memory_limit_gb=4.0) == ("process", 0)
    assert placed("thread", **late | {"schedule__generator": "process"}) == ("process", 0)


def test_a_file_says_what_overlaps_better_on_the_machine_that_it_is_of_alone(tmp_path: Path) -> None:
    better = msgspec.structs.replace(FIGURES, overlap=Overlap(threads=1.0, processes=1.5))
    path = tmp_path / "machine.json"
    assert overlaps_better(path) is None
    write_measurement(path, measured(figures=better))
    assert overlaps_better(path) == "process"
    write_measurement(path, measured(figures=better, processors=processors() + 1))
    assert overlaps_better(path) is None


def test_the_table_has_machines_of_the_same_model_beside_and_says_what_is_missing() -> None:
    lines = describe(measured()).splitlines()
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["decode, 1 row, tokens/s"] == ["70", "69"]
    assert rows["decode, 64 rows, tokens/s"] == ["1,400", "1,316"]
    assert rows["learn, 8 × 512, tokens/s"] == ["–", "–"]
    assert rows["overlap, two threads"][0] == "0.90"
    assert (rows["same bits twice, decoding"], rows["same bits twice, learning"]) == (["yes"], ["no"])
    assert rows["largest that fits, QLoRA"] == ["none"]
    assert lines[-1] == "not measured: the learner: it would take longer"
    assert describe(measured(backend="metal")).endswith("it will stand here")


def test_a_card_with_room_is_measured_with_the_larger_policy() -> None:
    assert [size_for(limit) for limit in (None, 8.0, 64.0)] == [SMALL, SMALL, LARGE]


def test_what_time_does_not_allow_is_left_out_and_said() -> None:
    ticks = count(0.0, 10.0)  # seconds: everything seems to take very long
    figures = anyio.run(Course(TINY, longest_s=60.0, clock=lambda: next(ticks)).run)
    assert set(figures.decode) < set(ROWS)
    assert figures.learner is None
    assert figures.overlap == Overlap()
    assert any(line.startswith("the learner: it would take longer") for line in figures.lacking)


@pytest.mark.slow
def test_a_machine_is_measured_whole_and_the_file_says_what_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    tell_measured(path, as_json=True, size=TINY, longest_s=20.0)
    printed = capfd.readouterr()
    said = msgspec.json.decode(printed.out.encode(), type=Measurement)
    assert said == read_measurement(path)
    assert said.is_of_this_machine
    figures = said.figures
    assert figures.lacking == ()
    assert set(figures.decode) == set(ROWS)
    assert (figures.same_decode, figures.same_learner) == (True, True)
    assert None not in (figures.learner, figures.copy_gb_per_s, figures.overlap.threads, figures.overlap.processes)
    assert "measuring overlap of two processes" in printed.err
    assert [each.name for each in tmp_path.iterdir()] == ["here.json"]


@pytest.mark.slow
def test_who_interrupts_it_finds_no_file(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "troupe", "doctor", "--measure", str(tmp_path / "here.json")]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("measuring decoding"):
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(30.0) == EXIT_INTERRUPTED
    assert list(tmp_path.iterdir()) == []
