"""Hub ids: a cache laid out by hand, a hub that is a stand-in, and what is said where there is neither."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.policy.forward_vectors import SHIPPED
from troupe.errors import ModelError
from troupe.policy.folders import read_model_folder, save_model_folder
from troupe.policy.hub import hub_cache, is_hub_id, resolve_model

TIED = SHIPPED / "qwen3-tiny-tied"
COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty working directory, and no `huggingface_hub`."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def put_model(cache: Path, name: str = "Some/Tiny") -> Path:
    """A cached model as the hub's client leaves it: links from the snapshot to blobs."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(TIED.iterdir())):
        shutil.copyfile(file, model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(model / "blobs" / str(number))
    return snapshot


def install_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))


def never(*arguments: Any, **options: Any) -> str:
    raise AssertionError(f"the network was asked for {arguments}")


def test_a_cached_model_is_found_without_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_model(cache)
    assert resolve_model("Some/Tiny") == snapshot
    install_hub(monkeypatch, never)
    assert resolve_model("Some/Tiny") == snapshot
    assert len(read_model_folder(snapshot)[1]) == 46


def test_what_is_here_or_is_no_id_stays_a_path(cache: Path, tmp_path: Path) -> None:
    put_model(cache)
    shutil.copytree(TIED, Path("Some/Tiny"))
    assert not is_hub_id("Some/Tiny")
    assert resolve_model("Some/Tiny") == Path("Some/Tiny")
    for path in (tmp_path / "gone", "gone", "a/b/c", "../b", "./b", "~/b", "a/..", "a b/c", "a/b\n", ""):
        assert not is_hub_id(path)
        assert resolve_model(path) == Path(path)
    assert is_hub_id("Qwen/Qwen3-0.6B")
    assert is_hub_id(Path("Qwen/Qwen3-0.6B"))


def test_without_a_cache_and_the_extra_both_remedies_are_said(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model("Qwen/Qwen3-0.6B")
    message = str(caught.value)
    assert message.startswith(
        f"Qwen/Qwen3-0.6B: no such folder here, and the model of this name is not in the cache {cache}"
    )
    assert "hf download Qwen/Qwen3-0.6B" in message
    assert "extra `hub`" in message


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_cut_off_fetch_is_no_model(cache: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_model(cache)
    (snapshot / lost).unlink()
    with pytest.raises(ModelError, match=r"incomplete \(.*snapshots"):
        resolve_model("Some/Tiny")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["cache_dir"]))
        shutil.copyfile(TIED / lost, snapshot / lost)
        return str(snapshot)

    install_hub(monkeypatch, download)
    assert resolve_model("Some/Tiny") == snapshot
    assert asked == [("Some/Tiny", "main", cache)]


def test_every_shard_of_the_index_must_be_there(cache: Path) -> None:
    snapshot = put_model(cache)
    config, weights = read_model_folder(TIED)
    save_model_folder(snapshot, config, weights, None, max_shard_bytes=300_000)
    assert resolve_model("Some/Tiny") == snapshot
    index = snapshot / "model.safetensors.index.json"
    (snapshot / sorted(json.loads(index.read_text())["weight_map"].values())[-1]).unlink()
    with pytest.raises(ModelError, match="incomplete"):
        resolve_model("Some/Tiny")
    index.write_text("{")
    with pytest.raises(ModelError, match="incomplete"):
        resolve_model("Some/Tiny")


@pytest.mark.parametrize("commit", ["../../../elsewhere", "", "gone", "\xe9"])
def test_a_reference_that_leads_nowhere_or_out_is_no_model(cache: Path, commit: str) -> None:
    put_model(cache)
    (cache / "models--Some--Tiny" / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(TIED, cache.parent / "elsewhere")
    with pytest.raises(ModelError, match="is not in the cache"):
        resolve_model("Some/Tiny")


def test_a_failed_fetch_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise ConnectionError("no route")

    install_hub(monkeypatch, download)
    with pytest.raises(ModelError, match=r"fetching it failed: ConnectionError: no route; check the name"):
        resolve_model("Some/Tiny")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/b"}, "/c"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/d"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HF_HOME": "~/x"}, "/home/me/x/hub"),
        ({"HF_HOME": "$HOME/x"}, "/home/me/x/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_lies_where_the_variables_say(
    cache: Path, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)
