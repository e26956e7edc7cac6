"""External engines of a run: whether it can have them, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from troupe.actors.generator.engines.dialects import (
    Dialect,
    EngineWay,
    MlxLmDialect,
    OtherDialect,
    VllmDialect,
    text_of_prompt,
)
from troupe.actors.generator.engines.folders import EngineFolders
from troupe.actors.generator.engines.members import EngineMembers, LogProbs
from troupe.actors.generator.engines.server import EngineServer, Sampling
from troupe.actors.generator.engines.settings import EngineConfig
from troupe.dataset import PromptDataset
from troupe.errors import ConfigError, DatasetError
from troupe.policy import Policy, Weights, completion_statistics
from troupe.policy.decode.stopping import StopRules
from troupe.policy.model_files import ADAPTER_CONFIG, WEIGHTS_FILE
from troupe.policy.network.tensors import as_stored
from troupe.policy.safetensors import safetensors_bytes, safetensors_chunks
from troupe.run.config import RunConfig
from troupe.runtime.device import DeviceThread
from troupe.runtime.http_client import HttpClient, is_in_the_clear, key_from

_SMALL_BYTES = 1 << 20
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "xtc_probability": 0.0,
    "logit_bias": {},
}
"""What changes which distribution a log-prob is of, in ways in which servers differ."""


def check_engines(config: RunConfig) -> list[str]:
    """What to tell about the engines that a config names. ConfigError for what cannot go with them."""
    engines = config.schedule.engines
    if not engines:
        return []
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(config.generation, name)) != neutral:
            raise ConfigError(
                f"generation.{name} is {value!r}, but schedule.engines do not tell log-probs before it; leave it out"
            )
    if not config.learner.vllm_importance_sampling_correction:
        raise ConfigError(
            "learner.vllm_importance_sampling_correction is off, but schedule.engines sample with kernels, types and "
            "weights of their own, for which nothing else corrects; leave it on"
        )
    if config.learner.router_replay != "off":
        raise ConfigError(
            f"learner.router_replay is {config.learner.router_replay!r}, but schedule.engines do not tell which "
            "experts they took; leave it out"
        )
    told = []
    for place, engine in enumerate(engines):
        told += _check_engine(config, engine, f"schedule.engines[{place}]")
    return told


def _check_engine(config: RunConfig, engine: EngineConfig, key: str) -> list[str]:
    if engine.kind == "mlx-lm" and config.generation.temperature != 1.0:
        raise ConfigError(
            f"generation.temperature is {config.generation.temperature:g}, but mlx_lm.server ({key}) tells log-probs "
            "at temperature 1 only; set it to 1"
        )
    if _is_left(engine) and config.schedule.on_stale != "correct":
        raise ConfigError(
            f"{key}: its weights stay those that the run begins with, and schedule.on_stale = "
            f"'{config.schedule.on_stale}' leaves out what is older than max_staleness; set on_stale to 'correct'"
        )
    folder = engine.weights_folder
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"{key}.weights_folder is {folder!r}: there is no such folder; make it, or name another")
    if engine.api_key_env is None:
        return []
    try:
        key_from(engine.api_key_env)
    except ValueError as error:
        raise ConfigError(f"{key}.api_key_env: {error}") from None
    if is_in_the_clear(engine.base_url):
        return [f"{key}: its key, prompts and completions go over the network in the clear; https would hide them"]
    return []


def check_engine_inputs(
    config: RunConfig, policy: Policy, dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], *, acts: bool
) -> None:
    """ConfigError, or DatasetError, where what is trained, or a prompt, cannot go to an engine."""
    engines = config.schedule.engines
    if engines and acts:
        raise ConfigError("schedule.engines cannot act in an environment or with tools; leave the one or the other out")
    for place, engine in enumerate(engines):
        _way(policy, engine, f"schedule.engines[{place}]")
    if not any(engine.kind == "mlx-lm" for engine in engines):
        return
    for row, ids in zip(dataset, prompt_ids, strict=True):
        if text_of_prompt(policy.tokenizer, ids) is None:
            raise DatasetError(
                f"{dataset.source}: row {row.row}: mlx_lm.server takes prompts as text, and none is read as exactly "
                "the tokens of this one; change it, or take another engine"
            )


def _is_left(engine: EngineConfig) -> bool:
    """Whether its weights stay as they are."""
    return engine.weights == "none" or engine.kind == "openai"


def _way(policy: Policy, engine: EngineConfig, key: str) -> EngineWay:
    """How weights reach an engine. ConfigError where they cannot."""
    adapter = policy.base.adapter
    if _is_left(engine):
        return "none"
    ours: EngineWay = "reload" if adapter is None else "adapter"
    if engine.weights not in ("auto", ours):
        what = "the whole network is" if adapter is None else "an adapter is"
        raise ConfigError(f"{key}.weights is '{engine.weights}', but {what} trained; say '{ours}', or leave it out")
    if adapter is not None and engine.kind == "vllm":
        if adapter.kind == "dora":
            raise ConfigError(f"{key}: vLLM has no DoRA; train with adapter.kind = 'lora', or take another engine")
        if len(set(adapter.modules.values())) > 1:
            raise ConfigError(
                f"{key}: vLLM takes one rank and scale for all modules; leave out adapter.rank_pattern and "
                "adapter.alpha_pattern, or take another engine"
            )
    return ours


def engine_members(
    config: RunConfig, policy: Policy, folder: Path, source: Path, probe_ids: tuple[int, ...], device: DeviceThread
) -> Callable[[], EngineMembers]:
    """The maker of the members. `source`: the folder of the model, which engines have under this name if the config
    says no other. `policy`: its weights are not kept."""
    bare = policy.having({})
    make = partial(_server, config, bare, folder, source, _sampling(config, bare))
    places = {engine.weights_folder for engine in config.schedule.engines}
    folders = partial(EngineFolders, folder, partial(_save, bare), size_of=partial(_size_of, bare))
    return lambda: EngineMembers(
        [make(number, engine) for number, engine in enumerate(config.schedule.engines)],
        folders={place: folders(place=None if place is None else Path(place)) for place in places},
        device=device,
        probe_ids=probe_ids,
        own_log_probs=_own_log_probs(config, bare),
        alone=config.schedule.engines_alone,
    )


def _server(
    config: RunConfig, policy: Policy, folder: Path, source: Path, sampling: Sampling, number: int, engine: EngineConfig
) -> EngineServer:
    key = None if engine.api_key_env is None else key_from(engine.api_key_env)
    client = HttpClient(engine.base_url, key=key, timeout_s=engine.timeout_s)
    model = engine.model or str(source)
    dialect: Dialect = OtherDialect()
    if engine.kind == "vllm":
        dialect = VllmDialect(client, model, run=str(folder), stop_ids=sorted(policy.eos_ids), seed=config.seed)
    elif engine.kind == "mlx-lm":
        dialect = MlxLmDialect(model, policy.tokenizer)
    return EngineServer(engine, client, dialect, _way(policy, engine, f"schedule.engines[{number}]"), sampling, model)


def _sampling(config: RunConfig, policy: Policy) -> Sampling:
    generation, tokenizer = config.generation, policy.tokenizer
    rules = StopRules(
        policy.eos_ids,
        generation.stop,
        partial(tokenizer.decode_stream, skip_special_tokens=False),
        generation.repetition_cutoff,
        generation.repetition_pattern,
    )
    return Sampling(generation=generation, rules=rules, vocab_size=policy.config.vocab_size, tokenizer=tokenizer)


def _save(policy: Policy, path: Path, weights: Weights) -> None:
    """Write a folder as checkpoints are, so that a card's arrays stay on the card; but with nothing put on a disk for
    good."""
    path.mkdir()
    files = policy.base.files_of(policy.config, weights)
    tensors: Mapping[str, tuple[Mapping[str, mx.array], dict[str, str]]]
    if files is None:
        policy.companions.write(path, policy.config, weights)
        tensors = {WEIGHTS_FILE: (as_stored(policy.config, weights), {"format": "pt"})}
    else:
        (path / ADAPTER_CONFIG).write_bytes(files.settings)
        tensors = files.tensors
    for name, (arrays, metadata) in tensors.items():
        mx.eval(list(arrays.values()))
        with (path / name).open("wb") as file:
            file.writelines(safetensors_chunks(arrays, metadata))


def _size_of(policy: Policy, weights: Weights) -> int:
    size = safetensors_bytes(weights)  # an adapter lies there twice
    return (size if policy.base.adapter is None else 2 * size) + policy.companions.total_bytes + _SMALL_BYTES


def _own_log_probs(config: RunConfig, policy: Policy) -> LogProbs:
    def log_probs(weights: Weights, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        network = policy.base.completed(policy.config, weights)
        rows = [list(prompt)], [list(completion)]
        found, _ = completion_statistics(policy.config, network, *rows, config.generation.temperature)
        values: list[list[float]] = found.tolist()  # type: ignore[assignment]
        return values[0][: len(completion)]

    return log_probs
