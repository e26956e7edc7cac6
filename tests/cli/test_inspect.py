"""`troupe inspect`: what a person is shown, JSON, exports, contradictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.support.fakes import make_scored
from tests.support.stored import LONG_RESULT, acted, acted_rollout, closed, rows, tool_turn, update
from troupe.cli.blocks import Block, as_renderable, as_text, describe_versions, show_completions
from troupe.cli.main import main
from troupe.messages import CheckpointWritten, GroupClosed, Incident, ToolCall
from troupe.records.layout import STORE
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.completions import Query
from troupe.records.store.read import open_store
from troupe.records.text import shown


def told(step: int, place: int, **changes: Any) -> GroupClosed:
    """Rewards step/10 + place + (0, 0.2, 0.4); `changes` of the prompt."""
    message = closed(step, place, [step / 20 + place / 2 + i / 10 for i in range(3)])
    scored = message.scored
    assert scored is not None
    prompt = msgspec.structs.replace(scored.group.prompt, **changes)
    group = msgspec.structs.replace(scored.group, prompt=prompt)
    return msgspec.structs.replace(message, scored=msgspec.structs.replace(scored, group=group))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sink = SqliteSink(tmp_path / STORE, program="0.9")
    sink.open()
    for step in (1, 2):
        sink.write(told(step, 0, columns={"answer": "7"}))
        sink.write(told(step, 1, prompt=[{"role": "user", "content": "Hi\x1b[31m"}]))
        sink.write(update(step, reward=step / 4))
    sink.write(Incident(actor="scorer", kind="reward_timeout", message="late"))
    sink.write(CheckpointWritten(version=2, folder="checkpoints/step-00000002", bytes=12_345_678, seconds=0.25))
    sink.flush()
    sink.close()
    return tmp_path


def run(folder: Path, *options: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    result = CliRunner(env=env).invoke(main, ["inspect", str(folder), *options])
    assert result.exit_code == code, result.output
    return result.output


def objects(folder: Path, *options: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(folder, *options, "--json").splitlines()]


def rewards(folder: Path, *options: str) -> list[float]:
    return [round(found["reward"], 6) for found in objects(folder, *options)]


def test_the_overview_for_a_person(folder: Path) -> None:
    text = run(folder)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == str(folder)
    assert {"steps 2", "groups 4 trained", "completions 12", "reward 0.25 0.5", "reward_timeout 1 late"} <= set(lines)
    assert "step 2 12.3 MB 0.25 s checkpoints/step-00000002" in lines
    assert any(line.startswith("start 20") and "after step 0" in line and "Troupe 0.9" in line for line in lines)
    assert "Best of step 2: group 3, sample 2, trained in step 2, row 3" in lines
    assert "Worst of step 2: group 2, sample 0, trained in step 2, row 2" in lines
    assert {"reward 1.6", "reward 0.2", "score r 0.8", "answer 7", "advantage 2"} <= set(lines)
    assert r"prompt user: Hi\x1b[31m" in lines
    assert "\x1b" not in text


def test_the_overview_as_json(folder: Path) -> None:
    [overview] = objects(folder)
    assert overview["groups"] == {"trained": 4}
    assert overview["rewards"] == {"reward": [0.25, 0.5]}
    assert (overview["incidents"], overview["newest_incidents"]) == ({"reward_timeout": 1}, {"reward_timeout": "late"})
    assert (overview["best"]["gid"], overview["worst"]["gid"]) == (3, 2)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    lines = [" ".join(line.split()) for line in run(tmp_path).splitlines()]
    assert {"steps 0", "groups none", "completions 0"} <= set(lines)
    assert run(tmp_path, "--best", "3") == "there is no such completion\n\n"
    sink.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--best", "2"], [1.6, 1.4]),
        (["--worst", "3"], [0.2, 0.4, 0.6]),
        (["--step", "1", "--best", "1"], [1.5]),
        (["--step", "all", "--best", "2"], [1.6, 1.5]),
        (["--step", "last"], [0.2, 0.4, 0.6, 1.2, 1.4, 1.6]),
        (["--min-reward", "1.3"], [1.4, 1.6]),
        (["--max-reward", "0.3", "--step", "all"], [0.1, 0.2]),
        (["--reward", "r", "--min-reward", "0.75"], [1.6]),
        (["--gid", "0"], [0.1, 0.3, 0.5]),
        (["--gid", "0", "--worst", "1"], [0.1]),
        (["--state", "trained", "--best", "1"], [1.6]),
        (["--state", "filtered"], []),
        (["--steps", "1:1", "--best", "2"], [1.5, 1.3]),
        (["--steps", ":1", "--worst", "1"], [0.1]),
        (["--steps", "2:", "--worst", "1"], [0.2]),
        (["--row", "3"], [1.2, 1.4, 1.6]),
        (["--prompt", "user: hi", "--finish-reason", "stop", "--step", "1"], [1.1, 1.3, 1.5]),
        (["--text", "no such text"], []),
    ],
)
def test_what_is_chosen(folder: Path, options: list[str], expected: list[float]) -> None:
    assert rewards(folder, *options) == expected


def test_random_completions_are_of_the_newest_step(folder: Path) -> None:
    found = objects(folder, "--random", "4")
    assert len({(one["gid"], one["sample"]) for one in found}) == 4
    assert {one["step"] for one in found} == {2}


def test_a_listing_for_a_person_ends_somewhere(folder: Path) -> None:
    with open_store(folder) as stored:
        text = "".join(map(as_text, show_completions(stored, Query(step=2), most=4)))
    assert text.count(", sample ") == 4
    assert "2 more: ask for fewer, or for a number (--best K), or write them out (--export FILE)" in text
    assert run(folder, "--best", "6").count(", sample ") == 6


def test_exports_have_everything(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert run(folder, "--jsonl", str(path)) == f"12 completions written to {path}\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["gid"], line["sample"]) for line in lines] == [
        (step, 2 * step - 2 + place, sample) for step in (1, 2) for place in (0, 1) for sample in range(3)
    ]
    rollout = make_scored(1, 1).group.rollouts[2]
    assert lines[-1]["token_ids"] == list(rollout.token_ids)
    assert lines[-1]["scores"] == {"r": pytest.approx(0.8)}
    assert lines[0]["columns"] == {"answer": "7"}
    assert lines[-1]["prompt"] == [{"role": "user", "content": "Hi\x1b[31m"}]
    run(folder, "--step", "1", "--best", "2", "--jsonl", str(path))
    assert [line["gid"] for line in map(json.loads, path.read_text().splitlines())] == [1, 1]


def test_contradictions_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "--best and --worst: give one of them" in run(folder, "--best", "1", "--worst", "1", code=2)
    assert "--step first: give the number of a step" in run(folder, "--step", "first", code=2)
    assert "--reward x: the run has no such reward; it has r" in run(folder, "--reward", "x", code=2)
    assert "no such run folder" in run(tmp_path / "none", code=2)
    assert "cannot be written" in run(folder, "--jsonl", str(tmp_path / "none" / "file"), code=2)
    assert "nan is no finite number" in run(folder, "--min-reward", "nan", code=2)


def test_groups_whose_samples_nobody_knows_of_and_missing_scores(folder: Path) -> None:
    rows(folder / STORE, "SELECT 1")
    sink = SqliteSink(folder / STORE, first_step=2)
    sink.open()
    sink.write(closed(3, 0, (None, None, None), state="quarantined"))
    sink.write(update(3))
    sink.flush()
    sink.close()
    text = run(folder, "--step", "3")
    assert " ".join(text.split()).count("reward – advantage – score r – ") == 3
    assert "Best of" not in run(folder)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(folder: Path, tmp_path: Path) -> None:
    assert "--step 999: the run has the steps 1 to 2; give one of them, or 'last', or 'all'" in run(
        folder, "--step", "999", code=2
    )
    assert "the run has the steps 1 to 2" in run(folder, "--step", "0", "--json", code=2)
    assert "the run has the steps 1 to 2" in run(folder, "--step", "3", "--jsonl", str(tmp_path / "out.jsonl"), code=2)
    assert not (tmp_path / "out.jsonl").exists()
    new = tmp_path / "new"
    new.mkdir()
    sink = SqliteSink(new / STORE)
    sink.open()
    assert "--step 1: no step is stored yet" in run(new, "--step", "1", code=2)
    sink.write(update(1))
    sink.flush()
    assert "the run has step 1 only" in run(new, "--step", "2", code=2)
    sink.close()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "so . is not the folder of a run" in run(Path("."), code=2)  # noqa: PTH201 - as one types it
    (tmp_path / "run.toml").touch()
    assert "there is no run store" in run(Path("."), code=2)  # noqa: PTH201


ODD = "j\x1b[2J\x07\x9b\u202e"


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A run in which everything that has a name is called something that acts on a terminal."""
    folder = tmp_path / "run\x1b[31m"
    folder.mkdir()
    sink = SqliteSink(folder / STORE, program=f"0.9{ODD}")
    sink.open()
    group = told(1, 0, columns={ODD: ODD}, prompt=[{"role": ODD, "content": ODD}])
    assert group.scored is not None
    rollouts = tuple(msgspec.structs.replace(one, text=ODD) for one in group.scored.group.rollouts)
    scored = msgspec.structs.replace(
        group.scored,
        group=msgspec.structs.replace(group.scored.group, rollouts=rollouts),
        scores={ODD: (0.5, 1.0, None)},
        extra={ODD: (ODD, ODD, ODD)},
    )
    sink.write(msgspec.structs.replace(group, scored=scored))
    sink.write(update(1, **{f"rewards/{ODD}/mean": 0.5}))
    sink.write(Incident(actor=ODD, kind=ODD, message=ODD))
    sink.write(CheckpointWritten(version=1, folder=ODD, bytes=1, seconds=0.25))
    sink.flush()
    sink.close()
    return folder


TERMINAL = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "300"}


@pytest.mark.parametrize("environment", [{}, TERMINAL], ids=["file", "terminal"])
@pytest.mark.parametrize("options", [(), ("--step", "1"), ("--step", "all", "--best", "1"), ("--json",)])
def test_no_name_acts_on_a_terminal(odd_folder: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
    text = run(odd_folder, *options, env=environment)
    assert text.strip()
    assert not {char for char in text if not char.isprintable()} - {"\n"} - ({"\x1b"} if environment else set())
    assert not any(piece in text for piece in ("\x1b[2J", "\x1b[31m", "\x07", "\x9b", "\u202e"))


def test_refusals_hold_nothing_that_acts(odd_folder: Path) -> None:
    said = run(odd_folder, "--reward", "x\x1b[2J", code=2)
    assert "the run has no such reward; it has j\\x1b[2J\\x07" in said
    assert "\x1b" not in said
    assert "\x1b" not in run(odd_folder / "none\x1b", code=2)


def test_several_versions_are_told() -> None:
    assert describe_versions([(3, 5), (4, 2)]) == "versions 3 (5), 4 (2)"


def test_what_would_act_on_a_terminal_is_shown_instead() -> None:
    assert (
        shown("a\tb\nc\x1b[2J\x07\x9b\u202ed\ud800 é 漢 👩\u200d🚀")
        == "a   b\nc\\x1b[2J\\x07\\x9b\\u202ed\\ud800 é 漢 👩\u200d🚀"
    )


def test_a_terminal_is_given_tables(folder: Path) -> None:
    drawn = click.unstyle(run(folder, env=TERMINAL) + run(folder, "--state", "filtered", env=TERMINAL))
    assert "Best of step 2: group 3, sample 2" in drawn
    assert "╭" in drawn
    assert "there is no such completion" in drawn


def test_markup_is_text() -> None:
    block = Block(title="[red]title", rows=[("[bold]a", "b", "c"), ("d",)], text="[/]text")
    console = Console(width=60, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(as_renderable(block))
    assert all(word in capture.get() for word in ("[red]title", "[bold]a", "[/]text"))
    assert as_text(block) == "[red]title\n  [bold]a  b  c\n  d\n  completion:\n[/]text\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--step", "9" * 19),
        ("--step", "9" * 5000),
        ("--gid", str(2**63)),
        ("--best", str(2**63)),
        ("--worst", "9" * 30),
        ("--random", "9" * 30),
    ],
    ids=lambda options: options[0] + str(len(options[1])),
)
def test_numbers_that_no_store_has(folder: Path, options: tuple[str, str]) -> None:
    assert options[0] in run(folder, *options, code=2)


@pytest.mark.parametrize("name", [STORE, f"{STORE}-wal", "metrics.jsonl", "link"])
def test_an_export_does_not_overwrite_the_run(folder: Path, name: str) -> None:
    (folder / "link").symlink_to(STORE)
    if name != "link":
        (folder / name).touch()
    before = (folder / STORE).read_bytes()
    assert "is a file of the run" in run(folder, "--jsonl", str(folder / name), code=2)
    assert (folder / STORE).read_bytes() == before
    for _ in range(2):
        run(folder, "--jsonl", str(folder / "new.jsonl"))


def test_a_folder_that_cannot_be_read(folder: Path) -> None:
    assert "cannot be read" in run(folder / ("a" * 300), code=2)


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    sink = SqliteSink(tmp_path / STORE, program="0.9")
    sink.open()
    for message in (acted(1, 0), update(1, reward=0.5)):
        sink.write(message)
    sink.flush()
    sink.close()
    return tmp_path


def test_a_conversation_is_told_turn_by_turn(episodes: Path) -> None:
    text = run(episodes, "--best", "1")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"observed 25 of the tokens", "turns 6, waited 1.67 s", "environment library", "its reward 1"} <= set(lines)
    assert {"conversation:", "── system", "── turn 1 · 11 tokens · 5 read · 1.45 s"} <= set(lines)
    assert '→ add {"a":1027,"b":-980} (0.2 ms)' in lines
    assert "✗ failed: KeyError: 'bk-1072'" in lines
    assert "── turn 6 · 16 tokens · reward 1" in lines
    assert f"… {len(LONG_RESULT) - 1000:,} more characters" in text
    assert text.count("Ibn Sina") < 20
    assert run(episodes, "--best", "1", "--full").count("Ibn Sina") == 256
    assert "failed TimeoutError: no answer within 60 s" in " ".join(run(episodes, "--gid", "0").split())


def test_exports_carry_messages(episodes: Path, tmp_path: Path) -> None:
    [best] = objects(episodes, "--best", "1")
    run(episodes, "--best", "1", "--jsonl", str(tmp_path / "out.jsonl"))
    assert json.loads((tmp_path / "out.jsonl").read_text()) == best
    answer = best["episode"]["turns"][0]["answer"]
    assert answer["messages"] == [{"role": "tool", "name": "search", "content": LONG_RESULT}]
    assert answer["said"]["tool_calls"][0]["function"]["arguments"] == {"query": "ابن سينا", "limit": 256}
    assert best["episode"]["observed"][0] == [11, 16]


def test_what_acts_on_a_terminal_is_escaped_in_conversations(tmp_path: Path) -> None:
    group = acted(1, 0)
    assert group.scored is not None
    odd = tool_turn("\x1b[2Jno\u202e", ToolCall(name="a\x1b", arguments={}, result="\x07"), seconds=0.1)
    rollout, episode = acted_rollout([odd])
    told = msgspec.structs.replace(group.scored.group, rollouts=(rollout,), episodes=(episode,))
    scored = msgspec.structs.replace(group.scored, group=told)
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    for message in (msgspec.structs.replace(group, scored=scored), update(1)):
        sink.write(message)
    sink.flush()
    sink.close()
    text = run(tmp_path, "--gid", "0")
    assert r"\x1b[2Jno\u202e" in text
    assert r"→ a\x1b {}" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_folded_lines_of_a_conversation_are_no_speakers(episodes: Path) -> None:
    console = Console(width=60, record=True, force_terminal=True)
    with open_store(episodes) as stored, console.capture() as capture:
        for block in show_completions(stored, Query(choice="best", count=1)):
            console.print(as_renderable(block))
    lines = [
        line.strip("│ ") if line[2:4] != "  " else "" for line in capture.get().split("\n") if line.startswith("│")
    ]
    assert {line.replace("\x1b[1m", "")[:2] for line in lines if line} == {"──"}


def test_an_export_is_a_dataset(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sft.jsonl"
    assert run(folder, "--export", str(file), "--min-reward", "1.5") == f"2 completions written to {file}\n"
    talk, _ = map(json.loads, file.read_text().splitlines())
    assert (talk["reward"], talk["step"], talk["row"], talk["sample"]) == (1.5, 1, 1, 2)
    assert talk["prompt"] == [{"role": "user", "content": "Hi\x1b[31m"}]
    assert [one["role"] for one in talk["completion"]] == ["assistant"]
    assert (talk["scores"], talk["columns"], talk["tokens"]) == ({"r": 0.75}, {}, 3)
    run(folder, "--export", str(file), "--gid", "0")
    plain = json.loads(file.read_text().splitlines()[0])
    assert isinstance(plain["prompt"], str)
    assert isinstance(plain["completion"], str)
    assert plain["columns"] == {"answer": "7"}


@pytest.mark.parametrize(
    ("which", "gid", "is_talk"), [("folder", 1, True), ("folder", 0, False), ("episodes", 0, True)]
)
def test_an_export_to_parquet_holds_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, which: str, gid: int, is_talk: bool
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [tmp_path / name for name in ("a.jsonl", "a.parquet")]
    for file in files:
        run(request.getfixturevalue(which), "--export", str(file), "--gid", str(gid))
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    rows = parquet.read_table(files[1]).to_pylist()
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        assert all(row[name] == line[name] for name in ("reward", "step", "sample", "finish_reason", "tokens"))
        assert json.loads(row["columns"]) == line["columns"]
        said = [one.get("content") or "" for one in line["completion"]] if is_talk else line["completion"]
        assert ([one["content"] for one in row["completion"]] if is_talk else row["completion"]) == said


def test_parquet_without_its_package_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    said = run(folder, "--export", str(tmp_path / "a.parquet"), code=2)
    assert "writing Parquet needs the package pyarrow" in said
    assert "or give a name that ends in .jsonl" in said
    assert not (tmp_path / "a.parquet").exists()
