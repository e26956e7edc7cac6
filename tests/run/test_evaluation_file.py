"""The file of an evaluation: every completion once, whatever it was cut by; and never another one's."""

from __future__ import annotations

import json
import os
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import write_ragged_model
from troupe.errors import OutputError
from troupe.policy import GenerationConfig
from troupe.run.evaluate import Evaluation, Questions, answer, ask
from troupe.run.evaluation_file import EvaluationFile, identity_of

pytestmark = pytest.mark.anyio
SAMPLES = 64
"""Of a row, so that two rows are a piece."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_ragged_model(tmp_path / "ragged")


async def asked(folder: Path, **settings: Any) -> Questions:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in "abcde"))
    generation = GenerationConfig(temperature=1.0, max_completion_length=3)
    return await ask(path, **{"generation": generation, "num_samples": SAMPLES, **settings})


async def evaluated(path: Path, model: Path, questions: Questions, *names: str) -> dict[str, Evaluation]:
    """As `troupe eval --jsonl` does; the models have names, and are all the same."""
    identity = identity_of([(str(model), None)] * len(names), questions, None)
    found = {}
    with EvaluationFile(path, names, questions, identity) as file:
        for name in names:
            done = file.done.get(name, ())
            found[name] = await answer(model, questions, done=done, each=partial(file.add, name))
    return found


async def test_wherever_it_is_cut_the_same_file_comes_of_going_on(tmp_path: Path, model: Path) -> None:
    path, questions = tmp_path / "all.jsonl", await asked(tmp_path)
    whole = await evaluated(path, model, questions, "a", "b")
    data = path.read_bytes()
    lines = [json.loads(line) for line in data.splitlines()]
    assert [(line["model"], line["row"], line["sample"]) for line in lines[1:]] == [
        (name, row, sample) for name in "ab" for row in range(5) for sample in range(SAMPLES)
    ]
    assert lines[1]["prompt"] == "a"
    assert lines[1]["columns"] == {"answer": "7"}
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for size in (
        0,
        20,
        ends[0],
        ends[0] + 5,
        ends[2 * SAMPLES] + 1,
        ends[5 * SAMPLES - 1],
        ends[6 * SAMPLES] - 1,
        len(data),
    ):
        path.write_bytes(data[:size])
        assert await evaluated(path, model, questions, "a", "b") == whole
        assert path.read_bytes() == data


async def test_it_is_refused_where_it_is_of_something_else_or_in_use(tmp_path: Path, model: Path) -> None:
    path, questions = tmp_path / "all.jsonl", await asked(tmp_path)
    await evaluated(path, model, questions, "a")
    data = path.read_bytes()
    with pytest.raises(OutputError, match=r"with other seed \(seed 0, not 1\); give another file, or remove it"):
        await evaluated(path, model, await asked(tmp_path, seed=1), "a")
    with pytest.raises(OutputError, match="with other rows, samples"):
        await evaluated(path, model, await asked(tmp_path, limit=2, num_samples=2), "a")
    for end in ("", "# changed\n"):
        (tmp_path / "own.py").write_text(f"def kind(completions, **_):\n    return [1.0] * len(completions)\n{end}")
        scored = await asked(tmp_path, rewards=[f"{tmp_path / 'own.py'}:kind"])
        if not end:
            await evaluated(tmp_path / "own.jsonl", model, scored, "a")
    with pytest.raises(OutputError, match=r"with other rewards \(rewards .*own.py:kind \(sum "):
        await evaluated(tmp_path / "own.jsonl", model, scored, "a")
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(OutputError, match="with other models"):
        await evaluated(path, model, questions, "a")
    assert path.read_bytes() == data
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        await evaluated(foreign, model, questions, "a")
    assert foreign.read_text() == "mine"
    new = tmp_path / "new.jsonl"
    with (
        EvaluationFile(new, ["a"], questions, {}),
        pytest.raises(OutputError, match="another evaluation writes it"),
        EvaluationFile(new, ["a"], questions, {}),
    ):
        pass


async def test_a_disk_without_room_is_told_with_what_to_do_and_is_gone_on_with(tmp_path: Path, model: Path) -> None:
    path, questions = tmp_path / "all.jsonl", await asked(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match=r"File too large; make room, and give the same command again"):
            await evaluated(path, model, questions, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 20_000
    found = await evaluated(path, model, questions, "a")
    assert len(path.read_bytes().splitlines()) == 1 + len(found["a"].completions)


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is no file"), EvaluationFile(pipe, ["a"], await asked(tmp_path), {}):
        pass
