"""Names of run folders: those that are none are bad input; and files of the demo, which have moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.fakes import same_bits
from troupe import RunConfig, Supervisor, load_config
from troupe.cli.demo import DEMO_CONFIG
from troupe.errors import OutputError
from troupe.policy import load_policy
from troupe.run.folder_names import DEMO, moved_demo_file, run_folder_named


def test_names_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert run_folder_named("runs/ü 'x'\n%n") == tmp_path / "runs" / "ü 'x'\n%n"
    assert run_folder_named("~/run") == Path("/home/me/run")
    assert run_folder_named(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 300, "File name too long"),
        ("~nobody-is-called-so/run", "home directory"),
        ("run-\udcff", "surrogates not allowed"),
        ("run\0", "null byte"),
        ("", "is empty"),
    ],
)
def test_what_no_folder_can_be_called(name: str, problem: str) -> None:
    with pytest.raises(OutputError, match=problem):
        run_folder_named(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="this is a file"):
        run_folder_named(str(tmp_path / "file"))
    assert run_folder_named(str(tmp_path / "file" / "below")) == tmp_path / "file" / "below", "for mkdir to refuse"


pytestmark = pytest.mark.anyio


def test_only_what_is_gone_and_shipped_is_moved(tmp_path: Path) -> None:
    assert DEMO_CONFIG.parent == DEMO
    there = tmp_path / "troupe" / "demo" / "policy"
    assert moved_demo_file(str(there)) == str(DEMO / "policy")
    assert moved_demo_file(f"{there.parent}/other.json") == f"{there.parent}/other.json"
    assert moved_demo_file(str(tmp_path / "demo" / "policy")) == str(tmp_path / "demo" / "policy")
    there.mkdir(parents=True)
    assert moved_demo_file(str(there)) == str(there)


@pytest.mark.slow
async def test_a_run_of_the_demo_before_its_move_resumes_to_the_same_bits(tmp_path: Path) -> None:
    before = tmp_path / "troupe" / "demo"
    shutil.copytree(DEMO, before)

    def config(name: str) -> RunConfig:
        data = {"path": str(before / "arithmetic.json"), "eval_path": str(before / "arithmetic-held-out.json")}
        paths = {"model": {"path": str(before / "policy")}, "data": data}
        settings = {"output": str(tmp_path / name), "learner": {"max_steps": 4, "lr_scheduler": "constant"}}
        return load_config(DEMO_CONFIG, [paths, settings, "metrics.sinks=['jsonl']"])

    async with Supervisor(config("whole")) as whole:
        await whole.wait()
    async with Supervisor(config("parts")) as run:
        async for _ in run.updates():
            run.drain()
            break
    assert run.result.steps < 4
    shutil.rmtree(before)
    stored = load_config(tmp_path / "parts" / "run.toml")
    assert stored.model.path == str(DEMO / "policy")
    async with Supervisor(stored, resume=True) as rest:
        await rest.wait()
    finals = [load_policy(tmp_path / name / "final").weights for name in ("whole", "parts")]
    assert same_bits(*finals)


def test_a_demo_file_that_is_there_stays_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tmp_path / "troupe" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(DEMO / "policy", demo / "policy")
    shutil.copy(DEMO / "arithmetic.json", demo)
    toml = tmp_path / "run.toml"
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in (".", "~"):
        toml.write_text(
            f'[model]\npath = "{home}/troupe/demo/policy"\n[data]\npath = "{home}/troupe/demo/arithmetic.json"\n'
        )
        config = load_config(toml)
        assert config.model.path == str(demo / "policy")
        assert config.data.path == str(demo / "arithmetic.json")
