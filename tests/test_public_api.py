"""The names and signatures that users may rely on."""

from __future__ import annotations

import importlib
import inspect

import pytest

import troupe

CONTRACT = {
    "troupe": {
        "RewardActor",
        "RewardSample",
        "RunConfig",
        "RunResult",
        "Supervisor",
        "TroupeError",
        "diagnose",
        "generate_and_score",
        "load_config",
        "train",
    },
    "troupe.policy": {
        "Policy",
        "NetworkConfig",
        "Qwen3Config",
        "RolloutEngine",
        "Sampler",
        "SamplingConfig",
        "Tokenizer",
        "load_policy",
    },
    "troupe.policy.sampling": {
        "Sampler",
        "SamplingConfig",
        "apply_min_p",
        "apply_repetition_penalty",
        "apply_top_k",
        "apply_top_p",
        "apply_xtc",
        "categorical_sample",
    },
    "troupe.policy.rollout": {"RolloutEngine", "generate_batch"},
    "troupe.grpo": {
        "LossConfig",
        "compute_advantages",
        "entropy_from_logits",
        "grpo_loss",
        "selective_log_softmax",
    },
    "troupe.rewards": {
        "RewardActor",
        "RewardManager",
        "RewardSample",
        "diversity_reward",
        "exact_answer_reward",
        "format_reward",
        "length_reward",
    },
    "troupe.environments": {"EnvironmentConfig", "StepResult"},
    "troupe.dataset": {"PromptDataset"},
    "troupe.checkpoint": {"load_checkpoint", "save_checkpoint"},
    "troupe.messages": {
        "Checkpoint",
        "Drain",
        "GroupClosed",
        "Incident",
        "Prompt",
        "Rollout",
        "RolloutGroup",
        "ScoredGroup",
        "Snapshot",
        "Span",
        "Update",
    },
}


@pytest.mark.parametrize("module", CONTRACT)
def test_the_names_of_the_contract_are_there_and_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in CONTRACT[module]:
        assert inspect.getdoc(getattr(loaded, name)), f"{module}.{name} has no docstring"


def test_all_of_the_package_is_exactly_the_contract() -> None:
    assert set(troupe.__all__) == CONTRACT["troupe"]


@pytest.mark.parametrize("module", [name for name in CONTRACT if hasattr(importlib.import_module(name), "__all__")])
def test_every_name_in_all_can_be_imported(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(set(loaded.__all__))
    for name in loaded.__all__:
        assert hasattr(loaded, name)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("troupe.policy.load_policy", ["path", "dtype", "adapter"]),
        ("troupe.policy.Policy.compute_log_probs", ["self", "prompt_ids", "completion_ids"]),
        (
            "troupe.policy.Policy.generate_text",
            ["self", "prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed"],
        ),
        ("troupe.policy.Tokenizer.encode", ["self", "text", "add_special_tokens"]),
        ("troupe.policy.Tokenizer.decode", ["self", "ids", "skip_special_tokens"]),
        ("troupe.policy.sampling.apply_top_k", ["logprobs", "top_k"]),
        ("troupe.policy.sampling.apply_top_p", ["logprobs", "top_p"]),
        ("troupe.policy.sampling.apply_min_p", ["logprobs", "min_p", "min_tokens_to_keep"]),
        ("troupe.policy.sampling.apply_repetition_penalty", ["logits", "tokens", "penalty", "context_size"]),
        ("troupe.policy.sampling.categorical_sample", ["logits", "temperature", "key"]),
        ("troupe.grpo.selective_log_softmax", ["logits", "target_ids"]),
        ("troupe.grpo.entropy_from_logits", ["logits"]),
        ("troupe.dataset.PromptDataset.shuffle", ["self", "seed"]),
        ("troupe.dataset.PromptDataset.batches", ["self", "batch_size"]),
    ],
)
def test_signatures_of_the_contract(path: str, parameters: list[str]) -> None:
    module, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, class_name = module.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_the_leading_arguments_of_the_loss_are_the_contracts() -> None:
    from troupe.grpo import compute_advantages, grpo_loss

    parameters = list(inspect.signature(grpo_loss).parameters)
    assert parameters[:5] == [
        "per_token_logps",
        "old_per_token_logps",
        "advantages",
        "completion_mask",
        "config",
    ]
    assert "ref_per_token_logps" in parameters
    assert list(inspect.signature(compute_advantages).parameters)[:3] == ["rewards", "num_generations", "scale_rewards"]


def test_the_guard_of_scripts_is_where_the_documents_have_it() -> None:
    assert inspect.getdoc(troupe.runtime.Guard)
