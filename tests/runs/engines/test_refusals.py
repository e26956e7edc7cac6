"""What a run with external engines is refused for, before anything is sampled, and what it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import tiny_config, weigh_ids
from tests.support.games import acting, write_player
from tests.support.tiny import write_tiny_model
from troupe.errors import ConfigError, DatasetError
from troupe.run.config import load_config, write_config
from troupe.run.memory import peak_bytes
from troupe.run.prepare import Prepared, prepare

MLX = {"url": "http://127.0.0.1:8080", "kind": "mlx-lm"}
VLLM = {"url": "http://10.0.0.2:8000/v1", "kind": "vllm"}
FREE: dict[str, Any] = {"schedule__mode": "free", "schedule__generator": "auto"}


def prepared(model: Path, folder: Path, **settings: Any) -> Prepared:
    return prepare(tiny_config(model, folder, **{**FREE, "schedule__engines": [MLX], **settings}), [weigh_ids])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pinned": ({"schedule__mode": "pinned"}, "schedule.mode is 'pinned'"),
    "thread": ({"schedule__generator": "thread"}, "schedule.generator is 'thread'"),
    "twice": ({"schedule__engines": [MLX, MLX]}, "8080 twice"),
    "url": ({"schedule__engines": [{**MLX, "url": "localhost:8080"}]}, r"engines\[0\].*give http://HOST:PORT"),
    "unknown key": ({"schedule__engines": [{**MLX, "api_key": "s3cret"}]}, "unknown field api_key"),
    "kind": ({"schedule__engines": [{**MLX, "kind": "tgi"}]}, r"engines\[0\].kind"),
    "penalty": ({"generation__repetition_penalty": 1.1}, "generation.repetition_penalty is 1.1"),
    "bias": ({"generation__logit_bias": {"1": -5.0}}, "generation.logit_bias"),
    "temperature": ({"generation__temperature": 0.7}, "at temperature 1 only"),
    "uncorrected": ({"learner__vllm_importance_sampling_correction": False}, "correction is off"),
    "left": ({"schedule__engines": [{**MLX, "weights": "none"}]}, "set on_stale to 'correct'"),
    "not an adapter": ({"schedule__engines": [{**MLX, "weights": "adapter"}]}, "the whole network is trained"),
    "not whole": (
        {"schedule__engines": [{**MLX, "weights": "reload"}], "adapter__kind": "lora"},
        "an adapter is trained",
    ),
    "dora": ({"schedule__engines": [VLLM], "adapter__kind": "dora"}, "vLLM has no DoRA"),
    "no key": ({"schedule__engines": [{**VLLM, "api_key_env": "TROUPE_TEST_NONE"}]}, "TROUPE_TEST_NONE is not set"),
    "no folder": ({"schedule__engines": [{**VLLM, "weights_folder": "/not/there"}]}, "there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_with_engines_is_refused_by_its_key(tmp_path: Path, ragged_model: Path, case: str) -> None:
    settings, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason) as caught:
        prepared(ragged_model, tmp_path, **settings)
    assert "s3cret" not in str(caught.value)


def test_engines_do_not_act(tmp_path: Path) -> None:
    settings = acting(tmp_path) | FREE
    with pytest.raises(ConfigError, match="cannot act in an environment"):
        prepare(tiny_config(write_player(tmp_path), tmp_path, **settings, schedule__engines=[MLX]))


def test_a_prompt_that_no_text_is_read_as_is_refused_where_prompts_go_as_text(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    file = model / "tokenizer.json"
    table = json.loads(file.read_text())
    table["normalizer"] = {"type": "NFC"}
    file.write_text(json.dumps(table))
    prepared(model, tmp_path / "well")
    table["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]}
    file.write_text(json.dumps(table))
    with pytest.raises(DatasetError, match=r"row 0: mlx_lm\.server takes prompts as text"):
        prepared(model, tmp_path / "ill")
    prepared(model, tmp_path / "as ids", schedule__engines=[VLLM])


def test_engines_alone_leave_the_learner_all_there_is(tmp_path: Path, ragged_model: Path) -> None:
    alone = prepared(ragged_model, tmp_path / "alone", schedule__max_staleness=1)
    beside = prepared(ragged_model, tmp_path / "beside", schedule__max_staleness=1, schedule__generator="process")
    assert alone.config.schedule.generator == "auto"
    assert alone.config.schedule.blas_threads is None or (
        beside.config.schedule.blas_threads is not None
        and alone.config.schedule.blas_threads >= beside.config.schedule.blas_threads
    )
    assert peak_bytes(alone.memory.phases) < peak_bytes(beside.memory.phases)


def test_a_stored_config_with_engines_is_read_back_and_paths_count_from_the_file(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUPE_TEST_KEY", "s3cret")
    (tmp_path / "shared").mkdir()
    engine = {**VLLM, "weights_folder": str(tmp_path / "shared"), "api_key_env": "TROUPE_TEST_KEY"}
    run = prepared(
        ragged_model, tmp_path, schedule__engines=[engine, MLX | {"weights_folder": str(tmp_path / "shared")}]
    )
    write_config(run.config, tmp_path / "run.toml")
    assert load_config(tmp_path / "run.toml") == run.config
    assert "s3cret" not in (tmp_path / "run.toml").read_text()
    assert any("in the clear" in notice for notice in run.notices)
    (tmp_path / "mine.toml").write_text(
        '[schedule]\nmode = "free"\n'
        '[[schedule.engines]]\nurl = "http://h:1"\nkind = "vllm"\nweights_folder = "shared"\n'
    )
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "mine.toml").schedule.engines[0].weights_folder == str(tmp_path / "shared")
