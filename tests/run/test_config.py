from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import troupe
from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import CheckpointConfig
from troupe.dataset import DataConfig
from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.policy import GenerationConfig, ModelConfig
from troupe.records.sinks.base import MetricsConfig
from troupe.rewards import RewardsConfig
from troupe.run.config import RunConfig, check_config, config_table, load_config, write_config

ROOT = Path(troupe.__file__).parent.parent
SHIPPED = sorted(path for part in ("troupe", "examples") for path in (ROOT / part).rglob("*.toml"))


def test_defaults() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.learner.lr, config.learner.epochs, config.learner.batch_size) == (None, 3, 4)
    assert (config.generation.num_generations, config.generation.temperature) == (8, 1.0)
    assert (config.schedule.mode, config.schedule.max_staleness) == ("pinned", 0)


@pytest.mark.parametrize(
    "said", ["rank=16", "use_rslora=false", "dropout=0.0", "target_modules=all-linear", "init=default", "dropout=0.5"]
)
def test_a_key_of_an_adapter_that_is_not_named_is_refused_also_where_it_is_the_default(said: str) -> None:
    key = f"adapter.{said.partition('=')[0]}"
    with pytest.raises(ConfigError, match=f"{key} is given, but adapter.kind names no adapter"):
        load_config(None, [f"adapter.{said}"])
    assert load_config(None, [f"adapter.{said}", "adapter.kind=lora"]).adapter.is_on
    if key != "adapter.dropout":
        with pytest.raises(ConfigError, match=f"{key} is given beside adapter.resume_from"):
            load_config(None, ["adapter.resume_from=a", f"adapter.{said}"])


@pytest.mark.parametrize("settings", [[], ["adapter.kind=dora"], ["adapter.resume_from=a"]])
def test_a_config_that_was_written_out_whole_is_read_back(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, settings)
    write_config(config, tmp_path / "run.toml")
    assert load_config(tmp_path / "run.toml") == config
    assert load_config(None, [config_table(config)]) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_toml_loads(path: Path) -> None:
    config = load_config(path)
    assert check_config(config) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learner.lrr=1", "unknown key learner.lrr; did you mean learner.lr?"),
        ("lerner.lr=1", "unknown key lerner; did you mean learner?"),
        (
            "foo=1",
            "unknown key foo; known keys here: adapter, checkpoint, cluster, curriculum, daemon, data, environment, ",
        ),
        ("learner=3", "learner is 3: expected a table, got int"),
        ("learner.lr={peak=1.0}", "learner.lr: expected float, got a table"),
        ("learner.lr='fast'", "learner.lr is 'fast': expected float, got str"),
        ("learner.lr=-1", "learner.lr is -1: expected float >= 0.0"),
        ("cluster.lease_s=3", "cluster.lease_s is 3, but workers are heard of every 2 s"),
        ("learner.lr=nan", "learner.lr is nan; give a finite number"),
        ("learner.lr=-inf", "learner.lr is -inf; give a finite number"),
        ("rewards.weights=[1, inf]", "rewards.weights[1] is inf; give a finite number"),
        ("rewards.weights=[1, true]", "rewards.weights[1] is True: expected float, got bool"),
        ("rewards.functions=[3]", "rewards.functions[0] is 3: expected str, got int"),
        ("learner.batch_size=0", "learner.batch_size is 0: expected int >= 1"),
        ("learner.epochs=1.5", "learner.epochs is 1.5: expected int, got float"),
        ("learner.epochs=true", "learner.epochs is True: expected int, got bool"),
        ("learner.scale_rewards=all", "learner.scale_rewards is 'all': give one of 'group', 'batch', 'none'"),
        ("learner.advantage=gae", "learner.advantage is 'gae': give one of 'grpo', 'rloo', 'maxrl', 'grpo_passk'"),
        ("learner={advantage='maxrl',scale_rewards='group'}", 'scale_rewards is "group", but advantage = "maxrl" goes'),
        (
            "learner={loss_type='dppo',importance_sampling_level='sequence'}",
            'but loss_type "dppo" has ratios of its own',
        ),
        ("model.dtype=int8", "model.dtype is 'int8': give one of 'float32', 'bfloat16', 'float16'"),
        ("schedule.max_staleness=-1", "schedule.max_staleness is -1: expected int >= 0"),
        ("schedule.on_stale=keep", "schedule.on_stale is 'keep': give one of 'drop', 'requeue', 'correct'"),
        ("schedule.generator=fork", "schedule.generator is 'fork': give one of 'auto', 'thread', 'process'"),
        ("schedule.generator_processes=0", "schedule.generator_processes is 0: expected int >= 1"),
        ("schedule.blas_threads=0", "schedule.blas_threads is 0: expected int >= 1"),
        ("schedule={generator='thread',generator_processes=2}", "generator_processes is 2, but schedule.generator is"),
        ("metrics.sinks=['fax']", "metrics.sinks[0] is 'fax': give one of 'console', 'jsonl', 'trace', 'sqlite'"),
        ("generation.top_p=0", "generation.top_p is 0: expected float > 0.0"),
        ("checkpoint.every=0", "checkpoint.every is 0: expected int >= 1"),
        ("seed=-1", "seed is -1; give a number from 0 to 2^63 - 1"),
        ("seed=9223372036854775808", "seed is 9223372036854775808; give a number"),
        ("memory_limit_gb=0", "memory_limit_gb is 0.0, but must be above 0; leave it out for none"),
        ("generation.temperature=0", "generation.temperature is 0, but greedy completions"),
        ("generation.temperature=9.9e-6", "generation.temperature is 9.9e-06, but greedy completions"),
        ("generation.num_generations=1", "generation.num_generations is 1, but advantages compare"),
        ("rewards.min_scored=9", "rewards.min_scored is 9, but a group has only 8 completions"),
        ("learner.gradient_accumulation_steps=33", "gradient_accumulation_steps is 33, but a batch has 32 rows"),
    ],
)
def test_says_key_value_limit_and_remedy(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert str(caught.value).startswith("the configuration: ")
    assert message in str(caught.value)


def test_old_tokens_are_corrected_only_where_there_is_a_correction() -> None:
    off = {"learner": {"vllm_importance_sampling_correction": False}}
    correct = {"schedule": {"mode": "free", "max_staleness": 2, "on_stale": "correct"}}
    assert load_config(None, [correct]).schedule.on_stale == "correct"
    with pytest.raises(
        ConfigError, match=r"on_stale is 'correct', but .*_correction is off.*turn it on, or take 'drop'"
    ):
        load_config(None, [correct, off])
    for other in ("schedule.mode=pinned", "schedule.on_stale=drop"):
        load_config(None, [correct, off, other])


def test_weights_must_cover_the_functions() -> None:
    functions = {"functions": ["length", "diversity"]}
    with pytest.raises(ConfigError, match=r"rewards\.weights has 1 numbers for 2 functions"):
        load_config(None, [{"rewards": {**functions, "weights": [1.0]}}])
    # a third reward may be given in Python
    assert load_config(None, [{"rewards": {**functions, "weights": [1, 2, 3]}}]).rewards.weights == (1, 2, 3)


@pytest.mark.parametrize("setting", ["", "learner.lr", "=3", ".lr=1", "learner..lr=1", "learner.=1", " =1"])
def test_settings_of_another_form_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
        load_config(None, [setting])


def test_settings_are_toml_or_else_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        None,
        [
            "learner.lr=1e-4",
            " learner.batch_size = 2 ",
            "data.shuffle=false",
            "output = runs/a b",
            'rewards.functions=["length", "format:^a=b$"]',
            "data.chat_template_kwargs.enable_thinking=false",
            "data.chat_template_kwargs={tone='dry'}",
            "learner.lr=1e-3",
        ],
    )
    assert (config.learner.lr, config.learner.batch_size, config.data.shuffle) == (1e-3, 2, False)
    assert config.output == "runs/a b"
    assert config.rewards.functions == ("length", "format:^a=b$")
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "tone": "dry"}
    assert load_config(None, ["output=2026-01-31"]).output == "2026-01-31"
    assert load_config(None, ["output=07:30:00"]).output == "07:30:00"


def test_paths_count_from_who_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "there" / "run.toml"
    file.write_text(
        """
        output = "runs/x"
        [model]
        path = "model"
        [data]
        path = "data.json"
        eval_path = "~/eval.json"
        [rewards]
        functions = ["score.py:kind", "length", "format:a.py:b"]
        """
    )
    config = load_config(file, ["data.path=other.json"])
    assert config.output == "runs/x"
    assert config.model.path == str(tmp_path / "there" / "model")
    assert config.data.path == str(tmp_path / "here" / "other.json")
    assert config.data.eval_path == str(tmp_path / "home" / "eval.json")
    assert config.rewards.functions == (f"{tmp_path / 'there' / 'score.py'}:kind", "length", "format:a.py:b")
    override = load_config(file, [{"rewards": {"functions": ("mine.py:f",)}}])
    assert override.rewards.functions == (f"{tmp_path / 'here' / 'mine.py'}:f",)


def test_a_config_built_in_python_is_checked_and_anchored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(model=ModelConfig(path="m"), rewards=RewardsConfig(functions=("r.py:f",)), seed=3)
    checked = check_config(config)
    assert checked.model.path == str(tmp_path / "m")
    assert checked.rewards.functions == (f"{tmp_path / 'r.py'}:f",)
    assert checked.seed == 3
    wrong: Any = "high"
    with pytest.raises(ConfigError, match=r"learner\.lr is 'high': expected float, got str"):
        check_config(RunConfig(learner=LearnerConfig(lr=wrong)))


def test_overrides_given_as_mappings_are_not_changed() -> None:
    override = {"data": {"path": "x.json", "chat_template_kwargs": {"a": 1}}}
    load_config(None, [override, "data.chat_template_kwargs.a=2"])
    assert override == {"data": {"path": "x.json", "chat_template_kwargs": {"a": 1}}}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such configuration file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="the configuration cannot be read"):
        load_config(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text("[learner\nlr = 1")
    with pytest.raises(ConfigError, match=r"run\.toml: this is not valid TOML: .*line 1"):
        load_config(file)
    file.write_bytes(b'output = "\xff"')
    with pytest.raises(ConfigError, match=r"run\.toml: the configuration cannot be read"):
        load_config(file)
    file.write_text("[learner]\nlr = -1")
    with pytest.raises(ConfigError, match=r"run\.toml: learner\.lr is -1: expected float >= 0\.0"):
        load_config(file)


def test_the_table_has_no_none() -> None:
    table = config_table(RunConfig())
    assert "output" not in table
    assert "path" not in table["model"]
    assert table["learner"]["batch_size"] == 4
    tomllib.loads(msgspec.toml.encode(table).decode())


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
TEMPERATURES = st.floats(min_value=1e-5, max_value=1e9)
ABSOLUTE = TEXT.filter(lambda text: "\0" not in text).map(lambda text: str(Path("/base", text.replace("/", ""))))
SCALARS = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
LISTS = st.lists(SCALARS, max_size=3)
VALUES = SCALARS | LISTS | st.dictionaries(TEXT, SCALARS | LISTS, max_size=3)
CONFIGS = st.builds(
    RunConfig,
    seed=st.integers(0, 2**63 - 1),
    output=st.none() | TEXT,
    model=st.builds(ModelConfig, path=st.none() | ABSOLUTE, dtype=st.sampled_from([None, "float32", "bfloat16"])),
    data=st.builds(
        DataConfig,
        path=st.none() | ABSOLUTE,
        shuffle=st.booleans(),
        max_prompt_tokens=st.none() | st.integers(1, 9),
        chat_template_kwargs=st.dictionaries(TEXT, VALUES, max_size=3),
    ),
    generation=st.builds(
        GenerationConfig,
        temperature=TEMPERATURES,
        top_p=st.floats(0.01, 1.0),
        top_k=st.integers(0, 99),
        num_generations=st.integers(2, 9),
    ),
    rewards=st.builds(RewardsConfig, functions=st.lists(st.just("format:") | st.just("length"), max_size=2).map(tuple)),
    learner=st.builds(
        LearnerConfig,
        lr=st.floats(0.0, 1.0),
        batch_size=st.integers(1, 64),
        max_steps=st.none() | st.integers(1, 10**9),
        epsilon_high=st.none() | st.floats(0.1, 0.5),
    ),
    schedule=st.builds(ScheduleConfig, max_staleness=st.integers(0, 5)),
    checkpoint=st.builds(CheckpointConfig, every=st.integers(1, 9), keep=st.integers(1, 9)),
    metrics=st.builds(
        MetricsConfig, sinks=st.sets(st.sampled_from(["console", "jsonl", "trace", "sqlite"])).map(tuple)
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
def test_what_is_written_reads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "run.toml"
    write_config(config, path)
    assert load_config(path) == config
    assert check_config(config) == config


def test_a_hub_id_stays_one_unless_a_folder_of_that_name_is_there(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "Qwen/Qwen3-0.6B"\n[data]\npath = "my/prompts.json"\n')
    config = load_config(file)
    assert config.model.path == "Qwen/Qwen3-0.6B"
    assert config.data.path == str(tmp_path / "my" / "prompts.json")
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert load_config(file).model.path == str(tmp_path / "Qwen" / "Qwen3-0.6B")


def test_a_logit_bias_is_read_from_toml_and_written_back(tmp_path: Path) -> None:
    config = load_config(None, ["generation.logit_bias={5 = -2.5, 7 = 1}"])
    assert config.generation.logit_bias == {5: -2.5, 7: 1.0}
    write_config(config, tmp_path / "run.toml")
    assert load_config(tmp_path / "run.toml").generation == config.generation
