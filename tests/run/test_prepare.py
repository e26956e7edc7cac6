"""What is refused before anything is sampled or written, each with one message; and what is resolved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from click.testing import CliRunner

from tests.support.fakes import same_bits, tiny_config, weigh_ids, write_prompts
from troupe import RunConfig
from troupe.checkpoint import Checkpoint, RunState, checkpoint_folder, save_checkpoint
from troupe.cli.main import main
from troupe.errors import CheckpointError, ConfigError
from troupe.grpo import LearnerConfig, adamw_init
from troupe.messages import Slot
from troupe.policy import ModelConfig, load_policy
from troupe.run.config import write_config
from troupe.run.memory import peak_bytes
from troupe.run.placement import Machine
from troupe.run.prepare import prepare
from troupe.runtime.device import arrays_in
from troupe.runtime.memory import GB


class Workplace:
    """A working directory with a model `m` and data `p.json`, in which `troupe train` is called."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        shutil.copytree(model, folder / "m")
        write_prompts(folder / "p.json")

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text, encoding="utf-8")

    def train(self, *arguments: str) -> tuple[int, str]:
        """Exit code and message of a call that must leave the directory as it was."""
        before = sorted(self.folder.rglob("*"))
        result = CliRunner().invoke(main, ["train", *arguments])
        assert sorted(self.folder.rglob("*")) == before, "something was left behind"
        return result.exit_code, result.stderr

    def refuses(self, message: str, *arguments: str) -> None:
        code, text = self.train(*arguments)
        assert code == 2, text
        assert message in text


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, tiny_model)


BASE = ("-m", "m", "-d", "p.json")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[learner]\nlearning_rate = 1.0", r"run.toml: unknown key learner.learning_rate"),
        ("speed = 3", "run.toml: unknown key speed"),
        ('[learner]\nlr = "fast"', "learner.lr is 'fast'"),
        ("[generation]\ntemperature = 0.0", "generation.temperature is 0"),
        ("[generation]\nnum_generations = 0", "generation.num_generations is 0"),
        ("[schedule]\nmax_staleness = -7", "schedule.max_staleness is -7"),
        ("[learner\nlr = 1", "run.toml: this is not valid TOML"),
        (
            'output = "o"',
            "model.path is missing: name the Hugging Face folder of a model (in RUN.toml, or with -m MODEL_DIR)",
        ),
        ('[model]\npath = "m"', "data.path is missing: name a .json or .jsonl file of prompts (-d PROMPTS.json)"),
    ],
)
def test_a_config_file(workplace: Workplace, toml: str, message: str) -> None:
    workplace.write("run.toml", toml)
    code, text = workplace.train("run.toml")
    assert code == 2
    assert text.startswith("troupe: ")
    assert message in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.toml"], "missing.toml: there is no such configuration file"),
        ([*BASE, "--lr", "-1"], "learner.lr is -1.0"),
        ([*BASE, "--max-steps", "0"], "learner.max_steps is 0"),
        ([*BASE, "--batch-size", "0"], "learner.batch_size is 0"),
        ([*BASE, "--num-generations", "1"], "generation.num_generations is 1"),
        ([*BASE, "--seed", "-1"], "seed is -1"),
        ([*BASE, "--set", "learner"], "--set learner: write it as section.key=value"),
        ([*BASE, "--set", "rewards.timeout=3"], "unknown key rewards.timeout; did you mean rewards.timeout_s?"),
        (["-m", "m", "-d", "gone.json"], "gone.json: no such file"),
        (["-m", "m", "-d", "p.yaml"], "p.yaml: unknown suffix '.yaml'"),
        (["-m", "gone", "-d", "p.json"], "gone: no such model folder"),
        ([*BASE, "--reward", "lenght"], "reward 'lenght' is unknown (did you mean length"),
        ([*BASE, "--reward", "gone.py:f"], "gone.py: no such file"),
        ([*BASE, "--reward", "format:("], "format"),
        ([*BASE, "--resume"], "nothing to resume: name the run folder to go on with (-o OUT_DIR)"),
        ([*BASE, "-o", "p.json"], "p.json: this is a file"),
        ([*BASE, "-o", "p.json/out"], "p.json/out: the output folder cannot be written"),
        ([*BASE, "-o", "m"], "m: the output folder is not empty; add --resume"),
        ([*BASE, "--set", "data.eval_path='none.json'"], "none.json: no such file"),
        ([*BASE, "--set", "curriculum.hard_threshold=0.9"], "must be below curriculum.easy_threshold (0.8)"),
        (
            [*BASE, "--set", "curriculum.enabled=true", "--set", "curriculum.reward=sum"],
            "curriculum.reward is 'sum', but the run's rewards are ",
        ),
        (
            [*BASE, "--set", "data.max_prompt_tokens=2"],
            "p.json:1: the prompt has 3 tokens, data.max_prompt_tokens allows 2; shorten",
        ),
    ],
)
def test_arguments(workplace: Workplace, arguments: list[str], message: str) -> None:
    workplace.refuses(message, *arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "", "d.json: the dataset has no rows"),
        ("d.json", "[]", "d.json: the dataset has no rows"),
        ("d.jsonl", "\n\n", "d.jsonl: the dataset has no rows"),
        ("d.json", '[{"prompt": "a"},\n {"answer": "2"}]', 'd.json:2: row 1 (counted from 0) has no "prompt"'),
        ("d.json", '[{"prompt": "a"},\n\n {"prompt" "b"}]', "d.json:3: malformed JSON"),
        ("d.jsonl", '{"prompt": "a"}\n{"prompt": 5}', "d.jsonl:2: row 1"),
        ("d.jsonl", '{"prompt": "a"}\n\n["b"]', "d.jsonl:3: row 1"),
        ("d.json", '[{"prompt": "a"}]', "d.json: the rows have no `answer` column and no reward is named"),
        ("d.jsonl", '{"prompt": "a", "answer": "1"}\n{"prompt": "' + "b" * 64 + '", "answer": "2"}',
         "d.jsonl:2: the prompt has 64 tokens, at most 63 fit beside a completion"),
    ],
)  # fmt: skip
def test_data(workplace: Workplace, name: str, content: str, message: str) -> None:
    workplace.write(name, content)
    workplace.refuses(message, "-m", "m", "-d", name)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )


def wrong_shape(model: Path) -> None:
    tensors: Any = mx.load(str(model / "model.safetensors"))
    tensors = {name: mx.array(array) for name, array in tensors.items()}
    mx.eval(tensors)
    tensors["model.norm.weight"] = mx.zeros(5)
    mx.save_safetensors(str(model / "model.safetensors"), tensors)


def half_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "holds neither model.safetensors"),
        (no_config, "holds no config.json"),
        (other_architecture, "llama"),
        (wrong_shape, "model.norm.weight: shape [5] in model.safetensors, config.json asks for [32]"),
        (half_weights, "model.safetensors: truncated"),
        (no_tokenizer, "tokenizer.json"),
    ],
)
def test_a_model_folder(workplace: Workplace, damage: Callable[[Path], None], message: str) -> None:
    damage(workplace.folder / "m")
    workplace.refuses(message, *BASE)


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("import nothing_of_this_name", "r.py:f", "r.py:1: the file does not import: ModuleNotFoundError"),
        ("def f(completions:\n", "r.py:f", "r.py:1: the file does not import: SyntaxError"),
        ("def g(completions): return [0.0]", "r.py:f", "r.py: has no 'f'"),
        ("f = 3", "r.py:f", "r.py: f is of type int and cannot be called"),
        ("\ndef f(completions, level): return [0.0]", "r.py:f", "r.py:2: reward f requires level"),
        ("def f(completions, **_): return [0.0]", "r.py:f", "reward f returned 1 scores for 3 completions"),
        ("async def f(completions, **_): return 'abc'", "r.py:f", "reward f returned 'abc' (str)"),
    ],
)
def test_a_reward_file(workplace: Workplace, source: str, spec: str, message: str) -> None:
    workplace.write("r.py", source)
    workplace.refuses(message, *BASE, "--reward", spec, "--num-generations", "3", "--batch-size", "2")


def test_the_message_is_one_and_no_traceback(workplace: Workplace) -> None:
    code, text = workplace.train("-m", "m", "-d", "gone.json")
    assert code == 2
    assert text.startswith("troupe: ")
    assert text.count("\n") == 1


def test_held_out_rows_need_the_columns_of_the_training_rows(workplace: Workplace) -> None:
    workplace.write("h.jsonl", '{"prompt": "a"}')
    workplace.refuses("h.jsonl: the held-out rows lack the column answer", *BASE, "--set", "data.eval_path=h.jsonl")


def test_max_steps_overrides_epochs_as_in_trl(tmp_path: Path, tiny_model: Path) -> None:
    assert (
        prepare(tiny_config(tiny_model, tmp_path, learner__max_steps=100, learner__epochs=1)).inputs.total_steps == 100
    )
    assert prepare(tiny_config(tiny_model, tmp_path, learner__max_steps=1, learner__epochs=9)).inputs.total_steps == 1


def test_what_is_resolved(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, generation__max_completion_length=500, learner__beta=0.1)
    prepared = prepare(config)
    assert prepared.config.generation.max_completion_length == 64 - 5  # the longest prompt has five bytes
    assert (
        "generation.max_completion_length lowered from 500 to 59: the model has 64 positions and the longest prompt "
        "takes 5"
    ) in prepared.notices
    assert prepared.config.rewards.functions == ("exact_answer",)
    assert prepared.inputs.rewards.names == ("exact_answer_reward",)
    assert prepared.folder == tmp_path / "run"
    assert not prepared.folder.exists()
    assert (prepared.inputs.total_steps, prepared.start.first_step, prepared.start.checkpoint) == (4, 0, None)
    assert prepared.start.reference is prepared.start.policy.weights
    assert prepared.start.optimizer_state.keys() == adamw_init(prepared.start.policy.weights).keys()
    assert prepare(tiny_config(tiny_model, tmp_path)).start.reference is None
    assert (
        prepare(tiny_config(tiny_model, tmp_path, learner__max_steps=None)).inputs.total_steps == 8
    )  # ⌈5 rows · 3 / 2⌉


def store_run(run: Path, config: RunConfig, *, mode: Any = "pinned", **held: Any) -> None:
    """A run with a checkpoint of its first step."""
    fresh = prepare(config)
    run.mkdir()
    write_config(fresh.config, run / "run.toml")
    state = RunState(version=1, seed=0, dataset=fresh.start.identity.dataset, num_tokens=9, mode=mode)
    policy, optimizer_state = fresh.start.policy, fresh.start.optimizer_state
    given = {"weights": policy.weights, "optimizer_state": optimizer_state, "behind": {}} | held
    save_checkpoint(checkpoint_folder(run, 1), Checkpoint(config=policy.config, state=state, **given))


@pytest.mark.parametrize(
    ("learner", "stored", "held"),
    [
        ({"learner__beta": 0.1, "learner__sync_ref_model": True}, True, "synced"),
        ({"learner__beta": 0.1, "learner__sync_ref_model": True}, False, "base"),
        ({"learner__beta": 0.1}, True, "base"),
        ({"learner__beta": 0.1}, False, "base"),
        ({}, True, None),
    ],
)
def test_the_reference_of_a_resumed_run(
    tmp_path: Path, tiny_model: Path, learner: dict[str, Any], stored: bool, held: str | None
) -> None:
    config = tiny_config(tiny_model, tmp_path, **learner)
    base = load_policy(tiny_model)
    synced = {name: 2 * array for name, array in base.weights.items()}
    store_run(tmp_path / "run", config, weights=synced, reference=synced if stored else None)
    prepared = prepare(config, resume=True)
    assert prepared.start.checkpoint is not None
    assert prepared.start.checkpoint.state.num_tokens == 9
    if held is None:
        assert prepared.start.reference is None
    else:
        assert prepared.start.reference is not None
        assert same_bits(prepared.start.reference, synced if held == "synced" else base.weights)


def test_a_run_that_was_begun_with_a_variable_of_no_use_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": [{"role": "user", "content": "x"}], "answer": "y"}\n')
    useless = {"enable_thinking": False}
    bare = tiny_config(tiny_model, tmp_path, data__path=str(tmp_path / "c.jsonl"))
    config = msgspec.structs.replace(bare, data=msgspec.structs.replace(bare.data, chat_template_kwargs=useless))
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.enable_thinking"):
        prepare(config)
    run, fresh = tmp_path / "run", prepare(bare)
    run.mkdir()
    write_config(msgspec.structs.replace(fresh.config, data=config.data), run / "run.toml")
    again = prepare(config, resume=True)
    assert again.inputs.schedule.prompt(Slot(step=0, place=0)) == fresh.inputs.schedule.prompt(Slot(step=0, place=0))


def test_a_chat_template_is_told_the_day_on_which_the_run_began(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%m%d') }} {{ messages[0].content }}")
    (tmp_path / "c.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}], "answer": "2"}\n')
    config = tiny_config(model, tmp_path, data__path=str(tmp_path / "c.jsonl"))
    today = prepare(config).config.data.chat_template_date
    assert today is not None
    then = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, chat_template_date="2024-02-29"))
    began = prepare(then)
    (tmp_path / "run").mkdir()
    write_config(began.config, tmp_path / "run" / "run.toml")
    resumed = prepare(config, resume=True)
    assert resumed.config.data.chat_template_date == "2024-02-29"
    ids = resumed.inputs.schedule.prompt(Slot(step=0, place=0)).prompt_ids
    assert resumed.start.policy.tokenizer.decode(ids) == "0229 1"


@pytest.mark.parametrize(("began", "goes_on"), [("free", "pinned"), ("pinned", "free")])
def test_a_run_is_not_resumed_with_another_schedule(tmp_path: Path, tiny_model: Path, began: Any, goes_on: str) -> None:
    config = tiny_config(tiny_model, tmp_path, schedule__mode=goes_on)
    store_run(tmp_path / "run", config, mode=began)
    with pytest.raises(CheckpointError, match=f"the run's schedule is '{began}', not '{goes_on}'"):
        prepare(config, resume=True)


def test_given_rewards_stand_beside_named_ones_with_weights(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, rewards__functions=["length"])
    assert prepare(config, [weigh_ids]).inputs.rewards.names == ("length_reward", "weigh_ids")


def test_a_config_made_in_python_is_checked_too(tiny_model: Path) -> None:
    wrong = RunConfig(learner=LearnerConfig(lr=-1.0), model=ModelConfig(path=str(tiny_model)))
    with pytest.raises(ConfigError, match=r"learner.lr is -1.0"):
        prepare(wrong)


def test_missing_paths_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"model.path is missing"):
        prepare(RunConfig())


def test_a_run_is_planned_below_its_memory_limit(tmp_path: Path, tiny_model: Path) -> None:
    free = prepare(tiny_config(tiny_model, tmp_path))
    assert free.memory.limit_gb is None
    assert (free.config.learner.gradient_accumulation_steps, free.config.checkpoint.overlap) == (1, True)
    peak_gb = peak_bytes(free.memory.phases) / GB
    prepared = prepare(tiny_config(tiny_model, tmp_path, memory_limit_gb=0.99 * peak_gb))
    assert prepared.memory.limit_gb == 0.99 * peak_gb
    assert prepared.config.checkpoint.overlap is False
    assert prepared.memory.notices[0] in prepared.notices
    with pytest.raises(ConfigError, match=r"but the run takes .* GB at the least"):
        prepare(tiny_config(tiny_model, tmp_path, memory_limit_gb=1e-6))


def test_without_arrays_all_else_stays(tmp_path: Path, tiny_model: Path) -> None:
    prepared = prepare(tiny_config(tiny_model, tmp_path, learner__beta=0.1))
    rest = prepared.without_arrays()
    assert not list(arrays_in([rest.start.policy.weights, rest.start.reference, rest.start.optimizer_state]))
    assert (rest.start.policy.config, rest.start.policy.path) == (
        prepared.start.policy.config,
        prepared.start.policy.path,
    )
    assert (rest.config, rest.inputs.total_steps, rest.start.first_step) == (prepared.config, 4, 0)
    optimizer_state = adamw_init(prepared.start.policy.weights)
    stored = Checkpoint(
        config=prepared.start.policy.config,
        weights=prepared.start.policy.weights,
        optimizer_state=optimizer_state,
        behind={1: prepared.start.policy.weights},
        state=RunState(version=2, seed=0, dataset=""),
        reference=prepared.start.policy.weights,
    )
    start = msgspec.structs.replace(prepared.start, checkpoint=stored).without_arrays()
    assert start.first_step == 2
    assert not list(arrays_in(start.checkpoint))


@pytest.mark.parametrize(
    ("schedule", "on_cpu", "placed"),
    [
        ({}, True, ("thread", 8)),
        ({"max_staleness": 1}, True, ("process", 4)),
        ({"max_staleness": 1}, False, ("thread", None)),
        ({"generator_processes": 3}, True, ("process", 2)),
        ({"max_staleness": 1, "generator_processes": 11}, True, ("process", 1)),
        ({"generator": "thread", "max_staleness": 1}, True, ("thread", 8)),
        ({"generator": "process"}, False, ("process", None)),
        ({"generator": "process", "blas_threads": 3}, True, ("process", 3)),
    ],
)
def test_the_resolved_config_says_where_the_generator_runs_and_with_how_many_threads(
    tmp_path: Path,
    tiny_model: Path,
    schedule: dict[str, Any],
    on_cpu: bool,
    placed: tuple[str, int | None],
) -> None:
    machine = Machine(on_cpu=on_cpu, cores=8)
    settings = {"schedule__generator": "auto"} | {f"schedule__{key}": value for key, value in schedule.items()}
    settings["learner__batch_size"] = 11
    config = prepare(tiny_config(tiny_model, tmp_path, **settings), [weigh_ids], machine=machine).config
    assert (config.schedule.generator, config.schedule.blas_threads) == placed


@pytest.mark.parametrize(
    ("settings", "placed"),
    [
        ({}, ("process", 8, 1, 8)),
        ({"learner__batch_size": 3}, ("process", 3, 2, 6)),
        ({"schedule__max_staleness": 1}, ("process", 1, 4, 4)),
        ({"schedule__generator": "thread"}, ("thread", 1, 8, 8)),
        ({"schedule__generator": "process"}, ("process", 1, 8, 8)),
        ({"schedule__blas_threads": 2}, ("thread", 1, 2, 2)),
        ({"memory_limit_gb": 8.0}, ("thread", 1, 8, 8)),
    ],
)
def test_light_weights_are_decoded_in_a_process_a_core_where_there_is_much_to_do(
    tmp_path: Path,
    tiny_model: Path,
    settings: dict[str, Any],
    placed: tuple[str, int, int, int],
) -> None:
    machine = Machine(on_cpu=True, cores=8, worthwhile=64)
    settings = {"schedule__generator": "auto", "learner__batch_size": 11} | settings
    config = tiny_config(tiny_model, tmp_path, **settings)
    memory = prepare(config, [weigh_ids], machine=machine).memory
    schedule = memory.config.schedule
    assert (schedule.generator, schedule.generator_processes, schedule.blas_threads) == placed[:3]
    assert memory.config.schedule.learner_streams == placed[3]
    if settings == {"schedule__generator": "auto", "learner__batch_size": 11}:
        heavy = msgspec.structs.replace(machine, light=1)
        schedule = prepare(config, [weigh_ids], machine=heavy).config.schedule
        assert (schedule.generator, schedule.generator_processes) == ("thread", 1)


def test_more_processes_than_prompts_a_step_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"schedule__generator": "process", "schedule__generator_processes": 3, "learner__batch_size": 2}
    with pytest.raises(ConfigError, match=r"generator_processes is 3, but a step has only 2 prompts .* at most 2"):
        prepare(tiny_config(tiny_model, tmp_path, **settings), [weigh_ids])


def test_parts_that_are_given_place_a_run_alike_whoever_decodes(tmp_path: Path, tiny_model: Path) -> None:
    """What decides bits must not follow from the number of processes then."""
    found = set()
    for processes in range(4):
        generator = "process" if processes else "thread"
        settings: dict[str, Any] = {"schedule__generator": generator, "schedule__generator_processes": processes or 1}
        config = tiny_config(tiny_model, tmp_path, learner__batch_size=6, schedule__parts=4, **settings)
        placed = prepare(config, [weigh_ids], machine=Machine(on_cpu=True, cores=8, worthwhile=64)).config
        schedule, learner = placed.schedule, placed.learner
        assert (schedule.parts, schedule.generator) == (4, generator)
        found.add((schedule.blas_threads, schedule.learner_streams, learner.gradient_accumulation_steps))
    assert found == {(2, 8, 9)}


@pytest.mark.parametrize(
    ("parts", "mode", "serve", "told"),
    [
        (None, "pinned", "127.0.0.1:0", 1),
        (2, "pinned", "127.0.0.1:0", 0),
        (None, "free", "127.0.0.1:0", 0),
        (None, "pinned", None, 0),
    ],
)
def test_who_waits_for_workers_is_told_that_one_part_is_one_workers(
    tmp_path: Path, tiny_model: Path, parts: int | None, mode: str, serve: str | None, told: int
) -> None:
    settings: dict[str, Any] = {"schedule__mode": mode}
    settings |= {} if parts is None else {"schedule__parts": parts}
    settings |= {} if serve is None else {"cluster__serve": serve}
    prepared = prepare(tiny_config(tiny_model, tmp_path, **settings), [weigh_ids])
    assert sum("schedule.parts is 1" in notice for notice in prepared.notices) == told


@pytest.mark.parametrize("generator", ["thread", "process"])
def test_a_step_has_at_most_as_many_parts_as_prompts(tmp_path: Path, tiny_model: Path, generator: str) -> None:
    config = tiny_config(tiny_model, tmp_path, schedule__parts=3, schedule__generator=generator)
    with pytest.raises(ConfigError, match=r"schedule\.parts is 3, but a step has only 2 prompts .* at most 2"):
        prepare(config, [weigh_ids])


def test_without_openblas_no_threads_are_named(tmp_path: Path, tiny_model: Path) -> None:
    machine = Machine(on_cpu=True, cores=None)
    assert prepare(tiny_config(tiny_model, tmp_path), [weigh_ids], machine=machine).config.schedule.blas_threads is None
